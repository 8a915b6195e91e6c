"""Records in PostgreSQL through the database tier, beside psycopg alone; from which prefill rate on they do not pay.

The server is one of this machine's own, on a unix socket, with its defaults for durability. The tables hold noise.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import numpy as np

from kvpool.bench.area import Conditions
from kvpool.bench.rounds import alone, beside, bytes_per_second, seconds_per_call
from kvpool.bench.row import Row, at_most, ratio_at_most
from kvpool.bench.shared.postgres import Bare, bare_connection, postgres_server
from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.catalog import payload_statements as sql
from kvpool.catalog.connections import Connections
from kvpool.catalog.migrations import Schema
from kvpool.catalog.payloads import PayloadTier
from kvpool.tiers.tier import Found, Sealed

KIB, MIB = 1 << 10, 1 << 20
BLOCK_TOKENS = 64
SIZES: tuple[tuple[int, str], ...] = (
    (64 * KIB, "64KiB"),
    (256 * KIB, "256KiB"),
    (MIB, "1MiB"),
    (2 * MIB, "2MiB"),
    (4 * MIB, "4MiB"),
)
ROWS = 20_000
"""Small records among which one is looked up."""
BATCH_KEYS = 256
READ_BYTES = 32 * MIB
PROMPT_BLOCKS = 16
CALLS = 200
BUDGET_S = 30.0
_TREE = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)
_MIB_PER_BYTE = 1 / MIB
_US, _MS = 1e6, 1e3


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `payloads`."""
    with postgres_server(conditions.directory) as address:
        connections = Connections(lambda: address, size=2, budget_s=BUDGET_S, tls=False)
        tier = PayloadTier(connections, Schema(), inline_max_bytes=8 * MIB, inline_bytes=4 << 30)
        try:
            with bare_connection(address) as bare:
                yield from _lookups(tier, bare, conditions)
                for nbytes, name in SIZES:
                    yield from _moves(tier, bare, nbytes, name, conditions)
        finally:
            connections.close()


def _lookups(tier: PayloadTier, bare: Bare, conditions: Conditions) -> Iterator[Row]:
    """One key, and a batch of them: the same statement by psycopg alone on the other side."""
    keys = [_key(number) for number in range(conditions.scaled(ROWS, least=2 * BATCH_KEYS))]
    record = np.frombuffer(os.urandom(PAGE_BYTES), np.uint8)
    for first in range(0, len(keys), 1_000):
        _stored(tier, [Sealed(key, 0, record) for key in keys[first : first + 1_000]])
    bare.execute("analyze kvpool.payloads")

    def figure(count: int, calls: int) -> tuple[Callable[[], object], Callable[[], object], int]:
        batches = cycle([keys[first : first + count] for first in range(0, len(keys) - count, count)])

        def alone_by_psycopg() -> object:
            return bare.cursor(binary=True).execute(sql.FIND, {"keys": next(batches), "codecs": [0]}).fetchall()

        return lambda: tier.find(_TREE, next(batches), [0]), alone_by_psycopg, conditions.scaled(calls, least=5)

    ours, theirs, calls = figure(1, CALLS)
    of_one = beside(seconds_per_call(ours, calls), seconds_per_call(theirs, calls), 3 * conditions.rounds)
    yield Row("payloads.select.1", "us", of_one.in_unit(_US), ratio_at_most(1.3))
    ours, theirs, calls = figure(BATCH_KEYS, CALLS // 4)
    of_many = beside(seconds_per_call(ours, calls), seconds_per_call(theirs, calls), conditions.rounds)
    yield Row(f"payloads.select.{BATCH_KEYS}", "ms", of_many.in_unit(_MS), at_most(2.0))


def _moves(tier: PayloadTier, bare: Bare, nbytes: int, name: str, conditions: Conditions) -> Iterator[Row]:
    """Writing and reading records of one size, and the prefill rate at which reading them is no gain."""
    count = max(2, conditions.scaled(READ_BYTES) // nbytes)
    records = [np.frombuffer(os.urandom(nbytes), np.uint8) for _ in range(count)]
    buffers = [np.zeros(nbytes, np.uint8) for _ in range(max(count, PROMPT_BLOCKS))]
    rounds = iter(range(1, 1_000_000))

    def put() -> None:
        first = next(rounds) * 1_000 + nbytes * 1_000_000
        _stored(tier, [Sealed(_key(first + at), 0, record) for at, record in enumerate(records)])

    written = alone(bytes_per_second(put, nbytes * count), conditions.rounds)
    yield Row(f"payloads.put.{name}", "MiB/s", written.in_unit(_MIB_PER_BYTE))

    wanted = [Found(_key(1_000 + nbytes * 1_000_000 + at), 0, nbytes) for at in range(count)]

    def get(blocks: int) -> None:
        moved = tier.get(_TREE, wanted[:blocks], buffers[:blocks])
        if not all(moved.done):
            raise RuntimeError(f"a record did not come back: {moved.fault}")

    def copy_by_psycopg() -> None:
        query = "copy (select record from kvpool.payloads where key = any(%s)) to stdout (format binary)"
        with bare.cursor() as cursor, cursor.copy(query, ([found.key for found in wanted],)) as rows:
            for _ in rows:
                pass

    read = beside(
        bytes_per_second(lambda: get(count), nbytes * count),
        bytes_per_second(copy_by_psycopg, nbytes * count),
        2 * conditions.rounds,
    )
    yield Row(f"payloads.get.{name}", "MiB/s", read.in_unit(_MIB_PER_BYTE))
    for blocks in sorted({1, min(PROMPT_BLOCKS, count)}):
        calls = conditions.scaled(max(3, min(CALLS, READ_BYTES // (blocks * nbytes))), least=2)
        took = alone(seconds_per_call(lambda blocks=blocks: get(blocks), calls), conditions.rounds)  # type: ignore[misc]
        rate = blocks * BLOCK_TOKENS / took.value
        yield Row(f"payloads.break-even.{name}.{blocks}-blocks", "tokens/s", took._replace(value=rate))
    tier.forget_model(_TREE.fingerprint)


def _stored(tier: PayloadTier, records: Sequence[Sealed]) -> None:
    moved = tier.put(_TREE, records, [])
    if not all(moved.done):
        raise RuntimeError(f"a record was not stored: {moved.fault}")


def _key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))

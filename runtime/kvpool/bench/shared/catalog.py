"""The catalog: rows in, beside psycopg's COPY into the same tables without keys; what is asked by key; the journal.

The server is one of this machine's own, on a unix socket, with its defaults for durability. A row is a block with its
location, two rows of the database. The keys are random, as those of blocks are.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, cycle
from pathlib import Path
from time import perf_counter, time
from uuid import UUID, uuid4

from kvpool.bench.area import Conditions
from kvpool.bench.rounds import Measure, alone, beside, seconds_per_call
from kvpool.bench.row import Figure, Row, at_least, at_most, ratio_at_most
from kvpool.bench.shared.postgres import Bare, bare_connection, postgres_server
from kvpool.blocks.identity import KEY_BYTES, BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog import trail
from kvpool.catalog.catalog import Catalog
from kvpool.catalog.connections import Connections
from kvpool.catalog.encoding import encode
from kvpool.catalog.journal import Journal
from kvpool.catalog.migrations import Schema
from kvpool.catalog.rows import Batch, BlocksRemoved, BlocksStored, ModelSeen
from kvpool.catalog.statement import Statement
from kvpool.catalog.writer import CatalogWriter
from kvpool.tiers.tier import TierName

ROWS = 40_000
PROMPT_BLOCKS = 32
BATCH_KEYS = 256
CALLS = 500
OFFERS = 20_000
DEADLINE_S = 120.0
BUDGET_S = 30.0
_TREE = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)
_SEEN = ModelSeen(_TREE.fingerprint, "bench", "", "{}", 0.0)
_AT_S = 1_700_000_000.0
_US, _MS = 1e6, 1e3

Connection = Bare


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `catalog`."""
    with postgres_server(conditions.directory) as address:
        connections = Connections(lambda: address, size=4, budget_s=BUDGET_S, tls=False)
        schema = Schema()
        try:
            with bare_connection(address) as bare:
                yield from _written(connections, schema, bare, conditions)
                yield from _asked(Catalog(connections, schema), bare, conditions)
            yield from _offered(connections, schema, conditions)
        finally:
            connections.close()
    yield from _kept(conditions)


@contextmanager
def _writer(connections: Connections, schema: Schema, node: UUID) -> Iterator[CatalogWriter]:
    writer = CatalogWriter(connections, None, node=node, schema=schema)
    writer.start()
    try:
        writer.offer(_SEEN)
        _flush(writer)
        yield writer
    finally:
        writer.close(DEADLINE_S)


def _written(connections: Connections, schema: Schema, bare: Connection, conditions: Conditions) -> Iterator[Row]:
    rows = conditions.scaled(ROWS, least=PROMPT_BLOCKS)
    with (
        _writer(connections, schema, uuid4()) as writer,
        _writer(connections, schema, uuid4()) as other,
    ):
        by_copy = _rows_per_second_of_copy(bare, rows)
        one = beside(_rows_per_second([writer], rows), by_copy, conditions.rounds)
        yield Row("catalog.rows-in", "rows/s", one, at_least(20_000))
        two = alone(_rows_per_second([writer, other], rows), conditions.rounds)
        yield Row("catalog.rows-in.2-writers", "rows/s", two)


def _rows_per_second(writers: list[CatalogWriter], rows: int) -> Measure:
    """Blocks of new prompts, told to each writer and waited for."""

    def measure() -> float:
        began_s = perf_counter()
        for _ in range(rows // PROMPT_BLOCKS):
            for writer in writers:
                writer.offer(_prompt())
        for writer in writers:
            _flush(writer)
        return len(writers) * rows / (perf_counter() - began_s)

    return measure


def _rows_per_second_of_copy(bare: Connection, rows: int) -> Measure:
    """The same columns, into tables that have neither index nor reference nor trigger."""
    bare.execute("create temporary table bare_blocks (like kvpool.blocks including defaults)")
    bare.execute("create temporary table bare_locations (like kvpool.locations)")
    blocks = "copy bare_blocks (key, fingerprint, tenant, epoch, parent, depth, tokens, created_at, last_used_at)"
    locations = "copy bare_locations (key, tier, node, codec, nbytes, fingerprint, tenant, since)"

    def measure() -> float:
        began_s = perf_counter()
        keys = [os.urandom(KEY_BYTES) for _ in range(rows)]
        with bare.transaction(), bare.cursor() as cursor:
            with cursor.copy(f"{blocks} from stdin") as copy:
                for at, key in enumerate(keys):
                    copy.write_row((key, *_TREE, keys[at - 1], at, 64, "2024-01-01Z", "2024-01-01Z"))
            with cursor.copy(f"{locations} from stdin") as copy:
                for key in keys:
                    copy.write_row((key, "ram", UUID(int=1), 0, 4096, _TREE.fingerprint, _TREE.tenant, "2024-01-01Z"))
        return rows / (perf_counter() - began_s)

    return measure


def _asked(catalog: Catalog, bare: Connection, conditions: Conditions) -> Iterator[Row]:
    """One key and a batch of them; the same statement by psycopg alone on the other side."""
    bare.execute("vacuum analyze kvpool.locations")
    some = bare.execute("select key from kvpool.locations limit %s", (conditions.scaled(20_000, least=BATCH_KEYS),))
    keys = [BlockKey(bytes(key)) for (key,) in some.fetchall() if isinstance(key, bytes)]
    ones, batches = cycle(keys), cycle([keys[at : at + BATCH_KEYS] for at in range(0, len(keys), BATCH_KEYS)])
    calls = conditions.scaled(CALLS, least=5)

    def one_by_psycopg() -> None:
        bare.execute(trail.LOCATE_ONE, {"key": next(ones)}, binary=True).fetchall()

    of_one = beside(
        seconds_per_call(lambda: catalog.locate([next(ones)]), calls),
        seconds_per_call(one_by_psycopg, calls),
        3 * conditions.rounds,
    )
    yield Row("catalog.select.1", "us", of_one.in_unit(_US), ratio_at_most(1.3))
    for name, ask, statement in (("select", catalog.locate, trail.LOCATE), ("trail", catalog.trail, trail.TRAIL)):
        of_many = beside(
            seconds_per_call(partial(_call_with_next, ask, batches), calls // 5),
            seconds_per_call(partial(_fetch_all, bare, statement, batches), calls // 5),
            conditions.rounds,
        )
        yield Row(f"catalog.{name}.{BATCH_KEYS}", "ms", of_many.in_unit(_MS), at_most(2.0))


def _call_with_next(ask: Callable[[Sequence[BlockKey]], object], batches: Iterator[Sequence[BlockKey]]) -> None:
    ask(next(batches))


def _fetch_all(bare: Connection, statement: Statement, batches: Iterator[Sequence[BlockKey]]) -> None:
    bare.execute(statement, {"keys": list(next(batches))}, binary=True).fetchall()


def _offered(connections: Connections, schema: Schema, conditions: Conditions) -> Iterator[Row]:
    """What a report costs the thread that makes it, while the writer is at work."""
    offers = conditions.scaled(OFFERS, least=100)
    with _writer(connections, schema, uuid4()) as writer:
        removal = BlocksRemoved(os.urandom(KEY_BYTES), TierName.RAM, "evicted", _AT_S)

        def measure() -> float:
            seconds = seconds_per_call(lambda: writer.offer(removal), offers)()
            _flush(writer)
            return seconds

        yield Row("catalog.offer", "us", alone(measure, conditions.rounds).in_unit(_US))


def _kept(conditions: Conditions) -> Iterator[Row]:
    """Batches into the journal, each synced, and out of it."""
    rows = conditions.scaled(ROWS, least=4_096)
    prompts = 4_096 // PROMPT_BLOCKS
    batches = [encode(Batch(1, at, tuple(_prompt() for _ in range(prompts)))) for at in range(rows // 4_096)]
    number = count()

    def append(directory: Path) -> tuple[Journal, float]:
        journal = Journal(directory / str(next(number)), max_bytes=1 << 30)
        journal.open()
        began_s = perf_counter()
        for batch in batches:
            journal.append(batch, 4_096)
        return journal, perf_counter() - began_s

    def in_and_out(directory: Path) -> tuple[float, float]:
        journal, in_s = append(directory)
        began_s = perf_counter()
        while journal.first() is not None:
            journal.take()
        journal.close()
        return in_s, perf_counter() - began_s

    with conditions.place("journal") as place:
        rounds = [in_and_out(place) for _ in range(conditions.rounds)]
    total = 4_096 * len(batches)
    yield Row("catalog.journal.in", "rows/s", Figure(total / sorted(s for s, _ in rounds)[len(rounds) // 2]))
    yield Row("catalog.journal.out", "rows/s", Figure(total / sorted(s for _, s in rounds)[len(rounds) // 2]))


def _prompt() -> BlocksStored:
    """A new prompt, stored now: as the time of use goes up, an index by it is written at its end."""
    keys = os.urandom(KEY_BYTES * PROMPT_BLOCKS)
    return BlocksStored(_TREE, BlockKey(os.urandom(KEY_BYTES)), keys, 0, 64, TierName.RAM, 0, 1 << 20, time())


def _flush(writer: CatalogWriter) -> None:
    if not writer.flush(DEADLINE_S):
        raise RuntimeError(f"the catalog is not written: {writer.stats().last_error}")
    if dropped := writer.stats().dropped_rows:
        raise RuntimeError(f"the catalog dropped rows: {dict(dropped)}")

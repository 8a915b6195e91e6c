"""A database of a test's own, with the catalog's schema, and tiers on it; records that follow from their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.authority import Authority
from kvpool.catalog.connections import Connections
from kvpool.catalog.migrations import Schema
from kvpool.catalog.payloads import ALL_MODELS, PayloadTier
from kvpool.tiers.tier import Found, Sealed
from tests.catalog.connecting import DEADLINE_S, bare, connections_to
from tests.tiers.conformance import Bytes, record_of
from tests.waiting import PROCESS_S, eventually

MIB = 1 << 20
RECORD_BYTES = 16 << 10
PAYLOAD_BYTES = RECORD_BYTES - 4096
ONE_MODEL, OTHER_MODEL = Fingerprint(b"1" * 32), Fingerprint(b"2" * 32)
TENANT, OTHER_TENANT = TenantDigest(b"t" * 16), TenantDigest(b"u" * 16)
TREE = TreeId(ONE_MODEL, TENANT, 3)
OTHER_TREE = TreeId(OTHER_MODEL, OTHER_TENANT, 3)


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def keys_of(numbers: Sequence[int]) -> list[BlockKey]:
    return [key_of(number) for number in numbers]


def sealed(number: int, *, codec: int = 0, payload_bytes: int = PAYLOAD_BYTES) -> Sealed:
    return Sealed(key_of(number), codec, record_of(number, payload_bytes))


def sealed_many(numbers: Sequence[int], **options: int) -> list[Sealed]:
    return [sealed(number, **options) for number in numbers]


def found(number: int, *, codec: int = 0, record_bytes: int = RECORD_BYTES) -> Found:
    return Found(key_of(number), codec, record_bytes)


class Database:
    """Makes tiers on one database, each with connections of its own, as another process would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all_connections: list[Connections] = []
        self._numbers = count(1_000_000)

    def next_number(self) -> int:
        """Of a record that was never there."""
        return next(self._numbers)

    def connections(self, **options: Any) -> Connections:
        connections = connections_to(self.folder, **options)
        self.all_connections.append(connections)
        return connections

    def tier(
        self,
        *,
        inline_bytes: int = 64 * MIB,
        inline_max_bytes: int = 4 * MIB,
        refresh_s: float = 60.0,
        evicted: Callable[[Sequence[Found]], None] | None = None,
        **options: Any,
    ) -> PayloadTier:
        return PayloadTier(
            self.connections(**options),
            Schema(),
            inline_bytes=inline_bytes,
            inline_max_bytes=inline_max_bytes,
            refresh_s=refresh_s,
            evicted=evicted,
        )

    def authority(self, *, budget_s: float = DEADLINE_S, **options: Any) -> Authority:
        return Authority(self.connections(budget_s=budget_s), Schema(), **options)

    def sql(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement as somebody else."""
        with bare(self.folder) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description is not None else []

    def held(self) -> set[int]:
        """The numbers of the records that are there."""
        return {int.from_bytes(key, "big") for (key,) in self.sql("select key from kvpool.payloads")}

    def wait_for_others(self) -> None:
        """Wait until the server does nothing for anybody else."""
        busy = "select from pg_stat_activity where state like 'active%' and pid <> pg_backend_pid()"
        eventually(lambda: self.sql(busy) == [], deadline_s=PROCESS_S)

    def check(self) -> None:
        """Fail unless the counters are what the records are, and the limits hold."""
        with bare(self.folder) as connection, connection.transaction():
            connection.execute("set transaction isolation level repeatable read")
            totals = connection.execute("select fingerprint, nbytes, limit_bytes from kvpool.payload_totals").fetchall()
            sums = connection.execute(
                "select fingerprint, sum(octet_length(record))::bigint from kvpool.payloads group by fingerprint"
            ).fetchall()
        counted = {fingerprint: nbytes for fingerprint, nbytes, _ in totals if nbytes}
        real: dict[object, Any] = dict(sums)
        if real:
            real[ALL_MODELS] = sum(real.values())
        assert counted == real
        assert [row for row in totals if row[2] is not None and row[1] > row[2]] == []

    def close(self) -> None:
        for connections in self.all_connections:
            connections.close()
            assert connections.open_connections == 0, "every borrowed connection came back"


@contextmanager
def database_of(folder: Path) -> Iterator[Database]:
    database = Database(folder)
    try:
        yield database
    finally:
        database.close()


def read(tier: PayloadTier, number: int, *, codec: int = 0, record_bytes: int = RECORD_BYTES) -> Bytes | None:
    """The record as it is there, or None."""
    buffer: npt.NDArray[np.uint8] = np.full(record_bytes, 0x55, np.uint8)
    moved = tier.get(TREE, [found(number, codec=codec, record_bytes=record_bytes)], [buffer])
    assert moved.fault == ""
    return buffer if moved.done == [True] else None


def holds(tier: PayloadTier, number: int, **options: int) -> bool:
    there = read(tier, number)
    return there is not None and np.array_equal(there, record_of(number, PAYLOAD_BYTES))

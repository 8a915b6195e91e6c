"""Stores a few records in one transaction: makes room, counts, and refuses what has none or is of an erased epoch.

Age: a record's time of use is never after that of a block before it in its prompt, so that the oldest, which go first,
are the last blocks of prompts. The times of blocks that are there already are moved only where they are older than
`refresh`; new ones are given times just before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import psycopg
from psycopg.rows import TupleRow

from kvpool.blocks.identity import BlockKey, TreeId
from kvpool.catalog import payload_statements as sql
from kvpool.catalog.arrays import KeyArray
from kvpool.catalog.bounded_connection import BoundedConnection
from kvpool.tiers.tier import Found, Sealed

_STEP = timedelta(microseconds=1)


class Stored(NamedTuple):
    """What became of a batch."""

    taken: int
    """So many of its records, from the first on, are there now."""
    evicted: list[Found]
    awaits_vacuum: bool = False
    """Whether none was taken because the server has yet to give the room of removed records free."""


class _Room(NamedTuple):
    """What the server says before anything is sent."""

    now: datetime
    limit_bytes: int | None
    epoch_over: bool
    awaits_vacuum: bool


class _Chain(NamedTuple):
    """The blocks of a prompt, up to the end of a batch, as far as they are there: by place in the prompt, from 0."""

    used_at: list[datetime | None]
    codecs: list[set[int]]
    now: datetime
    """The server's."""

    def is_stale(self, refresh: timedelta) -> bool:
        return any(used_at is not None and used_at < self.now - refresh for used_at in self.used_at)

    def times(self, *, refreshed: bool) -> list[datetime]:
        """When each block is to have been used: none after the block before it."""
        times: list[datetime] = []
        latest = self.now
        for used_at in self.used_at:
            if used_at is not None and not refreshed:
                latest = min(latest, used_at)
            latest -= _STEP
            times.append(latest)
        return times


def batches_of(records: Sequence[Sealed], most_bytes: int) -> Iterator[Sequence[Sealed]]:
    """Cut records into runs of no more bytes than this, or of one record."""
    start = nbytes = 0
    for at, record in enumerate(records):
        size = size_of(record)
        if at > start and nbytes + size > most_bytes:
            yield records[start:at]
            start, nbytes = at, 0
        nbytes += size
    if start < len(records):
        yield records[start:]


def size_of(record: Sealed) -> int:
    """The bytes of the record."""
    return memoryview(record.record).nbytes


def store(
    connection: BoundedConnection,
    tree: TreeId,
    batch: Sequence[Sealed],
    ancestors: Sequence[BlockKey],
    refresh: timedelta,
) -> Stored:
    """Store records of consecutive blocks, whose `ancestors` are all the blocks before them. Raises `psycopg.Error`."""
    whose = {"fingerprint": tree.fingerprint, "tenant": tree.tenant, "epoch": tree.epoch}
    room, chain = _look(connection, whose, [*ancestors, *(record.key for record in batch)])
    if room.awaits_vacuum:
        return Stored(0, [], awaits_vacuum=True)
    taken = 0 if room.epoch_over else _leading(batch, room.limit_bytes)
    while taken:
        try:
            return Stored(taken, _write(connection, whose, batch[:taken], ancestors, chain, refresh))
        except psycopg.DatabaseError as error:
            if error.sqlstate == sql.EPOCH_OVER:
                break
            if error.sqlstate != sql.NO_ROOM:
                raise
            lacking = int(error.diag.message_detail or 0)
        taken = min(taken - 1, _leading(batch, sum(map(size_of, batch[:taken])) - lacking))
    return Stored(0, [])


def _look(connection: BoundedConnection, whose: Mapping[str, object], keys: Sequence[BlockKey]) -> tuple[_Room, _Chain]:
    least = {"chunk_bytes": sql.CHUNK_BYTES, "least_dead_bytes": sql.LEAST_DEAD_BYTES}
    with connection.pipeline():
        answer = connection.cursor(binary=True).execute(sql.ROOM, {**whose, **least})
        there = connection.cursor(binary=True).execute(sql.CHAIN, {"keys": KeyArray(keys)})
    row = answer.fetchone()
    assert row is not None
    room = _Room(*row)
    chain = _Chain([None] * len(keys), [set() for _ in keys], room.now)
    for place, codec, used_at in there:
        at = place - 1
        chain.codecs[at].add(codec)
        known = chain.used_at[at]
        chain.used_at[at] = used_at if known is None else min(known, used_at)
    return room, chain


def _leading(batch: Sequence[Sealed], most_bytes: int | None) -> int:
    """How many of the first records are no more bytes than this together."""
    if most_bytes is None:
        return len(batch)
    fitting = nbytes = 0
    for record in batch:
        nbytes += size_of(record)
        fitting += nbytes <= most_bytes
    return fitting


def _write(
    connection: BoundedConnection,
    whose: Mapping[str, object],
    batch: Sequence[Sealed],
    ancestors: Sequence[BlockKey],
    chain: _Chain,
    refresh: timedelta,
) -> list[Found]:
    """The transaction; returns what was evicted for it."""
    stale = chain.is_stale(refresh)
    times = chain.times(refreshed=stale)
    first = len(ancestors)
    missing = [
        (record, times[first + at]) for at, record in enumerate(batch) if record.codec not in chain.codecs[first + at]
    ]
    missing.sort(key=lambda pair: (pair[0].key, pair[0].codec))  # two writers of the same keys wait in one order
    keys = KeyArray((*ancestors, *(record.key for record in batch)))
    with connection.pipeline(), connection.transaction():
        inserts = [_insert(connection, whose, record, used_at) for record, used_at in missing]
        added = sum(nbytes for insert in inserts for (nbytes,) in insert)
        if stale:
            codecs = sorted(set().union(*chain.codecs))
            connection.execute(sql.TOUCH, {"keys": keys, "codecs": codecs, "at": chain.now})
        if not added:
            return []
        settled = connection.cursor(binary=True).execute(sql.SETTLE, {"added": added, "keep": keys, **whose})
    return [Found(BlockKey(key), codec, nbytes) for key, codec, nbytes in settled]


def _insert(
    connection: BoundedConnection, whose: Mapping[str, object], sealed: Sealed, used_at: datetime
) -> psycopg.Cursor[TupleRow]:
    record = {
        "key": sealed.key,
        "codec": sealed.codec,
        "record": memoryview(sealed.record).cast("B"),
        "used_at": used_at,
    }
    return connection.cursor(binary=True).execute(sql.INSERT, {**record, **whose})

"""The database tier: records small enough to be worth reading from PostgreSQL, in a table of their own.

A record is a row; PostgreSQL keeps its bytes out of line, as they are. What is above the limits, of a model or of all,
goes oldest first, in the transaction that inserts; the counters are part of it, so they are right whoever dies when.
The limits count records. The room of removed ones is free again when the server has vacuumed; where more waits for that
than all records may be, nothing is stored.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from datetime import timedelta
from typing import Any

import numpy as np

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.record import Buffer
from kvpool.catalog import payload_statements as sql
from kvpool.catalog.arrays import KeyArray
from kvpool.catalog.bounded_connection import BoundedConnection
from kvpool.catalog.connections import Connections
from kvpool.catalog.migrations import Schema
from kvpool.catalog.payload_finding import RecordInquiry
from kvpool.catalog.payload_reading import read_records
from kvpool.catalog.payload_storing import batches_of, size_of, store
from kvpool.catalog.sessions import Sessions
from kvpool.catalog.statement import Statement
from kvpool.tiers.tier import Found, Inquiry, Moved, Sealed, TierName, TierUnavailableError, Usage

BATCH_BYTES = 8 << 20
"""What is written, or removed, in one transaction."""
REFRESH_S = 60.0
"""A time of use that is younger is not moved: reading would be writing."""
BACKGROUND_S = 10.0
"""What a step of work that nobody waits for may take without progress."""
ALL_MODELS = b""

_log = logging.getLogger(__name__)


class PayloadTier:
    """Holds records in PostgreSQL; implements `KeyedTier`. Safe from any thread; the connections are the caller's.

    A record above `inline_max_bytes` is refused. `inline_bytes` is the limit of all records together, for every process
    that uses this database. `evicted` is told what had to go for others, by the thread that stored these; it must not
    raise. Limits are written to the database by the first call of `put` or `trim` that reaches it.
    """

    name = TierName.DATABASE

    def __init__(
        self,
        connections: Connections,
        schema: Schema,
        *,
        inline_max_bytes: int,
        inline_bytes: int,
        refresh_s: float = REFRESH_S,
        evicted: Callable[[Sequence[Found]], None] | None = None,
    ) -> None:
        self._sessions = Sessions(connections, schema)
        self._inline_max_bytes = inline_max_bytes
        self._refresh = timedelta(seconds=refresh_s)
        self._evicted = evicted
        self.last_usage: dict[bytes, Usage] = {}
        """What `used_bytes_by_model` said last."""
        self._closed = False
        self._awaits_vacuum = False
        self._lock = threading.Lock()
        self._limits_to_write: dict[bytes, int | None] = {ALL_MODELS: inline_bytes}

    def set_capacity(self, inline_bytes: int) -> None:
        """Change the limit of all records together. `trim` brings about a lower one; until then little is stored."""
        self._note_limit(ALL_MODELS, inline_bytes)

    def set_limit(self, fingerprint: Fingerprint, limit_bytes: int | None) -> None:
        """Change what the records of one model may be together; None: no limit of its own. As `set_capacity`."""
        self._note_limit(fingerprint, limit_bytes)

    def find(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[Found | None]:
        """Which of these blocks are there; see `KeyedTier`."""
        if not keys:
            return []
        with closing(self.inquire(tree, keys, codecs)) as inquiry:
            return inquiry.answer()

    def inquire(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> Inquiry:
        """As `KeyedTier` says."""
        self._check_open()
        return RecordInquiry(self._sessions, keys, codecs)

    def get(self, tree: TreeId, wanted: Sequence[Found], into: Sequence[Buffer]) -> Moved:
        """Copy each record into its buffer; see `KeyedTier`. Raises `ValueError` for a buffer of another length."""
        views = [np.frombuffer(buffer, np.uint8) for buffer in into]
        for found, view in zip(wanted, views, strict=True):
            if view.nbytes != found.record_bytes or not view.flags.writeable:
                raise ValueError(f"a buffer for {found.record_bytes} bytes has {view.nbytes}, or cannot be written")
        done = [False] * len(wanted)
        try:
            if wanted:
                self._get(wanted, views, done)
        except TierUnavailableError as error:
            if not any(done):
                raise
            return Moved(done, error.reason)
        return Moved(done)

    def put(self, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey]) -> Moved:
        """Store records; see `KeyedTier`. Several transactions, where they are more than `BATCH_BYTES`.

        A record is refused that is too large, or of an erased epoch, and all from the first on that finds no room; all
        are while the server has yet to vacuum.
        """
        done = [False] * len(records)
        small = [at for at, record in enumerate(records) if size_of(record) <= self._inline_max_bytes]
        try:
            if small:
                self._put(tree, records, small, ancestors, done)
        except TierUnavailableError as error:
            if not any(done):
                raise
            return Moved(done, error.reason)
        return Moved(done)

    def touch(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        """Keep these blocks as if written now, to `refresh_s`; see `KeyedTier`."""
        if keys:
            with self._connected() as connection:
                self._refresh_chain(connection, keys, codecs)

    def drop(self, tree: TreeId, found: Sequence[Found]) -> None:
        """Remove records, if they are there."""
        if found:
            with self._connected() as connection:
                connection.execute(
                    sql.DROP, {"keys": KeyArray(it.key for it in found), "codecs": [it.codec for it in found]}
                )

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """Remove all of a tenant's records of earlier epochs; how many those were.

        After `Authority.raise_epoch` has returned, nothing of an earlier epoch is stored any more: what this removes
        is then all. Raises `TierUnavailableError`: not all are removed.
        """
        return self._remove(sql.ERASE, sql.WAIT_TO_ERASE, {"tenant": tenant, "before_epoch": before_epoch})

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """Remove all records of a model, and its limit; how many those were."""
        self.set_limit(fingerprint, None)
        return self._remove(sql.FORGET, sql.WAIT_TO_FORGET, {"fingerprint": fingerprint})

    def trim(self) -> int:
        """Evict what is above the limits, step by step; how many records went. For the background."""
        went = 0
        with self._connected(at_least_s=BACKGROUND_S) as connection:
            self._write_limits(connection)
            totals = connection.cursor(binary=True).execute(sql.USAGE).fetchall()
            for scope, nbytes, limit_bytes in totals:
                while limit_bytes is not None and nbytes > limit_bytes and (evicted := self._trim(connection, scope)):
                    went += evicted
        return went

    def usage(self) -> Usage:
        """Bytes of all records, and the limit; asks the server."""
        return self.used_bytes_by_model()[ALL_MODELS]

    def used_bytes_by_model(self) -> dict[bytes, Usage]:
        """The same for each model that has records or a limit, and for `ALL_MODELS`; asks the server."""
        with self._connected() as connection:
            rows = connection.cursor(binary=True).execute(sql.USAGE).fetchall()
        self.last_usage = {fingerprint: Usage(nbytes, limit_bytes or 0) for fingerprint, nbytes, limit_bytes in rows}
        return self.last_usage

    def close(self) -> None:
        """Refuse further calls; those in flight end after the batch that they are at."""
        self._closed = True

    def _connected(self, *, at_least_s: float = 0.0) -> AbstractContextManager[BoundedConnection]:
        self._check_open()
        return self._sessions.borrow(at_least_s=at_least_s)

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(TierName.DATABASE, "it was closed")

    def _get(self, wanted: Sequence[Found], views: Sequence[Any], done: list[bool]) -> None:
        with self._connected() as connection:
            if read_records(connection, wanted, views, done, self._refresh):
                codecs = sorted({found.codec for found in wanted})
                self._refresh_chain(connection, [found.key for found in wanted], codecs)

    def _refresh_chain(self, connection: BoundedConnection, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        """Move the times of use of a whole chain, where one is older than `refresh_s` and the server takes writes."""
        if connection.is_read_only:
            return
        parameters = {"keys": KeyArray(keys), "codecs": list(codecs)}
        row = connection.execute(sql.STALE, {**parameters, "refresh": self._refresh}).fetchone()
        assert row is not None
        now, stale = row
        if stale:
            connection.execute(sql.TOUCH, {**parameters, "at": now})

    def _put(
        self,
        tree: TreeId,
        records: Sequence[Sealed],
        places: Sequence[int],
        ancestors: Sequence[BlockKey],
        done: list[bool],
    ) -> None:
        """Store the records at these places, batch by batch, and note them as done."""
        taken = 0
        with self._connected() as connection:
            self._write_limits(connection)
            for batch in batches_of([records[at] for at in places], BATCH_BYTES):
                self._check_open()
                before = [*ancestors, *(records[at].key for at in places[:taken])]
                stored = store(connection, tree, batch, before, self._refresh)
                for at in places[taken : taken + stored.taken]:
                    done[at] = True
                taken += stored.taken
                self._tell_evicted(stored.evicted)
                self._note_vacuum(awaited=stored.awaits_vacuum)
                if stored.taken < len(batch):  # a limit may have been lowered, and nobody is trimming
                    self._trim(connection, tree.fingerprint)
                    self._trim(connection, ALL_MODELS)
                    return

    def _remove(self, remove: Statement, wait: Statement, which: dict[str, Any]) -> int:
        removed = 0
        with self._connected(at_least_s=BACKGROUND_S) as connection:
            self._write_limits(connection)
            while True:
                self._check_open()
                row = connection.execute(remove, {**which, "most_bytes": BATCH_BYTES}).fetchone()
                gone = int(row[0]) if row else 0
                removed += gone
                if not gone and connection.execute(wait, which).fetchone() is None:
                    return removed

    def _trim(self, connection: BoundedConnection, scope: bytes) -> int:
        """One step; how many records went, 0 where it is not above its limit any more."""
        self._check_open()
        rows = connection.cursor(binary=True).execute(sql.TRIM, {"scope": scope or None, "most_bytes": BATCH_BYTES})
        evicted = [Found(BlockKey(key), codec, nbytes) for key, codec, nbytes in rows]
        self._tell_evicted(evicted)
        return len(evicted)

    def _note_vacuum(self, *, awaited: bool) -> None:
        """Say it once, when it begins."""
        if awaited and not self._awaits_vacuum:
            _log.warning("database tier: nothing is stored until the server has vacuumed kvpool.payloads")
        self._awaits_vacuum = awaited

    def _tell_evicted(self, evicted: Sequence[Found]) -> None:
        if evicted and self._evicted is not None:
            self._evicted(evicted)

    def _note_limit(self, scope: bytes, limit_bytes: int | None) -> None:
        with self._lock:
            self._limits_to_write[scope] = limit_bytes

    def _write_limits(self, connection: BoundedConnection) -> None:
        if not self._limits_to_write:
            return
        with self._lock:
            limits = dict(self._limits_to_write)
        for scope, limit_bytes in limits.items():
            connection.execute(sql.LIMIT, {"scope": scope, "limit_bytes": limit_bytes})
        with self._lock:
            for scope, limit_bytes in limits.items():
                if self._limits_to_write.get(scope, ...) == limit_bytes:
                    del self._limits_to_write[scope]

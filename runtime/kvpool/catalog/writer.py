"""Writes what the engine reports into the catalog, on a thread of its own, in order and each report once.

A batch goes to the database; while that is away, to the journal, and later from there. A batch keeps its number on
whatever way, and the transaction that writes it records the number: so one whose answer was lost is not written again.
What is in memory when the process is killed is lost: a few tenths of a second of reports, or what one batch of them
holds. What reached the journal is not.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import psycopg
from psycopg.errors import DeadlockDetected, ForeignKeyViolation, SerializationFailure

from kvpool.catalog import storing
from kvpool.catalog.backlog import Backlog
from kvpool.catalog.connections import Connections
from kvpool.catalog.encoding import UnreadableBatchError, decode, encode
from kvpool.catalog.erasing import write_alone
from kvpool.catalog.journal import Journal
from kvpool.catalog.migrations import Schema
from kvpool.catalog.rows import Alone, Batch, Op, row_count
from kvpool.catalog.trimming import CatalogLimits, chores
from kvpool.resilience import CircuitBreaker
from kvpool.tiers.tier import TierUnavailableError

Connection: TypeAlias = psycopg.Connection[Any]

ATTEMPTS = 4
PASSES = 4
"""Of a removal, between two looks at what else is to be done."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterLimits:
    """How a writer works."""

    memory_bytes: int = 16 << 20
    """For reports that wait in memory."""
    linger_s: float = 0.2
    """How long a first report waits for others."""
    retry_s: float = 0.25
    """How often to look whether the database is back."""
    budget_s: float = 10.0
    """Time without progress of one statement, after which the database counts as away."""
    migration_budget_s: float = 120.0
    chores_s: float = 300.0


class WriterStats(NamedTuple):
    """A writer at one moment. Rows are what was reported: a block stored is one, a model none."""

    waiting_rows: int
    waiting_bytes: int
    journal_rows: int
    journal_bytes: int
    written_rows: int
    written_batches: int
    replayed_batches: int
    """Of those written, the ones that came from the journal."""
    repeated_batches: int
    """Batches that turned out to have been written before."""
    dropped_rows: Mapping[str, int]
    """By reason: queue-full, journal-full, refused (by the database), unreadable, closed, error."""
    last_error: str


class _Outcome(Enum):
    """What became of a batch that was to be written."""

    DONE = "done"
    REPEATED = "written before"
    BEGUN = "begun, and to be gone on with"
    AWAY = "the database is away"


class CatalogWriter:
    """Takes reports from any thread, and writes them on its own, from `start` on.

    `node` is the pool's directory, for ever; its journal holds what no other process may write. Without a journal,
    what comes while the database is away waits in memory, as far as there is room.
    """

    def __init__(
        self,
        connections: Connections,
        journal: Journal | None,
        *,
        node: UUID,
        schema: Schema,
        breaker: CircuitBreaker | None = None,
        limits: WriterLimits | None = None,
        keep: CatalogLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.node = node
        self._connections = connections
        self._journal = journal
        self._schema = schema
        self._breaker = breaker or CircuitBreaker()
        self._limits = limits or WriterLimits()
        self._clock = clock
        self.session = (rng or random.SystemRandom()).getrandbits(63)
        """Numbers of batches are this process's own."""
        self._backlog = Backlog(self._limits.memory_bytes)
        self._pending: Batch | None = None
        """Taken, and neither written nor in the journal."""
        self._sequence = 0
        self._refused_rows = 0
        """Of the batch that is being written."""
        self._forgot_sessions = False
        self._journal_is_sound = True
        self._chores = chores(keep or CatalogLimits())
        self._chore = 0
        self._next_chores_s = clock() + self._limits.chores_s * random.random()  # noqa: S311 - nodes take turns
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._pause_s = 0.0
        self._is_open = False
        """The journal was read, if there is one."""
        self._closing = threading.Event()
        self._closing_until_s: float | None = None
        self._written_rows = self._written_batches = self._replayed_batches = self._repeated_batches = 0
        self._dropped: Counter[str] = Counter()
        self._last_error = ""
        self._told_error = ""
        """What was logged last, until it was over."""
        self._journal_rows = self._journal_bytes = 0
        self._thread = threading.Thread(target=self._run, name="kvpool-catalog", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def offer(self, op: Op) -> None:
        """Report something. Returns at once, whatever is the matter with the database."""
        self._backlog.offer(op)

    def flush(self, deadline_s: float) -> bool:
        """Wait until all that was reported is in the database; False at the deadline."""
        until = time.monotonic() + deadline_s
        with self._backlog.hurried(), self._settled:
            while not self._is_settled:
                left_s = until - time.monotonic()
                if left_s <= 0 or not self._thread.is_alive():
                    return False
                self._settled.wait(left_s)
        return True

    @property
    def _is_settled(self) -> bool:
        """Whether nothing waits: not in memory, not in the journal once that is known."""
        return self._is_open and self._pending is None and not self._backlog.is_filled and not self._journal_bytes

    def close(self, deadline_s: float) -> bool:
        """Write what waits, into the database or else the journal, and end; False where that was not done in time.

        Then the thread is left to itself: it ends when the database has answered, or not within its budget.
        """
        self._closing_until_s = time.monotonic() + deadline_s
        self._closing.set()
        self._backlog.close()
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def stats(self) -> WriterStats:
        """How far it is."""
        with self._lock:
            dropped = Counter(self._dropped)
            dropped["queue-full"] += self._backlog.dropped_rows
            dropped["journal-full"] += 0 if self._journal is None else self._journal.dropped_rows
            return WriterStats(
                waiting_rows=self._backlog.rows + (0 if self._pending is None else _rows(self._pending)),
                waiting_bytes=self._backlog.nbytes,
                journal_rows=self._journal_rows,
                journal_bytes=self._journal_bytes,
                written_rows=self._written_rows,
                written_batches=self._written_batches,
                replayed_batches=self._replayed_batches,
                repeated_batches=self._repeated_batches,
                dropped_rows={reason: rows for reason, rows in dropped.items() if rows},
                last_error=self._last_error,
            )

    def _run(self) -> None:
        self._open_journal()
        while not self._closing.is_set():
            try:
                self._turn()
            except Exception:  # the loop's top: the reports that follow must not suffer
                _log.exception("writing to the catalog")
                self._give_up("error")
        self._leave()

    def _open_journal(self) -> None:
        if self._journal is not None:
            try:
                self._journal.open()
            except OSError as error:
                _log.warning("the journal cannot be used, so nothing is kept while the database is away: %s", error)
                self._journal = None
                self._journal_is_sound = False
        self._is_open = True
        self._note_journal()

    def _turn(self) -> None:
        """Wait for something to do; then write one batch, or as much of the journal, or do a chore."""
        if self._pending is not None:
            self._closing.wait(self._pause_s)
        else:
            self._backlog.wait(self._pause_s, linger_s=self._limits.linger_s)
        self._take()
        moved = self._pending is not None and self._place()
        replayed = self._has_journal and self._replay()
        busy = self._has_journal or self._pending is not None
        if not busy:
            moved = self._do_chore() or moved
        idle_s = self._limits.retry_s if busy else self._limits.chores_s / 10
        self._pause_s = 0.0 if moved or replayed else idle_s

    @property
    def _has_journal(self) -> bool:
        return self._journal is not None and not self._journal.is_empty

    def _take(self) -> None:
        with self._lock:
            if self._pending is None and (ops := self._backlog.take()):
                self._sequence += 1
                self._pending = Batch(self.session, self._sequence, ops)

    def _place(self) -> bool:
        """Get on with the batch that is pending: to the database, or behind what waits in the journal.

        What may take long goes by way of the journal, so that what comes meanwhile can wait there too.
        """
        batch = self._pending
        assert batch is not None
        placed = (self._has_journal or isinstance(batch.ops[0], Alone)) and self._keep(batch)
        if not placed and not self._has_journal:
            outcome = self._attempt(batch)
            if outcome is _Outcome.BEGUN:
                return True
            placed = outcome is _Outcome.DONE or self._keep(batch)
        if placed:
            with self._settled:
                self._pending = None
                self._settled.notify_all()
        return placed

    def _keep(self, batch: Batch) -> bool:
        """Put a batch into the journal; False where the disk does not take it now."""
        if self._journal is None:
            return False
        try:
            self._journal.append(encode(batch), _rows(batch))
        except OSError as error:
            self._note_error(f"journal: {error}")
            return False
        self._note_journal()
        return True

    def _replay(self) -> bool:
        """Get on with the oldest batch of the journal; False where the database does not take it now."""
        assert self._journal is not None
        entry = self._journal.first()
        if entry is not None:
            try:
                batch = decode(entry.payload)
            except UnreadableBatchError as error:
                self._count_dropped("unreadable", entry.rows)
                _log.warning("%d rows of the journal are dropped: %s", entry.rows, error)
            else:
                outcome = self._attempt(batch)
                if outcome is not _Outcome.DONE:
                    return outcome is _Outcome.BEGUN
                self._replayed_batches += 1
            self._journal.take()
        self._note_journal()
        return True

    def _note_journal(self) -> None:
        with self._settled:
            journal = self._journal
            self._journal_rows, self._journal_bytes = (0, 0) if journal is None else (journal.rows, journal.nbytes)
            self._settled.notify_all()

    def _attempt(self, batch: Batch) -> _Outcome:
        """Write a batch, or some of what it says. One that the database will never take is dropped, and counted."""
        if self._is_late or not self._breaker.allows():
            return _Outcome.AWAY
        began_s = self._clock()
        try:
            with self._connections.borrow(self._budget_s) as connection:
                self._schema.ready(connection)
                outcome = self._write(connection, batch)
        except TierUnavailableError as error:
            self._failed(error)
            return _Outcome.AWAY
        except Exception:  # as in the loop: the reports that follow must not suffer
            self._succeeded(began_s)
            _log.exception("writing to the catalog")
            self._count_dropped("error", _rows(batch))
            return _Outcome.DONE
        self._succeeded(began_s)
        if outcome is not _Outcome.DONE:
            self._repeated_batches += outcome is _Outcome.REPEATED
            return _Outcome.BEGUN if outcome is _Outcome.BEGUN else _Outcome.DONE
        with self._lock:
            self._written_batches += 1
            self._written_rows += _rows(batch) - self._refused_rows
            self._dropped["refused"] += self._refused_rows
        return _Outcome.DONE

    @property
    def _is_late(self) -> bool:
        """Whether the time is over that there was for closing."""
        return self._closing_until_s is not None and time.monotonic() > self._closing_until_s

    @property
    def _budget_s(self) -> float:
        budget_s = self._limits.budget_s if self._schema.is_current else self._limits.migration_budget_s
        if self._closing_until_s is not None:
            budget_s = min(budget_s, max(0.1, self._closing_until_s - time.monotonic()))
        return budget_s

    def _write(self, connection: Connection, batch: Batch) -> _Outcome:
        """Write a batch, once."""
        self._refused_rows = 0
        for attempt in range(ATTEMPTS):
            try:
                return self._write_whole(connection, batch)
            except (DeadlockDetected, SerializationFailure):
                if attempt + 1 == ATTEMPTS:
                    raise
            except ForeignKeyViolation:  # a block or model went between being found and being referred to
                continue
            except psycopg.Error as error:
                if _is_refusal(error):
                    break
                if isinstance(error, psycopg.ProgrammingError):
                    self._schema.doubt()
                raise
        return self._write_singly(connection, batch)

    def _write_whole(self, connection: Connection, batch: Batch) -> _Outcome:
        first = batch.ops[0]
        if isinstance(first, Alone):
            if storing.is_written(connection, self.node, batch):
                return _Outcome.REPEATED
            if not write_alone(connection, self.node, first, passes=PASSES):
                return _Outcome.BEGUN
            return _Outcome.DONE if storing.claim(connection, self.node, batch) else _Outcome.REPEATED
        forgets = not self._forgot_sessions and self._may_forget_sessions
        with connection.transaction():
            if not storing.claim(connection, self.node, batch):
                return _Outcome.REPEATED
            storing.write(connection, self.node, batch.session, batch.ops)
            if forgets:
                storing.forget_sessions(connection, self.node, but=self.session)
        self._forgot_sessions = self._forgot_sessions or forgets
        return _Outcome.DONE

    @property
    def _may_forget_sessions(self) -> bool:
        """Whether no batch of an earlier session can turn up any more."""
        return self._journal_is_sound and not self._has_journal and not (self._journal and self._journal.left_files)

    def _write_singly(self, connection: Connection, batch: Batch) -> _Outcome:
        """Write the reports that the database takes, and count the rows of the others."""
        with connection.transaction():
            if not storing.claim(connection, self.node, batch):
                return _Outcome.REPEATED
            for op in batch.ops:
                try:
                    with connection.transaction():
                        storing.write(connection, self.node, batch.session, [op])
                except psycopg.Error as error:
                    if not _is_refusal(error):
                        raise
                    self._refused_rows += row_count(op)
                    _log.warning("the catalog refuses a report of %s: %s", type(op).__name__, type(error).__name__)
        return _Outcome.DONE

    def _do_chore(self) -> bool:
        """One pass of keeping the catalog within its bounds, when it is time; whether there is more to do."""
        if self._clock() < self._next_chores_s or not self._breaker.allows():
            return False
        began_s = self._clock()
        try:
            with self._connections.borrow(self._budget_s) as connection:
                self._schema.ready(connection)
                more = self._chores[self._chore](connection)
        except TierUnavailableError as error:
            self._failed(error)
            return False
        self._succeeded(began_s)
        self._chore += not more
        if self._chore == len(self._chores):
            self._chore = 0
            self._next_chores_s = self._clock() + self._limits.chores_s
            return False
        return True

    def _succeeded(self, began_s: float) -> None:
        self._breaker.succeeded(self._clock() - began_s)
        if self._told_error:
            _log.info("the catalog is written again")
            self._told_error = ""

    def _failed(self, error: TierUnavailableError) -> None:
        self._breaker.trip(error.reason)
        self._note_error(error.reason)

    def _note_error(self, reason: str) -> None:
        """Log a reason once, not every time that it is tried again."""
        if reason != self._told_error:
            _log.warning("the catalog is not written: %s", reason)
            self._told_error = reason
        with self._lock:
            self._last_error = reason

    def _count_dropped(self, reason: str, rows: int) -> None:
        with self._lock:
            self._dropped[reason] += rows

    def _give_up(self, reason: str) -> None:
        with self._settled:
            batch, self._pending = self._pending, None
            if batch is not None:
                self._dropped[reason] += _rows(batch)
            self._settled.notify_all()

    def _leave(self) -> None:
        """Place what is left, without waiting for a database that is away."""
        while True:
            try:
                self._take()
                if self._pending is None:
                    break
                if not self._place():
                    self._give_up("closed")
            except Exception:  # as in the loop: the reports that follow must not suffer
                _log.exception("writing to the catalog")
                self._give_up("error")
        if self._journal is not None:
            self._journal.close()


def _is_refusal(error: psycopg.Error) -> bool:
    """Whether the fault is in what was to be written, or cannot even be sent: then trying again is no use."""
    if isinstance(error, psycopg.ProgrammingError):
        return error.sqlstate is None
    return isinstance(error, psycopg.DataError | psycopg.IntegrityError)


def _rows(batch: Batch) -> int:
    return sum(row_count(op) for op in batch.ops)

"""Brings the catalog's schema up to date: forward only, one transaction for each step, by one process at a time.

The steps are the files `schema/NNNN_name.sql`. What was applied is recorded with a checksum. A database that is ahead
of this program is left alone: it is not written, and nothing is read from it.
"""

import hashlib
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, TypeAlias

import psycopg

from kvpool.tiers.tier import TierName, TierUnavailableError

Connection: TypeAlias = psycopg.Connection[Any]

STATEMENT_TIMEOUT_S = 600
"""A step over a large table takes longer than anything else that we ask of the database."""
RECHECK_S = 10.0
_LOCK = int.from_bytes(b"kvpoolmg", "big")
"""The key of the advisory lock: that of all kvpool programs, and of nobody else, one hopes."""
_CREATE_RECORD = """
    create table if not exists kvpool.migrations (
        version int primary key,
        name text not null,
        checksum text not null,
        applied_at timestamptz not null default now()
    )"""


class CatalogTooNewError(TierUnavailableError):
    """The database was brought to a version that this program does not know. Nothing was read or written."""

    def __init__(self, found: int, known: int) -> None:
        super().__init__(
            TierName.DATABASE,
            f"the catalog's schema has version {found}, and this program knows versions up to {known}: "
            f"it needs a kvpool that knows version {found}",
        )
        self.found = found
        self.known = known


class CatalogDifferentError(TierUnavailableError):
    """A step was applied to the database in another form than this program has it."""

    def __init__(self, version: int, name: str) -> None:
        super().__init__(
            TierName.DATABASE,
            f"step {version} ({name}) of the catalog's schema was applied in another form than this program has it",
        )


class Migration(NamedTuple):
    """One step, as its file says it."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


@cache
def migrations() -> tuple[Migration, ...]:
    """All steps that this program knows, in order."""
    folder = resources.files("kvpool.catalog") / "schema"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return tuple(Migration(int(file.name[:4]), file.name[5:-4], file.read_text("utf-8")) for file in files)


def newest_version() -> int:
    """The version that this program brings a database to."""
    return migrations()[-1].version


def migrate(connection: Connection, steps: tuple[Migration, ...] | None = None) -> int:
    """Apply the steps that the database lacks; how many those were.

    Any number of processes may call this at once: they take turns. Writes nothing where nothing is lacking, so a
    read-only server will do then, and so will a user who may not create anything. Raises `CatalogTooNewError`,
    `CatalogDifferentError`, or psycopg's errors; what was applied by then stays.
    """
    steps = migrations() if steps is None else steps
    if not _lacking(connection, steps):
        return 0
    with connection.transaction():
        _take_turn(connection)
        if not _exists(connection, "select to_regnamespace('kvpool')"):
            connection.execute("create schema kvpool")
        if not _exists(connection, "select to_regclass('kvpool.migrations')"):
            connection.execute(_CREATE_RECORD)
    return sum(_applied_now(connection, step, steps) for step in _lacking(connection, steps))


def check_version(connection: Connection) -> None:
    """Raise `CatalogTooNewError` where the database is ahead of this program. One round trip."""
    row = connection.execute("select max(version) from kvpool.migrations").fetchone()
    _refuse_newer(row[0] or 0 if row else 0, newest_version())


class Schema:
    """Asked before every use of the catalog, on the connection that is to be used. Safe from any thread.

    The first time it brings the schema up to date; from then on it looks again every `RECHECK_S`, for a newer program
    may have come, and costs nothing in between.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._current = False
        self._good_until = float("-inf")

    @property
    def is_current(self) -> bool:
        """Whether the schema was brought up to date, as far as is known: then `ready` takes no longer than a query."""
        return self._current

    def ready(self, connection: Connection) -> None:
        """Return when the schema is the one that this program knows. Raises as `migrate` does."""
        if self._clock() < self._good_until:
            return
        if self._current:
            check_version(connection)
        else:
            migrate(connection)
        with self._lock:
            self._current = True
            self._good_until = self._clock() + RECHECK_S

    def doubt(self) -> None:
        """Look again the next time: a statement has failed that should not have."""
        with self._lock:
            self._current = False
            self._good_until = float("-inf")


def _lacking(connection: Connection, steps: tuple[Migration, ...]) -> list[Migration]:
    """The steps that are not recorded, once those that are agree with ours."""
    with connection.transaction():
        recorded: dict[int, str] = {}
        if _exists(connection, "select to_regclass('kvpool.migrations')"):
            recorded = dict(connection.execute("select version, checksum from kvpool.migrations").fetchall())
    _refuse_newer(max(recorded, default=0), steps[-1].version)
    for step in steps:
        if recorded.get(step.version, step.checksum) != step.checksum:
            raise CatalogDifferentError(step.version, step.name)
    return [step for step in steps if step.version not in recorded]


def _applied_now(connection: Connection, step: Migration, steps: tuple[Migration, ...]) -> bool:
    """Apply one step, unless another process has done so meanwhile."""
    with connection.transaction():
        _take_turn(connection)
        if step not in _lacking(connection, steps):
            return False
        connection.execute(step.sql.encode())  # bytes: the file's own text, of several statements, without parameters
        connection.execute(
            "insert into kvpool.migrations (version, name, checksum) values (%s, %s, %s)",
            (step.version, step.name, step.checksum),
        )
    return True


def _take_turn(connection: Connection) -> None:
    """Hold the lock until the transaction ends, however it ends."""
    connection.execute("select set_config('statement_timeout', %s, true)", (f"{STATEMENT_TIMEOUT_S}s",))
    connection.execute("select pg_advisory_xact_lock(%s)", (_LOCK,))


def _exists(connection: Connection, query: str) -> bool:
    row = connection.execute(query.encode()).fetchone()
    return row is not None and row[0] is not None


def _refuse_newer(found: int, known: int) -> None:
    if found > known:
        raise CatalogTooNewError(found, known)

"""The pool's connections to PostgreSQL: a bounded number, each made when it is first needed, with deadlines that hold.

A pool of our own, for psycopg_pool connects with threads of its own that wait as psycopg does. Here a connection is
made by the thread that needs it. One that failed is closed. One that the server closed is found out before it is lent;
when the server stalled, nobody can see that on a socket, so all idle ones are closed, and who waits is told at once.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg

from kvpool.catalog.bounded_connection import BoundedConnection, StalledError, connect, in_words
from kvpool.catalog.host_lookup import HostLookup
from kvpool.config.service import ServiceAddress
from kvpool.errors import ConfigError
from kvpool.tiers.tier import TierBusyError, TierName, TierUnavailableError

SCHEMES = ("postgresql", "postgres")
"""What the url of the service begins with."""


class Connections:
    """Lends connections to PostgreSQL. Safe from any thread; not to be used by a process forked afterwards.

    `address` is asked for each new connection, so that a rotated password is used from then on. `size` is the most
    connections that are open at a time. `tls`: the server must prove its name by a certificate. `prepare_threshold`:
    after so many uses a statement is prepared on the server, which a PgBouncer that pools transactions must be told of
    (`max_prepared_statements`); None: never.
    """

    def __init__(
        self,
        address: Callable[[], ServiceAddress],
        *,
        size: int,
        budget_s: float,
        tls: bool,
        prepare_threshold: int | None = 5,
    ) -> None:
        self.size = size
        self.budget_s = budget_s
        """What `borrow` waits without progress; may be changed at any time."""
        self._address = address
        self._tls = tls
        self._prepare_threshold = prepare_threshold
        self._lookup = HostLookup()
        self._changed = threading.Condition()
        self._idle: list[BoundedConnection] = []
        self._open = 0
        self._stalls = 0
        self._last_stall = ""
        self._closed = False

    @property
    def open_connections(self) -> int:
        """Connections that are open, or being opened, now."""
        return self._open

    @contextmanager
    def borrow(self, budget_s: float | None = None) -> Iterator[BoundedConnection]:
        """A connection in autocommit; `conn.transaction()` makes transactions. It goes back when the block ends.

        Waits for a free one, for the connection to be made, and for each statement, no longer than `budget_s` (None:
        the pool's) without progress. Raises `TierUnavailableError` for these, and for every `psycopg.Error` that
        leaves the block, with that as its cause. After any exception the connection is closed, not kept.
        """
        budget_s = self.budget_s if budget_s is None else budget_s
        try:
            connection = self._take(budget_s)
        except (psycopg.Error, ConfigError) as error:
            raise _unavailable(_reason(error)) from error
        try:
            yield connection
        except BaseException as error:
            self._forget(connection, stall=error if connection.stalled else None)
            if isinstance(error, psycopg.Error):
                raise _unavailable(_reason(error)) from error
            raise
        self._give_back(connection)

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back. Who waits is told so. May be called again."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._open -= len(idle)
            self._changed.notify_all()
        _close_all(idle)

    def _take(self, budget_s: float) -> BoundedConnection:
        while (connection := self._next_idle(budget_s)) is not None:
            if connection.is_usable:
                connection.budget_s = budget_s
                return connection
            self._forget(connection)
        try:
            connection = connect(self._address(), budget_s=budget_s, tls=self._tls, lookup=self._lookup)
        except BaseException as error:
            self._forget(None, stall=error if isinstance(error, StalledError) else None)
            raise
        connection.prepare_threshold = self._prepare_threshold
        return connection

    def _next_idle(self, budget_s: float) -> BoundedConnection | None:
        """The connection used last, or None: the caller may open one, and is counted as having done so."""
        until = time.monotonic() + budget_s
        with self._changed:
            stalls = self._stalls
            while True:
                if self._closed:
                    raise _unavailable("it was closed")
                if self._idle:
                    return self._idle.pop()
                if self._open < self.size:
                    self._open += 1
                    return None
                if not self._changed.wait(until - time.monotonic()):
                    raise TierBusyError(
                        TierName.DATABASE, f"all {self.size} connections are in use, since {in_words(budget_s)}"
                    )
                if self._stalls != stalls:  # who waits for the same server need not find out again
                    raise _unavailable(self._last_stall)

    def _give_back(self, connection: BoundedConnection) -> None:
        if connection.is_at_rest:
            with self._changed:
                if not self._closed:
                    self._idle.append(connection)
                    self._changed.notify()
                    return
        self._forget(connection)

    def _forget(self, connection: BoundedConnection | None, *, stall: BaseException | None = None) -> None:
        """Close a connection (None: one that could not be made); after a stall, the idle ones too."""
        closing = [] if connection is None else [connection]
        with self._changed:
            self._open -= 1
            if stall is not None:
                self._stalls += 1
                self._last_stall = _reason(stall)
                self._open -= len(self._idle)
                closing += self._idle
                self._idle = []
            self._changed.notify_all()
        _close_all(closing)


def _close_all(connections: list[BoundedConnection]) -> None:
    for connection in connections:
        connection.close()  # never waits: what cannot be sent at once is not


def _unavailable(reason: str) -> TierUnavailableError:
    return TierUnavailableError(TierName.DATABASE, reason)


def _reason(error: BaseException) -> str:
    """One line, without what the server adds of a row's contents; libpq never tells the password."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((primary or str(error)).split()) or type(error).__name__

"""A bounded number of connections to one server, lent to one call at a time."""

import threading
import time
from collections.abc import Callable

from kvpool.tiers.dragonfly.faults import RefusedError, StalledError
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.wire import Wire

IDLE_S = 300.0
"""A connection that nobody used for longer is not trusted any more: something on the way may have forgotten it."""


class Connections:
    """At most `limit` connections, made by `connect` when they are needed. Safe from any thread.

    Every wire that was lent is given back or discarded.
    """

    def __init__(self, connect: Callable[[Patience], Wire], limit: int) -> None:
        self._connect = connect
        self._limit = limit
        self._idle: list[tuple[Wire, float]] = []
        self._lent: set[Wire] = set()
        self._taken = 0
        """Of the limit: those that are lent, or being made."""
        self._closed = False
        self._changed = threading.Condition()

    def borrow(self, patience: Patience) -> Wire:
        """A connection that is used again, or a new one. Waits for one that is free. Raises `FaultError`."""
        self._take(patience)
        try:
            while (wire := self._last_idle()) is not None:
                if wire.is_quiet():
                    return self._lend(wire, patience)
                wire.close()
            return self._lend(self._connect(patience), patience)
        except BaseException:
            self._untake()
            raise

    def replace(self, wire: Wire, patience: Patience) -> Wire:
        """A new connection for one that is lent, which is closed. Raises `FaultError`; then none is lent."""
        with self._changed:
            self._lent.discard(wire)
        wire.close()
        try:
            return self._lend(self._connect(patience), patience)
        except BaseException:
            self._untake()
            raise

    def give_back(self, wire: Wire) -> None:
        """It is whole, and may be used again."""
        wire.used = True
        with self._changed:
            if not self._closed:
                self._lent.discard(wire)
                self._idle.append((wire, time.monotonic()))
                self._taken -= 1
                self._changed.notify()
                return
        self.discard(wire)

    def discard(self, wire: Wire) -> None:
        """It is not to be used again."""
        with self._changed:
            self._lent.discard(wire)
        wire.close()
        self._untake()

    def close(self) -> None:
        """Close those that are idle, cut off those that are lent, and lend none any more. May be called again."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            for wire in self._lent:
                wire.cut()
            self._changed.notify_all()
        for wire, _ in idle:
            wire.close()

    def _take(self, patience: Patience) -> None:
        with self._changed:
            while not self._closed and self._taken >= self._limit:
                if not self._changed.wait(patience.left_s) and not patience.left_s:
                    raise StalledError(f"all {self._limit} connections were in use for {patience.budget_s:g} s")
            if self._closed:
                raise RefusedError("it was closed")
            self._taken += 1

    def _untake(self) -> None:
        with self._changed:
            self._taken -= 1
            self._changed.notify()

    def _lend(self, wire: Wire, patience: Patience) -> Wire:
        wire.patience = patience
        with self._changed:
            if not self._closed:
                self._lent.add(wire)
                return wire
        wire.close()
        raise RefusedError("it was closed")

    def _last_idle(self) -> Wire | None:
        """The one that was used last; those that nobody used for long are closed."""
        with self._changed:
            oldest_s = time.monotonic() - IDLE_S
            stale = [wire for wire, since_s in self._idle if since_s < oldest_s]
            self._idle = [(wire, since_s) for wire, since_s in self._idle if since_s >= oldest_s]
            found = self._idle.pop()[0] if self._idle else None
        for wire in stale:
            wire.close()
        return found

"""A bounded number of connections to one server, lent to one call at a time."""

import threading
import time
from collections.abc import Callable

from kvpool.tiers.dragonfly.faults import BusyError, RefusedError
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
        self._idle: list[Wire] = []
        self._lent: set[Wire] = set()
        self._taken = 0
        """Of the limit: those that are lent, or being made."""
        self._closed = False
        self._changed = threading.Condition()

    def borrow(self, patience: Patience) -> Wire:
        """A connection that is used again, or a new one. Waits for one that is free. Raises `FaultError`."""
        while (wire := self._take(patience)) is not None:
            if wire.is_quiet() and time.monotonic() - wire.used_at_s < IDLE_S:
                wire.patience = patience
                return wire
            self.discard(wire)
        return self._make(patience)

    def replace(self, wire: Wire, patience: Patience) -> Wire:
        """A new connection for one that is lent, which is closed. Raises `FaultError`; then none is lent."""
        with self._changed:
            self._lent.discard(wire)
        wire.close()
        return self._make(patience)

    def give_back(self, wire: Wire) -> None:
        """It is whole, and may be used again."""
        wire.used_at_s = time.monotonic()
        with self._changed:
            if not self._closed:
                self._lent.discard(wire)
                self._idle.append(wire)
                self._taken -= 1
                self._changed.notify()
                return
        self.discard(wire)

    def discard(self, wire: Wire) -> None:
        """It is not to be used again."""
        with self._changed:
            self._lent.discard(wire)
        wire.close()
        self._end()

    def retire(self) -> None:
        """Close those that are idle, and lend none any more; those that are lent are closed when they come back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for wire in idle:
            wire.close()

    def close(self) -> None:
        """The same, and cut off those that are lent. May be called again."""
        self.retire()
        with self._changed:
            for wire in self._lent:
                wire.cut()

    def _take(self, patience: Patience) -> Wire | None:
        """The idle connection that was used last; None: a new one may be made."""
        with self._changed:
            while self._taken >= self._limit and not self._closed:
                if not self._changed.wait(patience.left_s) and not patience.left_s:
                    raise BusyError(f"all {self._limit} connections were in use for {patience.budget_s:g} s")
            if self._closed:
                raise RefusedError("it was closed")
            self._taken += 1
            if not self._idle:
                return None
            wire = self._idle.pop()
            self._lent.add(wire)
            return wire

    def _make(self, patience: Patience) -> Wire:
        """A new connection, for which there is room."""
        try:
            wire = self._connect(patience)
        except BaseException:
            self._end()
            raise
        wire.patience = patience
        with self._changed:
            self._lent.add(wire)
            closed = self._closed
        if closed:
            self.discard(wire)
            raise RefusedError("it was closed")
        return wire

    def _end(self) -> None:
        with self._changed:
            self._taken -= 1
            self._changed.notify()

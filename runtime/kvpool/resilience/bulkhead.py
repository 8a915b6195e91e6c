"""Bounds what may be in flight to one tier, so that a slow one does not fill the process with what waits for it."""

import threading


class Bulkhead:
    """Counts bytes in flight. Never waits: who finds no room goes without. Safe from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.refused_total = 0
        """How often somebody found no room."""
        self._in_flight = 0
        self._lock = threading.Lock()

    @property
    def in_flight_bytes(self) -> int:
        """What has entered and not left."""
        return self._in_flight

    def enter(self, nbytes: int) -> bool:
        """Take room for so many bytes; False where there is none. What is larger than all of it enters alone."""
        with self._lock:
            if self._in_flight and self._in_flight + nbytes > self.limit_bytes:
                self.refused_total += 1
                return False
            self._in_flight += nbytes
            return True

    def leave(self, nbytes: int) -> None:
        """Give room back, as much as was taken."""
        with self._lock:
            assert nbytes <= self._in_flight
            self._in_flight -= nbytes

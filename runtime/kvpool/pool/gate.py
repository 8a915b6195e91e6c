"""Lets operations into a pool while it is open, and lets `close` wait until the last of them has left."""

import threading
import time
from types import TracebackType

from kvpool.errors import PoolClosedError


class Gate:
    """A context manager that any number of threads may be in at once, and that can be shut."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._shut = False

    @property
    def is_shut(self) -> bool:
        """Whether nobody is let in any more."""
        return self._shut

    def check(self) -> None:
        """Raise `PoolClosedError` if it is shut."""
        if self._shut:
            raise PoolClosedError("the pool was closed: open it again")

    def __enter__(self) -> None:
        with self._changed:
            self.check()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            if self._shut and not self._inside:
                self._changed.notify_all()

    def shut(self) -> bool:
        """Let nobody in from now on; False if it was shut before."""
        with self._changed:
            was_open, self._shut = not self._shut, True
        return was_open

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until everybody inside has left; False at the deadline."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while self._inside:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

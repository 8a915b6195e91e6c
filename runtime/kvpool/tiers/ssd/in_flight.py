"""Operations in flight: what they use is given back by the last of them, however late it ends."""

import threading
from collections.abc import Callable

from kvpool.tiers.tier import TierName, TierUnavailableError


class InFlight:
    """A context for each operation. After `close` none begins, and `give_back` is called once the last has ended."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self.closed = False
        self._give_back = give_back
        self._lock = threading.Lock()
        self._count = 0

    def __enter__(self) -> None:
        with self._lock:
            if self.closed:
                raise TierUnavailableError(TierName.SSD, "it was closed")
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            last = self.closed and self._count == 0
        if last:
            self._give_back()

    def close(self) -> None:
        """No operation begins from now on. Calling it again does nothing."""
        with self._lock:
            last = not self.closed and self._count == 0
            self.closed = True
        if last:
            self._give_back()

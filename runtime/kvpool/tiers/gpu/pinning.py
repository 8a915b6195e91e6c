"""Page-locks host memory, so that a device copies from it and to it without a staging buffer."""

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class PageLocks:
    """Implements `PageLock` within `max_bytes`. Where the system refuses, memory stays pageable, and that is all.

    After a refusal nothing more is asked for: each attempt takes as long as touching the pages does. `register` and
    `unregister` are a `Device`'s.
    """

    def __init__(
        self, register: Callable[[int, int], None], unregister: Callable[[int], None], *, max_bytes: int
    ) -> None:
        self._register = register
        self._unregister = unregister
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._locked: dict[int, int] = {}
        self._refused = ""

    @property
    def locked_bytes(self) -> int:
        """Bytes that are locked now."""
        with self._lock:
            return sum(self._locked.values())

    @property
    def refused(self) -> str:
        """Why nothing more is locked; empty while there was no refusal."""
        return self._refused

    def lock(self, address: int, nbytes: int) -> bool:
        """Lock whole pages. May take as long as touching them; other threads run meanwhile."""
        with self._lock:
            if self._refused or sum(self._locked.values()) + nbytes > self._max_bytes:
                return False
            self._locked[address] = nbytes  # counted before it is done, so that two at once keep to the bound
        try:
            self._register(address, nbytes)
        except RuntimeError as error:
            self._give_up(address, str(error))
            return False
        return True

    def unlock(self, address: int) -> None:
        """Undo it."""
        with self._lock:
            del self._locked[address]
        try:
            self._unregister(address)
        except RuntimeError as error:  # the device is ill, and its tier knows; the pages go with the mapping
            _log.warning("gpu tier: unlocking pages: %s", error)

    def _give_up(self, address: int, reason: str) -> None:
        with self._lock:
            del self._locked[address]
            first, self._refused = not self._refused, reason
        if first:
            _log.warning("gpu tier: host memory stays pageable, copies go through staging buffers: %s", reason)

"""Memory of the CPU for the caches of sessions, used again from one session to the next.

Fresh memory is zeroed by the kernel page by page when it is touched: 5 ms for the 90 MB of a prompt of 2,000 tokens, a
tenth of the time to its first token. So the last piece is kept, and lent again once no tensor sees it any more.
"""

import sys
import threading
from typing import Any

import numpy as np
import torch

_GROSSLY_LARGER = 4


class HostMemory:
    """Keeps at most one piece of memory, as large as a session's cache. Safe from any thread."""

    def __init__(self) -> None:
        self._kept: Any = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """Uninitialised bytes, which nothing else sees while the tensor, or a view of it, lives."""
        with self._lock:
            if not self._is_free() or not nbytes <= len(self._kept) <= max(1, nbytes) * _GROSSLY_LARGER:
                self._kept = np.empty(nbytes, np.uint8)  # numpy asks for huge pages, torch does not
            return torch.from_numpy(self._kept[:nbytes])

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostMemory":
        """The copy of a cache takes what it needs from the same place."""
        return self

    def _is_free(self) -> bool:
        """A tensor's storage holds the array that it was made from, whoever else has views of it."""
        return sys.getrefcount(self._kept) == _UNSHARED


def _unshared_count() -> int:
    """What `getrefcount` says of an attribute that nothing else refers to."""
    probe = HostMemory()
    return sys.getrefcount(probe._kept)


_UNSHARED = _unshared_count()

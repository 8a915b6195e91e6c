"""Eviction policies: pure objects that order what may go. They know nothing of bytes, tiers or locks."""

import heapq

from kvpool.prefix.candidates import Candidate


class LruPolicy:
    """Least recently used first. A heap whose stale entries are pushed back when they surface.

    A use costs nothing here, for it only raises the candidate's `last_use`; taking costs O(log n) per entry that surfaces,
    and each surfaces at most once for all the uses since it was pushed.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Candidate]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    def offer(self, candidate: Candidate) -> None:
        """Add a candidate at its present age."""
        self._serial += 1
        heapq.heappush(self._heap, (candidate.last_use, self._serial, candidate))

    def take(self) -> Candidate | None:
        """Return the candidate that was used longest ago."""
        heap = self._heap
        while heap:
            used, serial, candidate = heap[0]
            if candidate.last_use <= used:
                heapq.heappop(heap)
                return candidate
            heapq.heapreplace(heap, (candidate.last_use, serial, candidate))
        return None

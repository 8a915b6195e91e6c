"""Evicts the block that was used longest ago."""

import heapq

from kvpool.prefix.candidates import Candidate

_Entry = tuple[int, int, Candidate]


class LruPolicy:
    """Least recently used first; of equals, the one offered first.

    A heap, in which entries of withdrawn candidates stay until they surface. When more than half are such, the heap is
    replaced bit by bit: each later call moves a few entries over, so that none takes long.
    """

    _MOVES = 4
    """Entries moved per call while the heap is replaced; more than the two that the calls meanwhile can add."""

    def __init__(self) -> None:
        self._offers: dict[Candidate, _Entry] = {}
        self._heap: list[_Entry] = []
        self._retired: list[_Entry] = []
        """The heap that is being replaced: taken from its end, so that it stays a heap."""
        self._serial = 0

    def __len__(self) -> int:
        return len(self._offers)

    def offer(self, candidate: Candidate, last_use: int, trait: int = 0) -> None:
        """Add a candidate at this age; one that is on offer already gets it in place of its old one."""
        self._serial += 1
        entry = (last_use, self._serial, candidate)
        self._offers[candidate] = entry
        heapq.heappush(self._heap, entry)
        self._tidy()

    def withdraw(self, candidate: Candidate) -> None:
        """Forget a candidate; nothing happens when it is not on offer."""
        if self._offers.pop(candidate, None) is not None:
            self._tidy()

    def take(self) -> tuple[Candidate, int] | None:
        """Return the candidate that was used longest ago, and the age at which it was offered."""
        while heap := self._first_heap():
            entry = heapq.heappop(heap)
            if self._offers.get(entry[2]) is entry:
                del self._offers[entry[2]]
                return entry[2], entry[0]
        return None

    def date(self, last_use: int, trait: int) -> int:
        """The time of the last use."""
        return last_use

    def next_date(self) -> int | None:
        """The time at which the candidate that `take` would return was used last."""
        while heap := self._first_heap():
            if self._offers.get(heap[0][2]) is heap[0]:
                return heap[0][0]
            heapq.heappop(heap)
        return None

    def offered_at(self, candidate: Candidate) -> int | None:
        """The age at which the candidate is on offer; None when it is not."""
        entry = self._offers.get(candidate)
        return None if entry is None else entry[0]

    def _first_heap(self) -> list[_Entry]:
        """The heap with the oldest entry; empty when both are."""
        if self._retired and (not self._heap or self._retired[0] < self._heap[0]):
            return self._retired
        return self._heap

    def _tidy(self) -> None:
        if self._retired:
            for _ in range(min(self._MOVES, len(self._retired))):
                entry = self._retired.pop()
                if self._offers.get(entry[2]) is entry:
                    heapq.heappush(self._heap, entry)
        elif len(self._heap) > 2 * len(self._offers) + 64:
            self._retired, self._heap = self._heap, []

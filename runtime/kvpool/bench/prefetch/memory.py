"""A RAM that is too small, with an SSD below it that holds all: an exact LRU, and a part for what was prefetched."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple


class Hits(NamedTuple):
    """Blocks of one request that were in RAM, from its first on."""

    all: int
    prefetched: int
    """Of those, the ones that were there because they had been prefetched."""


class SmallMemory:
    """Holds `capacity_blocks`, of them at most `prefetch_blocks` that nobody has asked for since they came.

    Within that part the one that came first goes first; what is asked for leaves it. The rest is an LRU, in which
    parents are used after their children, and so go after them.
    """

    def __init__(self, capacity_blocks: int, prefetch_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._most_prefetched = prefetch_blocks
        self._used: OrderedDict[int, None] = OrderedDict()
        self._prefetched: OrderedDict[int, None] = OrderedDict()
        self.prefetched_blocks = 0
        self.used_blocks = 0
        """Of those prefetched, the ones that were asked for while they were there."""

    def __contains__(self, block: object) -> bool:
        return block in self._used or block in self._prefetched

    def __len__(self) -> int:
        return len(self._used) + len(self._prefetched)

    def request(self, blocks: Sequence[int], prompt_blocks: int) -> Hits:
        """Look for a prompt, then store it with its answer."""
        found = list(takewhile(self.__contains__, blocks[:prompt_blocks]))
        hits = Hits(len(found), sum(block in self._prefetched for block in found))
        for block in reversed(blocks):
            if block in self._prefetched:
                del self._prefetched[block]
            self._used[block] = None
            self._used.move_to_end(block)
        self.used_blocks += hits.prefetched
        self._shrink()
        return hits

    def prefetch(self, blocks: Iterable[int]) -> None:
        """Bring these in from the SSD, those that are not there."""
        for block in blocks:
            if block not in self:
                self._prefetched[block] = None
                self.prefetched_blocks += 1
        while len(self._prefetched) > self._most_prefetched:
            self._prefetched.popitem(last=False)
        self._shrink()

    def _shrink(self) -> None:
        while len(self) > self._capacity:
            self._used.popitem(last=False)

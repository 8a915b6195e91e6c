"""What a replay is compared with: an exact LRU, and the most hits that any policy could have.

Both are written with plain dictionaries and share nothing with the prefix index. Their rule is the pool's: only a block
without held children may go, and none of the prompt that is being stored.
"""

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice, repeat

from kvpool.replay.outcome import Outcome
from kvpool.replay.trace import Blocks, Trace

_NO_BLOCK = -1
_WORTHLESS = -1 << 60


class _LeafCache:
    """Blocks that are held, each with a rank. The leaf of the lowest rank goes first."""

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._ranks: dict[int, int] = {}
        self._children: dict[int, int] = {}
        self._parents: dict[int, int] = {}
        self._leaves: list[tuple[int, int]] = []
        """A heap of (rank, block); entries of another rank than the block's are void."""

    def request(self, blocks: Blocks, ranks: Iterable[int]) -> int:
        """Store one request's blocks; return how many were there.

        `ranks` say what each is worth from now on, and none is one that its block had before. A block that is worth
        nothing, or no more than any that might go for it, is not stored.
        """
        hits = self._held(blocks)
        ranked = zip(blocks, ranks, strict=False)
        self._ranks.update(islice(ranked, hits))
        last = blocks[hits - 1] if hits else _NO_BLOCK
        for block, rank in ranked:
            if rank <= _WORTHLESS or not self._make_room(rank):
                break
            self._add(block, last, rank)
            last = block
        self._offer(last)
        return hits

    def _held(self, blocks: Blocks) -> int:
        return next((at for at, block in enumerate(blocks) if block not in self._ranks), len(blocks))

    def _add(self, block: int, parent: int, rank: int) -> None:
        self._ranks[block], self._parents[block], self._children[block] = rank, parent, 0
        if parent != _NO_BLOCK:
            self._children[parent] += 1

    def _offer(self, block: int) -> None:
        """A block of the prompt being stored is offered when that has ended, and so cannot go for its own children."""
        if block != _NO_BLOCK and not self._children[block]:
            heapq.heappush(self._leaves, (self._ranks[block], block))

    def _make_room(self, worth: int) -> bool:
        if len(self._ranks) < self._capacity_blocks:
            return True
        while self._leaves:
            rank, block = self._leaves[0]
            if self._ranks.get(block) != rank or self._children[block]:
                heapq.heappop(self._leaves)
            elif rank >= worth:
                return False
            else:
                heapq.heappop(self._leaves)
                self._remove(block)
                return True
        return False

    def _remove(self, block: int) -> None:
        del self._ranks[block], self._children[block]
        parent = self._parents.pop(block)
        if parent != _NO_BLOCK:
            self._children[parent] -= 1
            self._offer(parent)


def exact_lru_hits(trace: Trace, capacity_blocks: int) -> list[int]:
    """Hits of each request under an exact LRU."""
    cache = _LeafCache(capacity_blocks)
    return [cache.request(blocks, repeat(now)) for now, blocks in enumerate(trace)]


def offline_bound_hits(trace: Trace, capacity_blocks: int) -> list[int]:
    """Hits of each request where whatever is used farthest in the future goes first, or is not stored at all.

    This is Belady's rule, which no policy can beat: a block is never used again before the one above it is, so the
    farthest is a leaf anyhow.
    """
    uses: dict[int, list[int]] = defaultdict(list)
    for at in range(len(trace) - 1, -1, -1):
        for block in trace[at]:
            uses[block].append(at)
    cache = _LeafCache(capacity_blocks)
    hits = []
    for blocks in trace:
        for block in blocks:
            uses[block].pop()
        hits.append(cache.request(blocks, [-uses[block][-1] if uses[block] else _WORTHLESS for block in blocks]))
    return hits


def timed(hits_of: Callable[[Trace, int], list[int]], trace: Trace, capacity_blocks: int) -> Outcome:
    """One of the references above as an outcome."""
    began_s = time.perf_counter()
    hits = sum(hits_of(trace, capacity_blocks))
    return Outcome(len(trace), sum(map(len, trace)), hits, time.perf_counter() - began_s)

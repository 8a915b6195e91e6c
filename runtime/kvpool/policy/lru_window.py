"""How many hits an LRU of the same size would have had: counted, not simulated.

An LRU of `held` blocks holds those used last, whatever else is so. So it is enough to know at which times how many
blocks were used last, and up from which time they are `held` together. That takes memory for each of those times, at
most `MOST_TIMES` of them, and nothing for each block.
"""

from collections import OrderedDict

MOST_TIMES = 1 << 16
"""Beyond, the oldest two become one."""


class LruWindow:
    """What an LRU would hold in place of what is held, by the clock of uses."""

    def __init__(self) -> None:
        self.held = 0
        """Blocks that are held in fact, and that an LRU would hold."""
        self._since = 0
        """Blocks used after this time are in it, and some of those used at it."""
        self._blocks = 0
        self._used_at: OrderedDict[int, int] = OrderedDict()
        """How many blocks were used last at each time since, about oldest first. A time can lack a few blocks that
        another has too many: leases that overlap date blocks again unseen. Ordered, for a plain dictionary is slow to
        find its first key where many went before it."""

    def age(self, now: int) -> int:
        """How long ago the oldest blocks that an LRU would hold were used, at most."""
        return now - self._since

    def use(self, blocks: int, last_use: int, now: int) -> int:
        """Blocks that were used at `last_use` are used `now`: return how many of them an LRU would hold.

        `last_use` is 0 for those that were never used. Of the oldest that it holds it may have lost some.
        """
        used_at, held = self._used_at, 0
        if last_use >= self._since:
            left = used_at.get(last_use, 0)
            held = blocks if last_use > self._since else max(min(blocks, left), 0)
            left -= held
            if left:
                used_at[last_use] = left
            else:
                used_at.pop(last_use, None)
        self._blocks += blocks - held
        used_at[now] = used_at.get(now, 0) + blocks
        return held

    def forget(self, blocks: int, last_use: int) -> None:
        """Blocks were erased: an LRU would have lost them too."""
        in_it = last_use > self._since or (last_use == self._since and self._used_at.get(last_use, 0) >= blocks)
        if last_use and in_it:
            self._used_at[last_use] = self._used_at.get(last_use, 0) - blocks
            self._blocks -= blocks

    def leave(self, blocks: int) -> None:
        """So many blocks less are held; an LRU loses those used longest ago when others are entered."""
        self.held = max(self.held - blocks, 0)

    def enter(self, blocks: int, unknown: int, now: int) -> None:
        """So many blocks more are held; those `unknown` are new to an LRU too, and the others were told by `use`."""
        self.held += blocks
        self._blocks += unknown
        self._used_at[now] = self._used_at.get(now, 0) + unknown
        if self._blocks > self.held:
            self._settle()
        while len(self._used_at) > MOST_TIMES:
            _, blocks = self._used_at.popitem(last=False)
            self._used_at[next(iter(self._used_at))] += blocks

    def _settle(self) -> None:
        """Let the LRU have no more than is held."""
        used_at, surplus = self._used_at, self._blocks - self.held
        while surplus > 0 and used_at:
            oldest = next(iter(used_at))
            blocks = used_at[oldest]
            if blocks > surplus:
                used_at[oldest] = blocks - surplus
                self._since = max(self._since, oldest)
                break
            surplus -= used_at.pop(oldest)
            self._since = max(self._since, oldest + 1)
        self._blocks = self.held

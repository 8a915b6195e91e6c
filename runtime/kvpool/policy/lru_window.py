"""How many hits an LRU of the same size would have had: counted, not simulated.

An LRU of `held` blocks holds those used last, whatever else is so. So it is enough to know at which times how many
blocks were used last, and up from which time they are `held` together. Some keys' worth of memory for each of those
times, and nothing for each block.
"""


class LruWindow:
    """What an LRU would hold in place of what is held, by the clock of uses."""

    def __init__(self) -> None:
        self.held = 0
        """Blocks that are held in fact, and that an LRU would hold."""
        self._since = 0
        """Blocks used at this time or later are in it."""
        self._blocks = 0
        self._used_at: dict[int, int] = {}
        """How many blocks were used last at each time since, about oldest first. A time can lack a few blocks that
        another has too many: leases that overlap date blocks again unseen."""

    def would_hold(self, last_use: int) -> bool:
        """Whether an LRU would hold a block that was used last at this time."""
        return last_use >= self._since

    def use(self, blocks: int, last_use: int, now: int) -> None:
        """Blocks that were used at `last_use` are used `now`; 0 for those that were never."""
        used_at = self._used_at
        if last_use and last_use >= self._since:
            left = used_at.get(last_use, 0) - blocks
            if left:
                used_at[last_use] = left
            else:
                del used_at[last_use]
        else:
            self._blocks += blocks
        used_at[now] = used_at.get(now, 0) + blocks

    def forget(self, blocks: int, last_use: int) -> None:
        """Blocks were erased: an LRU would have lost them too."""
        if last_use >= self._since:
            self._used_at[last_use] = self._used_at.get(last_use, 0) - blocks
            self._blocks -= blocks

    def settle(self) -> None:
        """Let the LRU have no more than is held, but for a part of the blocks of one time."""
        used_at, surplus = self._used_at, self._blocks - self.held
        while surplus > 0:
            oldest = next(iter(used_at), None)
            if oldest is None or used_at[oldest] > surplus:
                break
            surplus -= used_at.pop(oldest)
            self._since = max(self._since, oldest + 1)
        self._blocks = self.held + surplus

"""What became of blocks that are no longer here, so that a miss can be explained. Bounded; oldest forgotten first."""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

from kvpool.blocks.identity import BlockKey


class Loss(StrEnum):
    """Why a block's last copy went."""

    EVICTED = "evicted"
    ORPHANED = "orphaned"
    CORRUPT = "corrupt"
    SEGMENT_FREED = "ssd-segment-freed"
    REFUSED = "refused"
    INDEX_FULL = "index-full"
    ERASED = "erased"
    UNREGISTERED = "unregistered"
    OVER_QUOTA = "over-quota"
    TIER_OUT = "tier-out"


class Fate(NamedTuple):
    """How one block was lost; `at_s` is seconds since the epoch, `tier` where its last copy lay."""

    loss: Loss
    tier: str
    at_s: float


class History:
    """Losses by block key: always the last `capacity / 2`, never more than `capacity`; some 150 bytes each.

    Two generations: when the young one has `capacity / 2` losses, it becomes the old one, and the old one is forgotten;
    so noting a run of blocks is one bulk update. Guarded by the index's lock.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.complete_since_s: float | None = None
        """None while nothing was ever forgotten; else a block lost before this time may be missing here."""
        self._young: dict[BlockKey, Fate] = {}
        self._old: dict[BlockKey, Fate] = {}
        self._young_until_s = 0.0
        self._old_until_s = 0.0

    def __len__(self) -> int:
        return sum(1 for _ in self.items())

    def note(self, key: BlockKey, fate: Fate) -> None:
        """Remember how this block was lost, in place of what was known."""
        self.note_all([key], fate)

    def note_all(self, keys: Iterable[BlockKey], fate: Fate) -> None:
        """Remember that these blocks, a few, were lost together."""
        pending = list(keys)
        half = max(self.capacity // 2, 1)
        while pending:
            room = half - len(self._young)
            if room <= 0:
                self._forget_old()
                continue
            self._young.update(dict.fromkeys(pending[:room], fate))
            self._young_until_s = max(self._young_until_s, fate.at_s)
            del pending[:room]

    def fate(self, key: BlockKey) -> Fate | None:
        """How this block was lost, if it was and is still remembered."""
        return self._young.get(key) or self._old.get(key)

    def items(self) -> Iterator[tuple[BlockKey, Fate]]:
        """Every remembered loss, about oldest first."""
        yield from ((key, fate) for key, fate in self._old.items() if key not in self._young)
        yield from self._young.items()

    def _forget_old(self) -> None:
        if self._old:
            self.complete_since_s = self._old_until_s
        self._old, self._young = self._young, {}
        self._old_until_s = self._young_until_s

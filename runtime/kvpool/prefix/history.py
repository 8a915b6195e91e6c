"""What became of blocks that are no longer here, so that a miss can be explained. Bounded; the oldest is forgotten first."""

from collections import OrderedDict
from collections.abc import Iterable
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


class Fate(NamedTuple):
    """How one block was lost; `at_s` is seconds since the epoch, `tier` where its last copy lay."""

    loss: Loss
    tier: str
    at_s: float


class History:
    """The last `capacity` losses by block key; about 250 bytes each. Guarded by the index's lock."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.complete_since_s: float | None = None
        """None while nothing was ever forgotten; else a block lost before this time may be missing here."""
        self._fates: OrderedDict[BlockKey, Fate] = OrderedDict()

    def __len__(self) -> int:
        return len(self._fates)

    def note(self, key: BlockKey, fate: Fate) -> None:
        """Remember how this block was lost, in place of what was known."""
        self._fates[key] = fate
        self._fates.move_to_end(key)
        if len(self._fates) > self.capacity:
            _, forgotten = self._fates.popitem(last=False)
            self.complete_since_s = max(self.complete_since_s or 0.0, forgotten.at_s)

    def fate(self, key: BlockKey) -> Fate | None:
        """How this block was lost, if it was and is still remembered."""
        return self._fates.get(key)

    def items(self) -> Iterable[tuple[BlockKey, Fate]]:
        """Every remembered loss, oldest first."""
        return self._fates.items()

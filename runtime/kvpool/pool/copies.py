"""Takes back what left the index: gives each place to its tier, and tells the listeners."""

from collections.abc import Sequence
from itertools import groupby

from kvpool.blocks.identity import BlockKey
from kvpool.pool.events import BlockRemoved, EventBus
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix.index import LEVEL_NAMES, Gone, PrefixIndex
from kvpool.prefix.node import RAM, SSD
from kvpool.tiers.ram import RamTier
from kvpool.tiers.tier import TierName


class Copies:
    """The way from the index back to the tiers."""

    def __init__(self, ram: RamTier, ssd: SsdStore, events: EventBus) -> None:
        self._ram = ram
        self._ssd = ssd
        self._events = events

    def release(self, gone: Sequence[Gone]) -> None:
        """Give every place back."""
        if not gone:
            return
        ram = [copy.place for copy in gone if copy.level == RAM]
        if ram:
            self._ram.drop(ram)
        if len(ram) < len(gone):
            self._ssd.drop([copy.place for copy in gone if copy.level == SSD])
        if self._events.active:
            for level, copies in groupby(gone, key=lambda copy: copy.level):
                keys = tuple(BlockKey(copy.key) for copy in copies if copy.key)
                self._events.publish(BlockRemoved(keys, TierName(LEVEL_NAMES[level])))


def shrink_index(index: PrefixIndex, copies: Copies) -> bool:
    """Forget blocks until the index is within its limit; False where leases forbid that."""
    while index.over_limit:
        gone = index.shrink()
        if not gone:
            return False
        copies.release(gone)
    return True

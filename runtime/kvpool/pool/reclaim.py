"""Frees SSD segments, so that writes find room: what nothing hangs on goes, what others hang on is written again.

A segment is passed over while one of its blocks is leased or it is being read. Records that are written again count
against the daily write budget; where that, or the room, does not allow it, they go with all that lies below them.
"""

import logging
import threading

from kvpool.blocks.record import CorruptRecordError, check_payload, read_head
from kvpool.pool.copies import Copies
from kvpool.pool.reading import UNREADABLE
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import SSD, Node
from kvpool.prefix.reclaiming import (
    Living,
    last_use,
    living,
    remove_below,
    remove_corrupt,
    residents,
    vacate_leaves,
)
from kvpool.tiers.ssd.ledger import SegmentInfo
from kvpool.tiers.ssd.place import bytes_of
from kvpool.tiers.ssd.scratch import Bytes, aligned
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

CANDIDATES = 16
"""So many of the oldest segments are looked at to choose the one to free."""
_log = logging.getLogger(__name__)


class Reclaimer:
    """Frees segments one at a time. Safe from any thread; a second caller waits for the first."""

    def __init__(self, index: PrefixIndex, store: SsdStore, copies: Copies) -> None:
        self._index = index
        self._store = store
        self._copies = copies
        self._lock = threading.Lock()
        self.freed_segments = 0
        self.rewritten_blocks = 0
        self.rewritten_bytes = 0

    def make_room(self) -> None:
        """Free segments until writes need not be refused soon, or none can be freed."""
        tier = self._store.tier
        if tier is None or not tier.wants_room():
            return
        with self._lock:
            while tier.wants_room() and self._free_one(tier):
                pass

    def shrink(self) -> None:
        """Free segments until the tier is within its capacity, which was lowered, or none can be freed."""
        tier = self._store.tier
        with self._lock:
            while tier is not None and tier.used_bytes > tier.capacity_bytes and self._free_one(tier):
                pass

    def _free_one(self, tier: SsdTier) -> bool:
        sealed = sorted(
            (info for info in tier.segments() if info.sealed and not info.readers), key=lambda info: info.created
        )
        by_cost = sorted(sealed[:CANDIDATES], key=self._cost)
        return any(self._free(tier, info.id) for info in by_cost)

    def _cost(self, info: SegmentInfo) -> float:
        """Little for a segment with few live bytes that were used long ago."""
        recency = last_use(self._index, info.id) / max(self._index.uses, 1)
        return info.live_bytes / info.file_bytes * (0.1 + recency)

    def _free(self, tier: SsdTier, segment: int) -> bool:
        for node in residents(self._index, segment):
            while gone := vacate_leaves(self._index, node, segment):
                self._copies.release(gone)
        for node in residents(self._index, segment):
            if not self._empty(node, segment):
                return False
        try:
            if not tier.free_segment(segment):
                return False
        except TierUnavailableError as error:
            _log.warning("ssd tier: %s", error.reason)
            return False
        self.freed_segments += 1
        return True

    def _empty(self, node: Node, segment: int) -> bool:
        """Write the node's records in the segment again elsewhere, or remove them; False where a lease forbids it."""
        while True:
            batch = living(self._index, node, segment)
            if batch is None:
                return False
            if not batch:
                return True
            if self._write_again(batch):
                continue
            gone = remove_below(self._index, node, segment)
            if not gone:
                return False
            self._copies.release(gone)

    def _write_again(self, batch: list[Living]) -> bool:
        """Move records to the open segment; False when not even the first could be written."""
        moved = False
        for record in batch:
            buffer = self._read(record)
            if buffer is None:
                self._copies.release(remove_corrupt(self._index, record.node, record.place))
                moved = True
                continue
            (place,) = self._store.write([buffer], reclaim=True)
            if place is None:
                return moved
            self.rewritten_blocks += 1
            self.rewritten_bytes += len(buffer)
            moved = True
            was_there = self._index.move(record.node, SSD, record.place, place)  # else leased, or gone meanwhile
            self._store.drop([record.place if was_there else place])
        return moved

    def _read(self, record: Living) -> Bytes | None:
        """The record's bytes, verified; None where they are bad."""
        buffer = aligned(bytes_of(record.place))
        if not all(self._store.read([record.place], [buffer])):
            self._store.count_corrupt(UNREADABLE, record.place)
            return None
        try:
            head = read_head(buffer)
            check_payload(buffer, head)
        except CorruptRecordError as error:
            self._store.count_corrupt(error.reason.value, record.place)
            return None
        return buffer if head.key == record.key else None

"""Frees SSD segments, so that writes find room: what nothing hangs on goes, and so do chains not used for long.

What others hang on is written again. A segment is passed over while one of its blocks is leased or it is being read.
Records that are written again count against the daily write budget; where that, or the room, does not allow it, they go
with all that lies below them.
"""

import logging
import threading
from collections.abc import Callable
from itertools import accumulate
from statistics import median

from kvpool.blocks.record import Corruption, CorruptRecordError, check_payload, read_head
from kvpool.pool.copies import Copies
from kvpool.pool.reading import UNREADABLE
from kvpool.pool.ssd_store import SsdStore, TierOutError
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import SSD, Node
from kvpool.prefix.reclaiming import (
    Living,
    drop_cold,
    is_guaranteed,
    is_leased,
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
BATCH_BYTES = 8 << 20
"""About so much is read and written again at once."""
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
        if tier is not None and tier.wants_room():
            self._free_while(tier, tier.wants_room)

    def make_room_now(self) -> bool:
        """Free segments, for a write has found no room; False when there is none all the same."""
        tier = self._store.tier
        return tier is not None and self._free_while(tier, lambda: not tier.free_segments)

    def shrink(self) -> None:
        """Free segments until the tier is within its capacity, which was lowered, or none can be freed."""
        tier = self._store.tier
        if tier is None or tier.used_bytes <= tier.capacity_bytes:
            return
        if not self._free_while(tier, lambda: tier.used_bytes > tier.capacity_bytes):
            try:
                tier.seal_all()  # the open ones cannot be freed
            except TierUnavailableError as error:
                _log.warning("ssd tier: %s", error.reason)
            self._free_while(tier, lambda: tier.used_bytes > tier.capacity_bytes)

    def _free_while(self, tier: SsdTier, wanted: Callable[[], bool]) -> bool:
        """Free segments until none is wanted any more; False if some still is.

        Those that this makes itself are left alone: what was just written again must not be written again at once.
        """
        with self._lock:
            begun = {info.id for info in tier.segments()}
            while wanted():
                if self._store.degraded or not self._free_one(tier, begun):
                    return False
            return True

    def _free_one(self, tier: SsdTier, begun: set[int]) -> bool:
        sealed = sorted(
            (info for info in tier.segments() if info.sealed and not info.readers and info.id in begun),
            key=lambda info: info.created,
        )
        uses = {info.id: last_use(self._index, info.id) for info in sealed[:CANDIDATES]}
        cutoff = median(uses.values()) if uses else 0.0
        by_cost = sorted(sealed[:CANDIDATES], key=lambda info: self._cost(info, uses[info.id]))
        return any(self._free(tier, info.id, cutoff) for info in by_cost)

    def _cost(self, info: SegmentInfo, used: float) -> float:
        """Little for a segment with few live bytes that were used long ago."""
        return info.live_bytes / info.file_bytes * (0.1 + used / max(self._index.uses, 1))

    def _free(self, tier: SsdTier, segment: int, cutoff: float) -> bool:
        if is_leased(self._index, segment):
            return False
        for node in residents(self._index, segment):
            while gone := vacate_leaves(self._index, node, segment):
                self._copies.release(gone)
        for node in residents(self._index, segment):
            if not self._empty(node, segment, cutoff):
                return False
        if tier.places_in(segment):  # just written, and not yet entered in the index: by a writer that is about to
            return False
        try:
            if not tier.free_segment(segment):
                return False
        except TierUnavailableError as error:
            _log.warning("ssd tier: %s", error.reason)
            return False
        self.freed_segments += 1
        return True

    def _empty(self, node: Node, segment: int, cutoff: float) -> bool:
        """Remove the node's records in the segment where they are cold, else write them again elsewhere.

        Where there is no room for them they go as well. False where a lease forbids it.
        """
        while True:
            while gone := drop_cold(self._index, node, segment, cutoff):
                self._copies.release(gone)
            batch = living(self._index, node, segment)
            if batch is None:
                return False
            if not batch:
                return True
            if self._write_again(batch):
                continue
            if self._store.degraded:  # neither room nor the records are to blame
                return False
            gone = remove_below(self._index, node, segment)
            if not gone:
                return False
            self._copies.release(gone)

    def _write_again(self, batch: list[Living]) -> bool:
        """Move the first records of the batch to the open segment; False when not one could be moved or found bad."""
        batch = _some_bytes_of(batch)
        try:
            buffers = self._read(batch)
        except TierOutError:
            return False
        good = [(record, buffer) for record, buffer in zip(batch, buffers, strict=True) if buffer is not None]
        guaranteed = is_guaranteed(batch[0].node)
        records = [buffer for _, buffer in good]
        places = self._store.write(records, reclaim=True, guaranteed=guaranteed) if good else []
        moved = len(good) < len(batch)
        for (record, buffer), place in zip(good, places, strict=True):
            if place is None:
                continue
            moved = True
            self.rewritten_blocks += 1
            self.rewritten_bytes += len(buffer)
            was_there = self._index.move(record.node, SSD, record.place, place)  # else leased, or gone meanwhile
            self._store.drop([record.place if was_there else place])
        return moved

    def _read(self, batch: list[Living]) -> list[Bytes | None]:
        """Each record's bytes, verified; None for those that are bad: they are removed. Raises `TierOutError`."""
        memory = aligned(sum(bytes_of(record.place) for record in batch))
        ends = accumulate(bytes_of(record.place) for record in batch)
        buffers = [memory[end - bytes_of(record.place) : end] for record, end in zip(batch, ends, strict=True)]
        arrived = self._store.read([record.place for record in batch], buffers)
        return [
            buffer if self._is_good(record, buffer, came=came) else None
            for record, buffer, came in zip(batch, buffers, arrived, strict=True)
        ]

    def _is_good(self, record: Living, buffer: Bytes, *, came: bool) -> bool:
        fault = _fault(record, buffer) if came else UNREADABLE
        if fault is not None:
            self._store.count_corrupt(fault, record.place)
            self._copies.release(remove_corrupt(self._index, record.node, record.place))
        return fault is None


def _some_bytes_of(batch: list[Living]) -> list[Living]:
    """The first records of the batch, about `BATCH_BYTES` of them and one at least."""
    ends = accumulate(bytes_of(record.place) for record in batch)
    return batch[: max(1, sum(end <= BATCH_BYTES for end in ends))]


def _fault(record: Living, buffer: Bytes) -> str | None:
    """Why the bytes are not the record's; None when they are."""
    try:
        head = read_head(buffer)
        check_payload(buffer, head)
    except CorruptRecordError as error:
        return error.reason.value
    return None if head.key == record.key else Corruption.KEY.value

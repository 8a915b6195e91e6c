"""Room in RAM for new blocks: slots of the ram tier, made free by eviction and by moving blocks together.

A slot that was allocated here is nobody else's until it is entered in the index or freed.
"""

import numpy as np

from kvpool.pool.copies import Copies
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import RAM
from kvpool.tiers.ram import RamTier, region_of


class Memory:
    """Allocates slots for records. Safe from any thread."""

    def __init__(self, ram: RamTier, index: PrefixIndex, copies: Copies) -> None:
        self.ram = ram
        self._index = index
        self._copies = copies

    def allocate(self, record_bytes: int, count: int) -> list[int]:
        """Up to `count` slots of this size; fewer, or none, where everything that could make room is leased."""
        slots = self.ram.allocate_many(record_bytes, count)
        return slots if len(slots) == count else self._allocate_by_force(record_bytes, count, slots)

    def free(self, slots: list[int]) -> None:
        """Give back slots that were not entered in the index."""
        if slots:
            self.ram.drop(slots)

    def vacate(self, slots: list[int]) -> bool:
        """Move or evict the blocks in these slots, for their extents are to go; False when leases forbid some."""
        left = [slot for slot in slots if not self._move(slot)]
        while left:
            gone = self._index.evict(RAM, self.ram.slab.slot_bytes(left[0]) or 1)
            self._copies.release(gone)
            left = [slot for slot in left if not self._move(slot)]
            if not gone:
                break
        return not left

    def _allocate_by_force(self, record_bytes: int, count: int, slots: list[int]) -> list[int]:
        if record_bytes > self.ram.capacity_bytes:
            return slots
        while len(slots) < count:
            wanted = count - len(slots)
            gone = self._index.evict(RAM, wanted * record_bytes)
            self._copies.release(gone)
            slots += self.ram.allocate_many(record_bytes, wanted)
            if len(slots) < count and not self._make_extent(record_bytes) and not gone:
                break
        return slots

    def _make_extent(self, record_bytes: int) -> bool:
        """Empty an extent of another size by moving its blocks, so that it can be cut for this one."""
        occupied = self.ram.slab.movable_extent(record_bytes)
        if occupied is None:
            return False
        if all(self._move(slot) for slot in occupied):
            return True
        self.ram.slab.cancel_claim(record_bytes)
        return False

    def _move(self, slot: int) -> bool:
        """Copy one block to another slot of its size; True when the old slot is free afterwards."""
        record_bytes = self.ram.slab.slot_bytes(slot)
        if record_bytes is None:
            return True
        fresh = self.ram.allocate(record_bytes)
        if fresh is None:
            return False
        try:
            np.copyto(self.ram.record(fresh), self.ram.record(slot))
        except ValueError:  # it was evicted meanwhile
            self.ram.drop([fresh])
            return True
        with self._index.lock:
            nodes = list(self._index.residents[RAM].get(region_of(slot), ()))
        if any(self._index.move(node, RAM, slot, fresh) for node in nodes):
            self.ram.drop([slot])
            return True
        self.ram.drop([fresh])
        return self.ram.slab.slot_bytes(slot) is None

"""Room in RAM for blocks: slots of the ram tier, made free by eviction and by moving blocks together.

A slot that was allocated here is charged to its model's account, and nobody else's until it is entered in the index
(with `charged`, its bytes) or freed.
"""

from collections import Counter
from collections.abc import Sequence
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

import numpy as np

from kvpool.pool.charging import charge
from kvpool.pool.copies import Copies
from kvpool.prefix.accounts import Account, Grant
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import RAM
from kvpool.prefix.relocating import hold, release, settle
from kvpool.tiers.ram import RamTier, region_of


class Moved(Enum):
    """What became of a slot whose block was to move."""

    GONE = auto()
    """It is free now."""
    NO_ROOM = auto()
    """There is no other slot of its size."""
    HELD = auto()
    """Its block is leased, or not entered in the index yet."""


class Room(NamedTuple):
    """What was allocated. Where it is less than was wanted, `granted` says whether a quota was the reason."""

    slots: list[int]
    granted: Grant


class Memory:
    """Allocates slots for records. Safe from any thread."""

    def __init__(self, ram: RamTier, index: PrefixIndex, copies: Copies) -> None:
        self.ram = ram
        self._index = index
        self._copies = copies

    def allocate(self, account: Account, record_bytes: int, count: int) -> Room:
        """Up to `count` slots of this size; fewer, or none, where all that could make room is leased or not its own."""
        granted, why = charge(
            self._index, account, RAM, [record_bytes] * count, give_up=partial(self._give_up, account)
        )  # fmt: skip
        if not granted:
            return Room([], why)
        slots = self.ram.allocate_many(record_bytes, granted)
        if len(slots) < granted:
            slots = self._allocate_by_force(account, record_bytes, granted, slots)
            if len(slots) < granted:
                self._index.discharge(account, RAM, (granted - len(slots)) * record_bytes)
                why = Grant.GIVEN
        return Room(slots, why)

    def free(self, account: Account, slots: Sequence[int]) -> None:
        """Give back slots that were allocated for `account` and were not entered in the index."""
        if slots:
            self._index.discharge(account, RAM, sum(map(self.ram.bytes_of, slots)))
            self.ram.drop(slots)

    def drop(self, slots: Sequence[int]) -> None:
        """Give back slots that the index did not take, and has discharged."""
        if slots:
            self.ram.drop(slots)

    def vacate(self, slots: list[int]) -> bool:
        """Move or evict the blocks in these slots, for their extents are to go; False when leases forbid some.

        Where there is no room to move them to, as much is evicted as they take, and no more.
        """
        homeless = [slot for slot in slots if self._move(slot) is Moved.NO_ROOM]
        for record_bytes, count in Counter(map(self.ram.bytes_of, homeless)).items():
            if record_bytes:
                self._copies.release(self._index.evict(RAM, record_bytes * count))
        return all(self._move(slot) is Moved.GONE for slot in slots)

    def _give_up(self, account: Account, nbytes: int) -> bool:
        return self._copies.evict_own(self._index, account, RAM, nbytes)

    def _allocate_by_force(self, account: Account, record_bytes: int, count: int, slots: list[int]) -> list[int]:
        if record_bytes > self.ram.capacity_bytes:
            return slots
        stuck: set[int] = set()
        while len(slots) < count:
            gone = self._index.evict(RAM, (count - len(slots)) * record_bytes, account)
            self._copies.release(gone)
            before = len(slots)
            slots += self.ram.allocate_many(record_bytes, count - len(slots))
            if len(slots) < count and self._make_extent(record_bytes, stuck):
                slots += self.ram.allocate_many(record_bytes, count - len(slots))
            if len(slots) == before and not gone:
                break
        return slots

    def _make_extent(self, record_bytes: int, stuck: set[int]) -> bool:
        """Empty an extent of another size by moving its blocks, so that it can be cut for this one.

        `stuck` are extents in which a block could not be moved; they are passed over, and added to.
        """
        while (occupied := self.ram.slab.movable_extent(record_bytes, skip=stuck)) is not None:
            unmoved = [slot for slot in occupied if self._move(slot) is not Moved.GONE]
            if not unmoved:
                return True
            self.ram.slab.cancel_claim(record_bytes)
            stuck.update(map(region_of, unmoved))
        return False

    def _move(self, slot: int) -> Moved:
        """Copy one block to another slot of its size, which is charged to nobody: the old one goes at once."""
        record_bytes = self.ram.slab.slot_bytes(slot)
        if record_bytes is None:
            return Moved.GONE
        held = hold(self._index, RAM, slot)
        if held is None:
            return Moved.HELD if self.ram.slab.slot_bytes(slot) is not None else Moved.GONE
        fresh = self.ram.allocate(record_bytes)
        if fresh is None:
            release(self._index, held)
            return Moved.NO_ROOM
        np.copyto(self.ram.record(fresh), self.ram.record(slot))
        moved = settle(self._index, held, fresh)
        self.ram.drop([slot if moved else fresh])
        return Moved.GONE if moved else Moved.HELD

"""The slab against a naive model: a dictionary from each slot in use to its size and the byte that fills it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.extents import SLOT_BITS
from kvpool.tiers.slab import Slab

PAGES = 64
"""The largest capacity."""
SIZES = st.sampled_from([1, 2, 3, 5, 8, 24]).map(lambda pages: pages * PAGE_BYTES)
CAPACITIES = st.sampled_from([PAGES, PAGES, 40, 17, 4, 0]).map(lambda pages: pages * PAGE_BYTES)
PICKS = st.lists(st.integers(0, 1 << 16), max_size=12)


class Block(NamedTuple):
    slot_bytes: int
    mark: int


class SlabAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Block] = {}
        self.doomed: set[int] = set()
        """What the last `resize` said must go."""
        self.marks = 0

    @initialize(extent_pages=st.sampled_from([None, 1, 4, 16]))
    def open(self, extent_pages: int | None) -> None:
        self.slab = Slab(PAGES * PAGE_BYTES, extent_bytes=extent_pages and extent_pages * PAGE_BYTES)

    @rule(slot_bytes=SIZES)
    def allocate(self, slot_bytes: int) -> None:
        slot = self.slab.allocate(slot_bytes)
        if slot is not None:
            self.enter(slot, slot_bytes)

    @rule(slot_bytes=SIZES, count=st.integers(0, 40))
    def allocate_many(self, slot_bytes: int, count: int) -> None:
        slots = self.slab.allocate_many(slot_bytes, count)
        assert len(slots) <= count
        for slot in slots:
            self.enter(slot, slot_bytes)
        if len(slots) < count:
            assert self.slab.allocate(slot_bytes) is None

    @rule(picks=PICKS)
    def free(self, picks: Sequence[int]) -> None:
        for slot in self.picked(picks):
            self.slab.free(slot)
            self.forget(slot)

    @rule(picks=PICKS)
    def free_many(self, picks: Sequence[int]) -> None:
        slots = self.picked(picks)
        self.slab.free_many(slots)
        for slot in slots:
            self.forget(slot)

    @rule(slot_bytes=SIZES, leased=PICKS)
    def make_room_by_moving(self, slot_bytes: int, leased: Sequence[int]) -> None:
        skip = {slot >> SLOT_BITS for slot in self.picked(leased)}
        occupied = self.slab.movable_extent(slot_bytes, skip=skip)
        if occupied is not None:
            self.slab.check_integrity()
            assert self.vacate(occupied, skip) == 0, "nothing is evicted for a movable extent"
            self.take_room(slot_bytes)

    @rule(slot_bytes=SIZES, leased=PICKS)
    def make_room_by_evicting(self, slot_bytes: int, leased: Sequence[int]) -> None:
        skip = {slot >> SLOT_BITS for slot in self.picked(leased)}
        occupied = self.slab.sparse_extent(slot_bytes, skip=skip)
        if occupied is not None:
            self.slab.check_integrity()
            self.vacate(occupied, skip)
            self.take_room(slot_bytes)

    @rule(slot_bytes=SIZES, picks=PICKS)
    def change_ones_mind(self, slot_bytes: int, picks: Sequence[int]) -> None:
        occupied = self.slab.sparse_extent(slot_bytes) or []
        for slot in occupied[: len(picks)]:
            self.slab.free(slot)
            self.forget(slot)
        self.slab.check_integrity()
        self.slab.cancel_claim(slot_bytes)

    @rule(slot_bytes=SIZES)
    def forget_what_was_asked_for(self, slot_bytes: int) -> None:
        self.slab.sparse_extent(slot_bytes)

    @rule(capacity_bytes=CAPACITIES)
    def resize(self, capacity_bytes: int) -> None:
        doomed = self.slab.resize(capacity_bytes)
        assert len(set(doomed)) == len(doomed)
        assert set(doomed) <= self.held.keys()
        self.doomed = set(doomed)

    @precondition(lambda self: self.doomed)
    @rule()
    def obey_the_resize(self) -> None:
        for slot in list(self.doomed):
            self.slab.free(slot)
            self.forget(slot)
        assert self.slab.reserved_bytes <= self.slab.capacity_bytes

    @rule()
    def prefault(self) -> None:
        before = self.slab.reserved_bytes
        touched = self.slab.prefault_extent(lambda: False)
        assert self.slab.reserved_bytes == before + touched

    @invariant()
    def every_slot_is_whole(self) -> None:
        for slot, block in self.held.items():
            view = self.slab.view(slot)
            assert view.nbytes == self.slab.slot_bytes(slot) == block.slot_bytes
            assert (view == block.mark).all()

    @invariant()
    def all_is_accounted_for(self) -> None:
        self.slab.check_integrity()
        stats = self.slab.stats()
        assert stats.used_bytes == self.slab.used_bytes == sum(block.slot_bytes for block in self.held.values())
        assert stats.used_bytes <= stats.reserved_bytes
        assert stats.reserved_bytes <= stats.capacity_bytes or self.doomed
        assert stats.reserved_bytes - stats.used_bytes >= stats.stranded_bytes

    def teardown(self) -> None:
        if hasattr(self, "slab"):
            self.slab.close()
            self.slab.check_integrity()

    def enter(self, slot: int, slot_bytes: int, mark: int | None = None) -> None:
        assert slot not in self.held
        self.marks += 1
        self.held[slot] = Block(slot_bytes, self.marks % 251 if mark is None else mark)
        self.slab.view(slot)[:] = self.held[slot].mark

    def forget(self, slot: int) -> None:
        del self.held[slot]
        self.doomed.discard(slot)

    def picked(self, picks: Sequence[int]) -> list[int]:
        slots = list(self.held)
        return list(dict.fromkeys(slots[pick % len(slots)] for pick in picks)) if slots else []

    def vacate(self, occupied: Sequence[int], skip: set[int]) -> int:
        """Move each to another slot of its size; how many had to be evicted instead."""
        evicted = 0
        for slot in occupied:
            assert slot >> SLOT_BITS not in skip
            block = self.held[slot]
            fresh = self.slab.allocate(block.slot_bytes)
            if fresh is None:
                evicted += 1
            else:
                assert fresh >> SLOT_BITS not in {other >> SLOT_BITS for other in occupied}
                np.copyto(self.slab.view(fresh), self.slab.view(slot))
                assert fresh not in self.held
                self.held[fresh] = block
            self.slab.free(slot)
            self.forget(slot)
        return evicted

    def take_room(self, slot_bytes: int) -> None:
        slot = self.slab.allocate(slot_bytes)
        assert slot is not None, "what was made room for is to be had"
        self.enter(slot, slot_bytes)


TestSlabAgainstModel = SlabAgainstModel.TestCase
TestSlabAgainstModel.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)

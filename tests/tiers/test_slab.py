"""Rules of the slab allocator, one by one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from itertools import cycle, pairwise
from random import Random
from types import FrameType

import numpy as np
import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.errors import InputError
from kvpool.tiers.extents import INDEX_MASK, SLOT_BITS
from kvpool.tiers.slab import EXTENTS_PER_CAPACITY, MAX_EXTENT_BYTES, Slab

EXTENT = 16 * PAGE_BYTES
SMALL, MEDIUM, LARGE = PAGE_BYTES, 4 * PAGE_BYTES, 16 * PAGE_BYTES


@pytest.fixture
def slab() -> Iterator[Slab]:
    """Four extents of 16 pages."""
    slab = Slab(4 * EXTENT, extent_bytes=EXTENT)
    yield slab
    slab.close()


def fill(slab: Slab, slot_bytes: int) -> list[int]:
    """Every slot of this size that can be had."""
    return slab.allocate_many(slot_bytes, 1 << 20)


def region(slot: int) -> int:
    return slot >> SLOT_BITS


def never() -> bool:
    return False


def move(slab: Slab, slots: list[int]) -> list[int]:
    """Move each to another slot of its size; where they are now."""
    moved = []
    for slot in slots:
        slot_bytes = slab.slot_bytes(slot)
        assert slot_bytes is not None
        fresh = slab.allocate(slot_bytes)
        assert fresh is not None, "a movable extent's slots have somewhere to go"
        np.copyto(slab.view(fresh), slab.view(slot))
        slab.free(slot)
        moved.append(fresh)
    return moved


# --- slots -----------------------------------------------------------------------------------------------------------


def test_a_slot_is_writable_page_aligned_and_exactly_as_long_as_asked(slab: Slab) -> None:
    for slot_bytes in (SMALL, 3 * PAGE_BYTES, LARGE):
        slot = slab.allocate(slot_bytes)
        assert slot is not None
        view = slab.view(slot)
        assert view.nbytes == slab.slot_bytes(slot) == slot_bytes
        assert view.ctypes.data % PAGE_BYTES == 0
        assert view.flags.writeable
        assert view.flags.c_contiguous


def test_slots_in_use_never_share_a_byte(slab: Slab) -> None:
    slots = [*slab.allocate_many(SMALL, 10), *slab.allocate_many(3 * PAGE_BYTES, 7), *fill(slab, LARGE)]
    spans = sorted((slab.view(slot).ctypes.data, slab.view(slot).nbytes) for slot in slots)
    assert all(start + nbytes <= other for (start, nbytes), (other, _) in pairwise(spans))


def test_a_full_slab_hands_out_nothing_and_loses_nothing(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    assert len(slots) == 64
    for number, slot in enumerate(slots):
        slab.view(slot)[:] = number
    assert slab.allocate(SMALL) is None
    assert slab.allocate(LARGE) is None
    assert slab.allocate_many(SMALL, 3) == []
    assert all((slab.view(slot) == number).all() for number, slot in enumerate(slots))
    assert slab.used_bytes == slab.reserved_bytes == slab.capacity_bytes


def test_allocate_many_gives_as_many_as_there_are_and_each_once(slab: Slab) -> None:
    first = slab.allocate_many(MEDIUM, 5)
    rest = slab.allocate_many(MEDIUM, 100)
    assert (len(first), len(rest)) == (5, 11)
    assert len({*first, *rest}) == 16
    assert slab.allocate_many(MEDIUM, 0) == []


@pytest.mark.parametrize("slot_bytes", [0, -PAGE_BYTES, 1, PAGE_BYTES + 1])
def test_a_size_that_is_not_whole_pages_is_refused(slab: Slab, slot_bytes: int) -> None:
    with pytest.raises(InputError, match="multiples of 4096"):
        slab.allocate(slot_bytes)
    with pytest.raises(InputError, match="multiples of 4096"):
        slab.allocate_many(slot_bytes, 2)
    slab.check_integrity()
    assert slab.allocate(SMALL) is not None


def test_a_negative_capacity_is_refused(slab: Slab) -> None:
    with pytest.raises(InputError, match="0 or more"):
        Slab(-1)
    with pytest.raises(InputError, match="0 or more"):
        slab.resize(-1)


def test_a_slab_of_nothing_hands_out_nothing() -> None:
    slab = Slab(0)
    assert slab.allocate(SMALL) is None
    assert slab.sparse_extent(SMALL) is None
    assert slab.prefault_extent(never) == 0
    assert slab.stats().usable_share == 1.0


def test_a_slot_is_freed_once_and_only_if_it_was_handed_out(slab: Slab) -> None:
    slot, other = slab.allocate_many(SMALL, 2)
    slab.free(slot)
    for stale in (slot, other + 100, 99 << SLOT_BITS, -1):
        with pytest.raises(ValueError, match="not in use"):
            slab.free(stale)
        with pytest.raises(ValueError, match="not in use"):
            slab.view(stale)
        assert slab.slot_bytes(stale) is None
    slab.check_integrity()
    assert slab.used_bytes == SMALL


def test_freeing_many_stops_at_the_first_that_is_not_in_use(slab: Slab) -> None:
    first, second, third = slab.allocate_many(SMALL, 3)
    with pytest.raises(ValueError, match="not in use"):
        slab.free_many([first, first, second])
    assert slab.slot_bytes(first) is None
    slab.free_many([second, third])
    slab.check_integrity()
    assert slab.used_bytes == 0


def test_a_slot_of_an_earlier_cut_is_known_as_stale(slab: Slab) -> None:
    old = fill(slab, SMALL)
    slab.free_many(old)
    new = fill(slab, MEDIUM)
    assert new
    assert not set(old) & set(new)
    assert not {region(slot) for slot in old} & {region(slot) for slot in new}
    with pytest.raises(ValueError, match="not in use"):
        slab.free(old[0])


# --- extents ---------------------------------------------------------------------------------------------------------


def test_an_extent_is_a_64th_of_the_capacity_and_64_mib_at_most() -> None:
    for capacity, extent in ((EXTENTS_PER_CAPACITY * EXTENT, EXTENT), (64 << 30, MAX_EXTENT_BYTES), (1, PAGE_BYTES)):
        slab = Slab(capacity)
        slab.allocate(PAGE_BYTES)
        assert slab.reserved_bytes == (extent if capacity > 1 else 0)
        slab.close()


def test_memory_is_mapped_as_it_is_needed_and_never_beyond_the_capacity(slab: Slab) -> None:
    slab.allocate(SMALL)
    assert slab.reserved_bytes == EXTENT
    fill(slab, 5 * PAGE_BYTES)
    fill(slab, SMALL)
    assert slab.reserved_bytes <= slab.capacity_bytes
    assert slab.capacity_bytes - slab.used_bytes < SMALL


def test_an_empty_extent_is_cut_anew_and_no_memory_is_mapped_for_it(slab: Slab) -> None:
    slab.free_many(fill(slab, SMALL))
    mapped = slab.stats().mapped
    assert len(fill(slab, MEDIUM)) == 16
    stats = slab.stats()
    assert stats.mapped == mapped
    assert stats.recut == 4


def test_a_slot_larger_than_an_extent_gets_memory_of_its_own(slab: Slab) -> None:
    slot = slab.allocate(3 * EXTENT)
    assert slot is not None
    assert slab.view(slot).nbytes == slab.reserved_bytes == 3 * EXTENT
    assert slab.allocate(2 * EXTENT) is None
    assert len(fill(slab, SMALL)) == 16


def test_several_empty_extents_make_room_for_a_slot_larger_than_each(slab: Slab) -> None:
    slab.free_many(fill(slab, SMALL))
    slot = slab.allocate(slab.capacity_bytes)
    assert slot is not None
    slab.view(slot)[:] = 1
    assert slab.stats().extents == 1
    slab.check_integrity()


def test_a_slot_larger_than_the_capacity_is_never_to_be_had(slab: Slab) -> None:
    held = slab.allocate_many(SMALL, 20)
    assert slab.allocate(slab.capacity_bytes + PAGE_BYTES) is None
    assert slab.movable_extent(slab.capacity_bytes + PAGE_BYTES) is None
    assert slab.sparse_extent(slab.capacity_bytes + PAGE_BYTES) is None
    slab.check_integrity()
    slab.free_many(held)


def test_the_fuller_extents_fill_up_and_the_sparser_ones_drain(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    first, second = slots[:16], slots[16:32]
    slab.free_many(first[:15])
    slab.free(second[0])
    assert region(slab.allocate(SMALL) or 0) == region(second[0])
    slab.free(first[15])
    slab.free(second[1])
    assert region(slab.allocate(SMALL) or 0) == region(second[0])


def test_an_extent_that_became_empty_is_used_last(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    slab.free(slots[63])
    slab.free_many(slots[16:32])
    assert region(slab.allocate(SMALL) or 0) == region(slots[63])
    assert slab.allocate(LARGE) is not None


def test_memory_that_the_system_refuses_is_no_room_and_not_an_error() -> None:
    slab = Slab(1 << 60)
    assert slab.allocate(1 << 50) is None
    assert slab.reserved_bytes == 0
    assert slab.allocate(SMALL) is not None
    slab.check_integrity()
    slab.close()


def test_an_extent_that_somebody_still_looks_at_is_cut_within_its_length(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    late = slab.view(slots[0])
    slab.free_many(slots)
    fresh = fill(slab, 5 * PAGE_BYTES)
    assert fresh
    slab.check_integrity()
    assert slab.reserved_bytes <= slab.capacity_bytes
    late[:] = 7
    assert all(slab.view(slot).nbytes == 5 * PAGE_BYTES for slot in fresh)


def test_what_is_too_short_for_the_new_size_and_looked_at_is_not_handed_out_again(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    late = [slab.view(slot) for slot in slots]
    slab.free_many(slots)
    slot = slab.allocate(3 * EXTENT)
    assert slot is not None
    slab.view(slot)[:] = 1
    for view in late:
        view[:] = 2
    assert (slab.view(slot) == 1).all()
    slab.check_integrity()


def test_stranded_bytes_are_those_that_no_other_size_could_have(slab: Slab) -> None:
    held = fill(slab, SMALL)
    slab.free_many(held[:20])
    stats = slab.stats()
    assert stats.stranded_bytes == 4 * SMALL
    assert stats.usable_share == 1 - 4 / 64
    assert (stats.used_bytes, stats.extents, stats.sizes) == (44 * SMALL, 4, 1)


# --- making room -----------------------------------------------------------------------------------------------------


def scattered(slab: Slab, holes: int = 4) -> list[int]:
    """Fill the slab with small slots, then free `holes` in each extent; the slots in use."""
    slots = fill(slab, SMALL)
    freed = [slot for slot in slots if slot & INDEX_MASK < holes]
    slab.free_many(freed)
    return [slot for slot in slots if slot & INDEX_MASK >= holes]


def test_a_movable_extent_becomes_room_without_evicting_anything(slab: Slab) -> None:
    held = scattered(slab, holes=6)
    assert slab.allocate(LARGE) is None
    occupied = slab.movable_extent(LARGE)
    assert occupied is not None
    assert len({region(slot) for slot in occupied}) == 1
    assert set(occupied) <= set(held)
    move(slab, occupied)
    assert slab.allocate(LARGE) is not None
    assert slab.used_bytes == len(held) * SMALL + LARGE
    slab.check_integrity()


def test_an_extent_whose_blocks_have_nowhere_to_go_is_not_movable_but_sparse(slab: Slab) -> None:
    scattered(slab, holes=3)
    assert slab.movable_extent(LARGE) is None
    occupied = slab.sparse_extent(LARGE)
    assert occupied is not None
    assert len(occupied) == 13
    homeless = [slot for slot in occupied if slab.allocate(SMALL) is None]
    assert len(homeless) == 4, "only what found no other slot must be evicted"
    slab.free_many(occupied)
    assert slab.allocate(LARGE) is not None
    slab.check_integrity()


def test_the_extent_that_costs_the_least_to_evict_is_chosen(slab: Slab) -> None:
    small, medium = slab.allocate_many(SMALL, 32), slab.allocate_many(MEDIUM, 8)
    slab.free_many(small[:10])
    assert slab.sparse_extent(LARGE) == small[10:16], "6 pages, where all others hold 16"
    slab.free_many(medium[:3])
    assert slab.sparse_extent(LARGE) == [medium[3]], "4 pages"


def test_nobody_else_is_given_a_slot_of_an_extent_that_is_held_back(slab: Slab) -> None:
    scattered(slab, holes=6)
    occupied = slab.movable_extent(LARGE)
    assert occupied
    assert region(occupied[0]) not in {region(slot) for slot in fill(slab, SMALL)}
    slab.free_many(occupied)
    assert slab.allocate(SMALL) is None
    assert slab.allocate(MEDIUM) is None
    assert slab.allocate(LARGE) is not None


def test_what_is_held_back_can_be_allocated_from_once_it_is_no_longer_wanted(slab: Slab) -> None:
    scattered(slab, holes=6)
    occupied = slab.movable_extent(LARGE)
    assert occupied
    slab.cancel_claim(LARGE)
    slab.check_integrity()
    assert region(occupied[0]) in {region(slot) for slot in fill(slab, SMALL)}
    slab.cancel_claim(LARGE)
    slab.cancel_claim(12345)


def test_what_is_held_back_is_let_go_when_its_size_finds_room_elsewhere(slab: Slab) -> None:
    large = slab.allocate(LARGE)
    scattered(slab, holes=6)
    occupied = slab.movable_extent(LARGE)
    assert occupied
    assert large is not None
    slab.free(large)
    slab.check_integrity()
    assert len(fill(slab, SMALL)) == 3 * 6 + 16


def test_a_new_question_for_a_size_takes_the_place_of_the_last(slab: Slab) -> None:
    scattered(slab, holes=6)
    first = slab.movable_extent(LARGE)
    assert first
    second = slab.movable_extent(LARGE, skip=[region(first[0])])
    assert second
    assert region(first[0]) != region(second[0])
    slab.check_integrity()
    assert region(first[0]) in {region(slot) for slot in fill(slab, SMALL)}


def test_two_sizes_never_wait_for_the_same_extent(slab: Slab) -> None:
    scattered(slab, holes=10)
    first, second = slab.movable_extent(LARGE), slab.movable_extent(MEDIUM)
    assert first
    assert second
    assert region(first[0]) != region(second[0])
    move(slab, first)
    assert slab.allocate(MEDIUM) is None, "what was emptied is for the size that asked"
    assert slab.allocate(LARGE) is not None
    move(slab, second)
    assert slab.allocate(MEDIUM) is not None
    slab.check_integrity()


def test_extents_with_a_leased_block_are_passed_over(slab: Slab) -> None:
    held = scattered(slab, holes=6)
    regions = sorted({region(slot) for slot in held})
    occupied = slab.movable_extent(LARGE, skip=regions[:3])
    assert occupied
    assert {region(slot) for slot in occupied} == {regions[3]}
    assert slab.movable_extent(LARGE, skip=regions) is None
    assert slab.sparse_extent(LARGE, skip=regions) is None
    slab.check_integrity()


def test_there_is_nothing_to_move_while_there_is_room(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    slab.free_many(slots[:16])
    assert slab.sparse_extent(LARGE) == []
    assert slab.movable_extent(LARGE) == []
    slab.allocate_many(SMALL, 8)
    assert slab.sparse_extent(SMALL) == []


def test_extents_of_the_wanted_size_itself_are_left_alone(slab: Slab) -> None:
    fill(slab, SMALL)
    assert slab.sparse_extent(SMALL) is None
    assert slab.movable_extent(SMALL) is None


def test_several_extents_are_named_where_one_is_too_small(slab: Slab) -> None:
    held = scattered(slab, holes=10)
    occupied = slab.movable_extent(2 * EXTENT)
    assert occupied
    assert len({region(slot) for slot in occupied}) == 2
    move(slab, occupied)
    assert slab.allocate(2 * EXTENT) is not None
    assert slab.used_bytes == len(held) * SMALL + 2 * EXTENT
    slab.check_integrity()


def test_nothing_is_moved_into_an_empty_extent_that_is_counted_on(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    slab.free_many(slots[:16])  # one is empty
    occupied = slab.sparse_extent(2 * EXTENT)
    assert occupied is not None
    assert len(occupied) == 16
    assert slab.allocate(SMALL) is None
    slab.free_many(occupied)
    assert slab.allocate(2 * EXTENT) is not None


def test_nothing_is_mapped_for_others_in_room_that_is_counted_on(slab: Slab) -> None:
    small = slab.allocate_many(SMALL, 32)  # two extents full, two not mapped yet
    occupied = slab.sparse_extent(3 * EXTENT)
    assert occupied is not None
    assert len(occupied) == 16
    assert slab.allocate(SMALL) is None
    assert slab.prefault_extent(never) == 0
    slab.free_many(occupied)
    assert slab.allocate(3 * EXTENT) is not None
    assert slab.used_bytes == slab.capacity_bytes
    assert len(small) == 32


# --- resize ----------------------------------------------------------------------------------------------------------


def test_a_larger_capacity_can_be_used_at_once(slab: Slab) -> None:
    fill(slab, SMALL)
    assert slab.resize(6 * EXTENT) == []
    assert len(fill(slab, SMALL)) == 32


def test_a_smaller_capacity_gives_empty_extents_back_at_once(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    slab.free_many(slots[:32])
    assert slab.resize(2 * EXTENT) == []
    assert slab.reserved_bytes == 2 * EXTENT
    assert all(slab.slot_bytes(slot) == SMALL for slot in slots[32:])


def test_a_smaller_capacity_names_the_fewest_slots_and_never_hands_them_out_again(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    slab.free_many([slot for slot in slots[:32] if slot & INDEX_MASK])  # two extents hold one slot each
    named = slab.resize(2 * EXTENT)
    assert len(named) == 2
    assert slab.allocate(SMALL) is None
    for slot in named:
        assert slab.reserved_bytes > 2 * EXTENT
        slab.free(slot)
        assert slab.allocate(SMALL) is None
    assert slab.reserved_bytes == 2 * EXTENT
    slab.check_integrity()


def test_slots_that_must_go_are_whole_until_they_go(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    for number, slot in enumerate(slots):
        slab.view(slot)[:] = number
    named = slab.resize(EXTENT)
    assert len(named) == 48
    assert all((slab.view(slot) == number).all() for number, slot in enumerate(slots))
    slab.free_many(named)
    assert slab.reserved_bytes == EXTENT


def test_a_capacity_that_grows_again_takes_back_what_was_to_go(slab: Slab) -> None:
    slots = fill(slab, SMALL)
    named = slab.resize(0)
    assert sorted(named) == sorted(slots)
    slab.free_many(named[:8])
    assert slab.allocate(SMALL) is None
    assert slab.resize(4 * EXTENT) == []
    assert len(fill(slab, SMALL)) == 8
    slab.check_integrity()


def test_a_resize_ends_what_was_held_back_for_a_size(slab: Slab) -> None:
    scattered(slab, holes=6)
    occupied = slab.movable_extent(LARGE)
    assert occupied
    named = slab.resize(3 * EXTENT)
    slab.check_integrity()
    slab.free_many(named)
    slab.check_integrity()
    assert slab.reserved_bytes == 3 * EXTENT


# --- prefault --------------------------------------------------------------------------------------------------------


def test_prefaulted_extents_are_for_any_size_and_stop_at_the_capacity(slab: Slab) -> None:
    touched = [slab.prefault_extent(never) for _ in range(6)]
    assert touched == [EXTENT] * 4 + [0, 0]
    assert slab.reserved_bytes == slab.capacity_bytes
    assert (len(slab.allocate_many(SMALL, 32)), len(fill(slab, LARGE))) == (32, 2)
    assert slab.stats().mapped == 0
    slab.check_integrity()


def test_prefaulting_ends_where_it_is_stopped() -> None:
    slab = Slab(64 << 20, extent_bytes=32 << 20)
    answers = iter([False, False, False, True])
    assert slab.prefault_extent(lambda: next(answers)) == 16 << 20
    assert slab.reserved_bytes == 32 << 20
    assert slab.prefault_extent(lambda: True) == 0
    assert slab.reserved_bytes == 32 << 20
    slab.check_integrity()
    slab.close()


def test_what_is_being_prefaulted_is_not_kept_when_the_capacity_shrinks_meanwhile(slab: Slab) -> None:
    held = slab.allocate_many(SMALL, 32)
    named: list[list[int]] = []

    def stopped() -> bool:
        if slab.reserved_bytes == 3 * EXTENT and not named:
            named.append(slab.resize(2 * EXTENT))
            slab.check_integrity()
        return False

    slab.prefault_extent(stopped)
    assert named == [[]], "no slot has to go for it"
    assert slab.reserved_bytes == 2 * EXTENT
    assert all(slab.slot_bytes(slot) == SMALL for slot in held)
    slab.check_integrity()


def test_closing_while_an_extent_is_prefaulted_leaves_nothing_behind() -> None:
    slab = Slab(4 * EXTENT, extent_bytes=EXTENT)
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(slab.reserved_bytes)
        if len(asked) == 2:
            slab.close()
        return False

    slab.prefault_extent(stopped)
    assert asked == [0, EXTENT]
    assert slab.reserved_bytes == 0
    slab.check_integrity()


# --- close -----------------------------------------------------------------------------------------------------------


def test_after_close_there_is_nothing_to_be_had_and_freeing_does_nothing(slab: Slab) -> None:
    slot, other = slab.allocate_many(SMALL, 2)
    slab.close()
    slab.close()
    assert slab.allocate(SMALL) is None
    assert slab.allocate_many(SMALL, 3) == []
    assert slab.resize(1 << 20) == []
    assert slab.capacity_bytes == slab.reserved_bytes == slab.used_bytes == 0
    assert slab.sparse_extent(SMALL) is None
    slab.free(slot)
    slab.free_many([other, slot])
    with pytest.raises(ValueError, match="not in use"):
        slab.view(slot)
    slab.check_integrity()


def test_a_view_that_outlives_the_slab_keeps_its_bytes(slab: Slab) -> None:
    slot = slab.allocate(LARGE)
    assert slot is not None
    view = slab.view(slot)
    view[:] = 42
    slab.close()
    other = Slab(4 * EXTENT)
    for fresh in fill(other, SMALL):
        other.view(fresh)[:] = 1
    assert (view == 42).all()
    view[:] = 43
    assert (view == 43).all()
    other.close()


# --- threads and signals ---------------------------------------------------------------------------------------------


class Worker(threading.Thread):
    """Holds slots of several sizes, each filled with a byte of its own, and looks after them."""

    def __init__(self, slab: Slab, number: int, steps: int, start: threading.Barrier) -> None:
        super().__init__()
        self.slab = slab
        self.number = number
        self.steps = steps
        self.barrier = start
        self.held: dict[int, int] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        self.barrier.wait()
        try:
            self.work(Random(self.number))
        except BaseException as failure:
            self.failure = failure
            raise

    def work(self, random: Random) -> None:
        for step in range(self.steps):
            slot_bytes = random.choice((SMALL, 2 * SMALL, MEDIUM, LARGE))
            for slot in self.slab.allocate_many(slot_bytes, random.choice((1, 1, 3))) or self.make_room(slot_bytes):
                assert slot not in self.held
                self.held[slot] = (self.number * 61 + step) % 256
                self.slab.view(slot)[:] = self.held[slot]
            if self.held and random.random() < 0.6:
                self.give_back(random.choice(list(self.held)))

    def make_room(self, slot_bytes: int) -> list[int]:
        """Whatever has to go of this thread's own; others keep theirs, so that it may not be enough."""
        occupied = self.slab.sparse_extent(slot_bytes) or []
        for slot in set(occupied) & set(self.held):
            size = self.slab.slot_bytes(slot)
            assert size is not None
            fresh = self.slab.allocate(size)
            if fresh is not None:
                np.copyto(self.slab.view(fresh), self.slab.view(slot))
                self.held[fresh] = self.held[slot]
            self.give_back(slot)
        self.slab.cancel_claim(slot_bytes)
        return []

    def give_back(self, slot: int) -> None:
        assert (self.slab.view(slot) == self.held[slot]).all(), "nobody else writes into a slot in use"
        del self.held[slot]
        self.slab.free(slot)


def test_threads_never_share_a_slot_and_never_lose_one() -> None:
    slab = Slab(16 * EXTENT, extent_bytes=EXTENT)
    barrier = threading.Barrier(5)
    workers = [Worker(slab, number, 1500, barrier) for number in range(4)]
    for worker in workers:
        worker.start()
    barrier.wait()
    for capacity in cycle((16, 10, 13)):
        slab.resize(capacity * EXTENT)
        slab.prefault_extent(never)
        slab.check_integrity()
        if not any(worker.is_alive() for worker in workers):
            break
    for worker in workers:
        worker.join()
        assert worker.failure is None
    for worker in workers:
        for slot in list(worker.held):
            worker.give_back(slot)
    slab.resize(16 * EXTENT)
    slab.check_integrity()
    assert slab.used_bytes == 0
    assert len(fill(slab, SMALL)) == 256


class InterruptError(Exception):
    """What Ctrl-C raises, anywhere in the main thread."""


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"),
    reason="signals are delivered to the main thread only",
)
def test_an_interrupt_at_any_moment_never_leaves_the_slab_locked() -> None:
    armed = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if armed:
            raise InterruptError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        for _ in range(400):
            slab = Slab(16 * EXTENT, extent_bytes=EXTENT)
            try:
                armed = True
                while True:
                    slot = slab.allocate(SMALL)
                    if slot is not None:
                        slab.free(slot)
            except InterruptError:
                armed = False
            other = threading.Thread(target=slab.allocate_many, args=(SMALL, 8), daemon=True)
            other.start()
            other.join(timeout=10)
            assert not other.is_alive(), "the lock is taken for good"
            assert slab.allocate(SMALL) is not None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_extent_whose_memory_somebody_looks_at_still_is_used_whole_by_a_smaller_size() -> None:
    slab = Slab(12 * PAGE_BYTES, extent_bytes=PAGE_BYTES)
    [large] = slab.allocate_many(12 * PAGE_BYTES, 2)
    view = slab.view(large)
    slab.free(large)
    assert len(slab.allocate_many(PAGE_BYTES, 20)) == 12
    assert len(view) == 12 * PAGE_BYTES
    slab.check_integrity()

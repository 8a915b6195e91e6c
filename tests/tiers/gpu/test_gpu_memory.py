"""Device memory: it starts small, grows to the capacity, and is given back, whatever the device has to give."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.errors import InputError
from kvpool.tiers.gpu.cpu import CpuDevice
from kvpool.tiers.gpu.device import Device
from kvpool.tiers.gpu.memory import FIRST_PAUSE_S, LAST_PAUSE_S
from kvpool.tiers.gpu.tier import GpuTier
from tests.clock import Clock
from tests.tiers.conformance import holds, records_of

from .devices import REAL_DEVICES, FullDevice

MIB = 1 << 20
SLOT = 16 * PAGE_BYTES


def tier_on(
    device: Device, capacity_bytes: int = 8 * MIB, *, initial_bytes: int = 0, margin_bytes: int = 0,
    clock: Callable[[], float] | None = None,
) -> GpuTier:  # fmt: skip
    return GpuTier(
        capacity_bytes, device=device, initial_bytes=initial_bytes, extent_bytes=MIB, margin_bytes=margin_bytes,
        clock=clock or Clock(),
    )  # fmt: skip


# --- growing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_device", REAL_DEVICES)
def test_it_starts_at_its_initial_size_and_grows_in_extents_to_its_capacity(make_device: Callable[[], Device]) -> None:
    tier = tier_on(make_device(), initial_bytes=3 * MIB)
    assert (tier.stats().reserved_bytes, tier.stats().extents) == (3 * MIB, 3)
    assert tier.used_bytes == 0
    reserved = []
    while tier.allocate(SLOT, "a") is not None:
        reserved.append(tier.stats().reserved_bytes)
    assert sorted(set(reserved)) == [extents * MIB for extents in range(3, 9)]
    assert tier.used_bytes == tier.capacity_bytes == 8 * MIB
    tier.slab.check_integrity()
    tier.close()


def test_what_is_taken_at_start_serves_blocks_of_any_size() -> None:
    device = FullDevice(8 * MIB)
    tier = tier_on(device, initial_bytes=8 * MIB)
    for pages in (1, 7, 100, 256):
        places = tier.allocate_many(pages * PAGE_BYTES, 10_000, "a")
        assert len(places) == 8 * (256 // pages)
        tier.drop(places)
    assert (tier.stats().grown, tier.stats().given_back, device.attempts) == (8, 0, 8)
    tier.close()


def test_a_block_larger_than_an_extent_is_an_extent_of_its_own() -> None:
    tier = tier_on(FullDevice(8 * MIB), initial_bytes=8 * MIB)
    place = tier.allocate(5 * MIB, "a")
    assert place is not None
    assert tier.record(place).numel() == 5 * MIB
    assert tier.stats().reserved_bytes <= 8 * MIB
    tier.slab.check_integrity()
    tier.close()


def test_slots_are_served_from_memory_that_is_there() -> None:
    tier = tier_on(CpuDevice())
    for turn in range(50):
        places = tier.allocate_many(SLOT, 40, f"owner {turn}")
        tier.drop(places)
    stats = tier.stats()
    assert stats.handed_out == 2000
    assert stats.grown == 3
    assert stats.reused_share == pytest.approx(1 - 3 / 2000)
    tier.close()


def test_a_size_that_is_not_whole_pages_is_refused() -> None:
    tier = tier_on(CpuDevice())
    with pytest.raises(InputError, match="multiples of 4096"):
        tier.allocate(PAGE_BYTES + 1, "a")
    tier.close()


# --- out of memory ----------------------------------------------------------------------------------------------------


def test_a_device_that_has_no_more_to_give_is_no_room_and_what_was_stored_stays_valid() -> None:
    tier = tier_on(FullDevice(3 * MIB))
    records = records_of(60, SLOT - PAGE_BYTES)
    places = tier.put(records)
    stored = [(place, record) for place, record in zip(places, records, strict=True) if place is not None]
    assert 0 < len(stored) == 3 * (MIB // SLOT) < len(records)
    assert all(holds(tier, place, record) for place, record in stored)
    assert tier.allocate(SLOT, "a") is None
    assert tier.allocate_many(SLOT, 3, "a") == []
    assert tier.stats().out_of_memory == 1
    tier.slab.check_integrity()
    tier.close()


def test_a_tier_that_cannot_have_its_initial_size_has_what_there_is() -> None:
    tier = tier_on(FullDevice(2 * MIB + 5), initial_bytes=4 * MIB)
    assert tier.stats().reserved_bytes == 2 * MIB
    assert len(tier.allocate_many(SLOT, 1000, "a")) == 2 * (MIB // SLOT)
    tier.close()


def test_a_full_device_is_not_asked_again_until_a_pause_that_doubles_is_over() -> None:
    device, clock = FullDevice(MIB), Clock()
    tier = tier_on(device, clock=clock)
    assert len(tier.allocate_many(SLOT, 1000, "a")) == MIB // SLOT
    pause_s = FIRST_PAUSE_S
    for attempts in range(2, 16):
        assert tier.allocate(SLOT, "a") is None
        assert device.attempts == attempts, "no attempt while it pauses"
        clock.now_s += 0.99 * pause_s
        assert tier.allocate(SLOT, "a") is None
        assert device.attempts == attempts
        clock.now_s += 0.02 * pause_s
        pause_s = min(2 * pause_s, LAST_PAUSE_S)
        assert tier.allocate(SLOT, "a") is None
    device.room_bytes = 8 * MIB
    clock.now_s += LAST_PAUSE_S
    assert tier.allocate(SLOT, "a") is not None
    tier.close()


def test_growing_leaves_a_margin_to_the_engine() -> None:
    class Counting(FullDevice):
        def available_bytes(self) -> int:
            return self.room_bytes - self.allocated_bytes

    device = Counting(6 * MIB)
    tier = tier_on(device, margin_bytes=2 * MIB + 1)
    assert len(tier.allocate_many(SLOT, 1000, "a")) == 3 * (MIB // SLOT)
    assert device.attempts == 3, "the device itself never failed"
    tier.close()


def test_when_the_engine_is_out_of_memory_extents_are_given_back_and_kept_out_for_a_while() -> None:
    device, clock = FullDevice(8 * MIB), Clock()
    tier = tier_on(device, clock=clock)
    places = tier.allocate_many(SLOT, 1000, "a")
    tier.drop(places[: MIB // SLOT])
    named = tier.give_back(3 * MIB)
    assert device.allocated_bytes == 7 * MIB, "what nobody used is given back at once"
    assert len(named) == 2 * (MIB // SLOT)
    assert tier.give_back(0) == named, "asking again names the same places, and takes no more"
    tier.drop(named)
    assert device.allocated_bytes == 5 * MIB
    assert (tier.usable_bytes, tier.capacity_bytes) == (5 * MIB, 8 * MIB)
    assert tier.allocate_many(SLOT, 1000, "a") == []
    clock.now_s += LAST_PAUSE_S + 0.01
    assert len(tier.allocate_many(SLOT, 1000, "a")) == 3 * (MIB // SLOT), "it grows again afterwards"
    assert tier.usable_bytes == tier.capacity_bytes
    tier.close()


def test_giving_back_more_than_there_is_leaves_nothing() -> None:
    device = FullDevice(8 * MIB)
    tier = tier_on(device, initial_bytes=2 * MIB)
    assert tier.give_back(100 * MIB) == []
    assert device.allocated_bytes == 0
    assert tier.allocate(SLOT, "a") is None
    tier.close()


# --- given back -------------------------------------------------------------------------------------------------------


def test_a_smaller_capacity_names_what_must_go_and_gives_memory_back() -> None:
    device = FullDevice(8 * MIB)
    tier = tier_on(device)
    places = tier.allocate_many(SLOT, 1000, "a")
    named = tier.resize(3 * MIB)
    assert len(named) == 5 * (MIB // SLOT)
    tier.drop(named)
    assert device.allocated_bytes == 3 * MIB
    assert tier.capacity_bytes == tier.usable_bytes == tier.used_bytes == 3 * MIB
    assert all(tier.record(place).numel() == SLOT for place in set(places) - set(named))
    tier.resize(4 * MIB)
    assert len(tier.allocate_many(SLOT, 1000, "a")) == MIB // SLOT
    tier.slab.check_integrity()
    tier.close()


@pytest.mark.parametrize("make_device", REAL_DEVICES)
def test_no_tensor_of_the_tier_outlives_its_close(make_device: Callable[[], Device]) -> None:
    tier = tier_on(make_device(), initial_bytes=2 * MIB)
    records = records_of(40, SLOT - PAGE_BYTES)
    places = [place for place in tier.put(records) if place is not None]
    assert holds(tier, places[0], records[0])
    tensors = [weakref.ref(tier.record(place)) for place in places]
    tensors += [weakref.ref(tier.payload(place)) for place in places]
    storages = [weakref.ref(tier.record(place).untyped_storage()) for place in places]
    staging = weakref.ref(tier._transfers.staging)
    tier.close()
    gc.collect()
    assert not any(ref() for ref in tensors + storages)
    assert tier.stats().staging_bytes == tier.stats().reserved_bytes == 0
    del tier
    gc.collect()
    assert staging() is None


def test_closing_gives_all_memory_back_but_what_a_view_still_shows() -> None:
    device = FullDevice(8 * MIB)
    tier = tier_on(device)
    [place, *_] = tier.put(records_of(1, SLOT - PAGE_BYTES))
    assert place is not None
    tier.allocate_many(SLOT, 100, "a")
    view = tier.payload(place)
    expected = view.clone()
    tier.close()
    gc.collect()
    assert device.allocated_bytes == MIB
    assert torch.equal(view, expected)
    del view
    gc.collect()
    assert device.allocated_bytes == 0


def test_statistics_are_plain_numbers_that_add_up() -> None:
    tier = tier_on(CpuDevice())
    places = tier.allocate_many(SLOT, 20, "a")
    tier.drop(places[:3])
    stats = tier.stats()
    assert stats.used_bytes == tier.used_bytes == 17 * SLOT
    assert stats.used_bytes + stats.stranded_bytes <= stats.reserved_bytes <= stats.usable_bytes <= stats.capacity_bytes
    traffic = {"transfers": 0, "copied_bytes": 0}
    assert asdict(stats)["uploads"] == asdict(stats)["downloads"] == traffic
    tier.close()

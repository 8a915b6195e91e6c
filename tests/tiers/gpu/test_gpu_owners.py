"""Whose bytes: nobody is handed a slot that shows another's, whatever happened to the memory before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.gpu.device import Device
from kvpool.tiers.gpu.tier import GpuTier
from tests.tiers.conformance import records_of

from .devices import EVERY_DEVICE, GARBAGE, LateDevice

MIB = 1 << 20
SLOT = 4 * PAGE_BYTES


def small_tier(device: Device) -> GpuTier:
    """16 slots in four extents."""
    return GpuTier(16 * SLOT, device=device, extent_bytes=4 * SLOT, margin_bytes=0, streams=2)


def seen(tier: GpuTier, place: int) -> set[int]:
    """The bytes that whoever holds the place reads there on the engine's stream."""
    device = tier._device
    record = tier.record(place)
    if isinstance(device, LateDevice):
        read: list[torch.Tensor] = []
        device.queue(device.engine_stream, lambda: read.append(record.clone()))
        device.run()
        [record] = read
    return set(record.cpu().numpy().tolist())


def scribble(tier: GpuTier, place: int, byte: int) -> None:
    """What the engine writes there."""
    device = tier._device
    record = tier.record(place)
    if isinstance(device, LateDevice):
        device.queue(device.engine_stream, lambda: record.fill_(byte))
    else:
        record.fill_(byte)


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_fresh_device_memory_shows_nothing(make_device: Callable[[], Device]) -> None:
    tier = small_tier(make_device())
    assert all(seen(tier, place) == {0} for place in tier.allocate_many(SLOT, 100, "a"))
    tier.close()


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_a_slot_that_changes_hands_is_cleared(make_device: Callable[[], Device]) -> None:
    tier = small_tier(make_device())
    places = tier.allocate_many(SLOT, 16, "a")
    for place in places:
        scribble(tier, place, 7)
    tier.drop(places)
    others = tier.allocate_many(SLOT, 16, "b")
    assert set(others) == set(places)
    assert tier.stats().cleared == 16
    assert all(seen(tier, place) == {0} for place in others)
    tier.close()


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_an_owner_gets_its_own_slot_back_without_clearing(make_device: Callable[[], Device]) -> None:
    tier = small_tier(make_device())
    places = tier.allocate_many(SLOT, 16, ("model", "tenant"))
    for place in places:
        scribble(tier, place, 7)
    tier.drop(places)
    again = tier.allocate_many(SLOT, 16, ("model", "tenant"))
    assert all(seen(tier, place) == {7} for place in again)
    assert tier.stats().cleared == 0
    tier.close()


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_an_extent_that_is_cut_for_another_size_is_cleared_whole(make_device: Callable[[], Device]) -> None:
    tier = small_tier(make_device())
    places = tier.allocate_many(SLOT, 16, "a")
    for place in places:
        scribble(tier, place, 7)
    tier.drop(places)
    halves = tier.allocate_many(SLOT // 2, 100, "a")
    assert len(halves) == 32
    assert all(seen(tier, place) == {0} for place in halves)
    tier.close()


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_what_was_put_is_anybodys_and_shown_to_nobody(make_device: Callable[[], Device]) -> None:
    tier = small_tier(make_device())
    places = [place for place in tier.put(records_of(16, SLOT - PAGE_BYTES)) if place is not None]
    tier.drop(places)
    again = tier.allocate_many(SLOT, 16, "a")
    assert len(again) == 16
    assert all(seen(tier, place) == {0} for place in again)
    tier.close()


def test_a_record_overwrites_its_slot_from_end_to_end() -> None:
    tier = small_tier(LateDevice(seed=1))
    places = tier.allocate_many(SLOT, 16, "a")
    for place in places:
        scribble(tier, place, GARBAGE)
    tier.drop(places)
    records = records_of(16, SLOT - PAGE_BYTES - 100)
    stored = tier.put(records)
    buffers = [np.empty(SLOT, np.uint8) for _ in records]
    assert tier.get([place for place in stored if place is not None], buffers) == [True] * 16
    assert all(np.array_equal(buffer, record) for buffer, record in zip(buffers, records, strict=True))
    tier.close()


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([1, 2, 4, 8]), st.integers(1, 12), st.integers(0, 5)),
        min_size=2,
        max_size=12,
    ),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_before_nobody_reads_anothers_bytes(turns: list[tuple[str, int, int, int]], seed: int) -> None:
    """The clearing comes after the former owner's last write, and before the new one's first read."""
    device = LateDevice(seed=seed)
    tier = small_tier(device)
    marks = {"a": 11, "b": 22, "c": 33}
    held: list[int] = []
    found: list[tuple[str, set[int]]] = []

    def use(owner: str, record: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        found.append((owner, set(record.tolist())))
        record.fill(marks[owner])

    for owner, pages, count, kept in turns:
        tier.drop(held[kept:])
        del held[kept:]
        places = tier.allocate_many(pages * PAGE_BYTES, count, owner)
        for place in places:
            device.queue(device.engine_stream, partial(use, owner, tier.record(place).numpy()))
        held += places
    device.run()
    assert all(bytes_read <= {0, marks[owner]} for owner, bytes_read in found)
    tier.close()

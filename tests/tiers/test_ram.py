"""The ram tier's own rules: zero copy, whose bytes a place shows, memory touched ahead and given back."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest

from kvpool.blocks.layout import PAGE_BYTES, padded
from kvpool.blocks.record import check_payload, read_head, seal
from kvpool.errors import InputError
from kvpool.tiers.extents import INDEX_MASK, SLOT_BITS
from kvpool.tiers.host_memory import UNKNOWN
from kvpool.tiers.ram import PREFAULT_MARGIN_BYTES, RamTier, region_of
from kvpool.tiers.tier import LocalTier

from .conformance import head_of, record_of

MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[RamTier]:
    ram = RamTier(4 * MIB)
    yield ram
    ram.close()


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def prefaulted(ram: RamTier) -> RamTier:
    """Start it, and wait for its end."""
    ram.start_prefault()
    for thread in threading.enumerate():
        if thread.name == "kvpool-prefault":
            thread.join(timeout=60)
            assert not thread.is_alive()
    return ram


def plenty() -> int:
    return UNKNOWN


# --- places -----------------------------------------------------------------------------------------------------------


def test_it_is_a_local_tier(ram: RamTier) -> None:
    tier: LocalTier = ram
    assert tier.name == "ram"


def test_a_block_is_written_into_its_place_and_read_there_without_a_copy(ram: RamTier) -> None:
    head = head_of(1, 5000)
    place = ram.allocate(head.record_bytes)
    assert place is not None
    record = ram.record(place)
    record[PAGE_BYTES : PAGE_BYTES + head.payload_bytes] = record_of(1, 5000)[PAGE_BYTES : PAGE_BYTES + 5000]
    seal(record, head)
    again = ram.record(place)
    assert np.shares_memory(record, again)
    assert again.nbytes == head.record_bytes
    assert np.array_equal(again, record_of(1, 5000))


def test_a_place_is_page_aligned_so_that_the_disk_can_write_it_directly(ram: RamTier) -> None:
    for place in ram.allocate_many(5 * PAGE_BYTES, 20):
        assert ram.record(place).ctypes.data % mmap.PAGESIZE == 0


def test_a_place_says_which_extent_it_lies_in(ram: RamTier) -> None:
    places = ram.allocate_many(PAGE_BYTES, 1024)
    regions = {region_of(place) for place in places}
    assert len(regions) == ram.stats().extents == 64
    assert all(place == region_of(place) << SLOT_BITS | place & INDEX_MASK for place in places)
    assert max(places) < 1 << 63


def test_a_sealed_record_shows_nothing_of_its_places_last_owner(ram: RamTier) -> None:
    secret = ram.allocate_many(2 * PAGE_BYTES, 512)
    for used in secret:
        ram.record(used)[:] = 0xAB
    ram.drop(secret)
    head = head_of(3, 100)
    place = ram.allocate(head.record_bytes)
    assert place is not None
    record = ram.record(place)
    assert (record == 0xAB).any(), "the place was used before"
    record[PAGE_BYTES : PAGE_BYTES + 100] = 7
    seal(record, head)
    assert not record[PAGE_BYTES + 100 :].any()
    check_payload(record, read_head(record))
    [other] = ram.put([record_of(5, 100)])
    assert other is not None
    assert np.array_equal(ram.record(other), record_of(5, 100))


def test_a_place_that_was_dropped_shows_nothing(ram: RamTier) -> None:
    place, other = ram.allocate_many(PAGE_BYTES, 2)
    ram.drop([place])
    with pytest.raises(ValueError, match="not in use"):
        ram.record(place)
    ram.close()
    with pytest.raises(ValueError, match="not in use"):
        ram.record(other)


def test_a_size_that_is_not_whole_pages_is_refused(ram: RamTier) -> None:
    with pytest.raises(InputError):
        ram.allocate(PAGE_BYTES + 1)
    with pytest.raises(ValueError, match="whole pages"):
        ram.put([bytes(PAGE_BYTES + 1)])
    with pytest.raises(ValueError, match="whole pages"):
        ram.put([b""])
    assert ram.used_bytes == 0


def test_a_record_is_never_copied_into_a_buffer_that_cannot_be_written(ram: RamTier) -> None:
    record = record_of(1, 100)
    [place] = ram.put([record])
    assert place is not None
    fine = np.zeros(record.nbytes, np.uint8)
    with pytest.raises(ValueError, match="cannot be written"):
        ram.get([place, place], [fine, bytes(record.nbytes)])
    assert not fine.any()


def test_a_view_that_outlives_the_tier_keeps_its_bytes(ram: RamTier) -> None:
    [place] = ram.put([record_of(9, 60_000)])
    assert place is not None
    view = ram.record(place)
    ram.close()
    assert np.array_equal(view, record_of(9, 60_000))


def test_dropping_after_close_does_nothing_so_that_late_leases_may_end(ram: RamTier) -> None:
    places = ram.allocate_many(PAGE_BYTES, 3)
    ram.close()
    ram.drop(places)
    assert ram.allocate(PAGE_BYTES) is None
    assert ram.allocate_many(PAGE_BYTES, 2) == []


def test_statistics_are_plain_numbers_that_add_up(ram: RamTier) -> None:
    places = ram.allocate_many(padded(60_000), 20)
    ram.drop(places[:3])
    stats = ram.stats()
    assert stats.used_bytes == ram.used_bytes == 17 * padded(60_000)
    assert stats.used_bytes + stats.stranded_bytes <= stats.reserved_bytes <= stats.capacity_bytes == 4 * MIB
    assert stats.prefaulted_bytes == 0
    assert all(type(value) in (int, bool) for value in asdict(stats).values())


# --- memory that is touched ahead -------------------------------------------------------------------------------------


def test_memory_is_touched_up_to_the_capacity_and_no_further() -> None:
    before = resident_bytes()
    ram = prefaulted(RamTier(128 * MIB, available_memory=plenty))
    stats = ram.stats()
    assert stats.prefaulted_bytes == stats.reserved_bytes == 128 * MIB
    assert resident_bytes() - before > 100 * MIB
    assert len(ram.allocate_many(MIB, 200)) == 128
    assert ram.slab.stats().mapped == 0
    ram.close()
    assert resident_bytes() - before < 32 * MIB


def test_nothing_runs_once_the_memory_was_touched() -> None:
    ram = prefaulted(RamTier(8 * MIB, available_memory=plenty))
    assert "kvpool-prefault" not in {thread.name for thread in threading.enumerate()}
    ram.start_prefault()
    prefaulted(ram)
    assert ram.stats().prefaulted_bytes == 8 * MIB
    ram.close()


def test_more_memory_is_touched_after_the_capacity_grew() -> None:
    ram = prefaulted(RamTier(8 * MIB, available_memory=plenty))
    ram.resize(12 * MIB)
    prefaulted(ram)
    assert ram.stats().prefaulted_bytes == ram.stats().reserved_bytes == 12 * MIB
    ram.close()


def test_touching_stops_where_the_machine_has_not_enough_memory() -> None:
    before = resident_bytes()
    ram = RamTier(256 * MIB, available_memory=lambda: PREFAULT_MARGIN_BYTES + 64 * MIB - (resident_bytes() - before))
    prefaulted(ram)
    assert 40 * MIB < ram.stats().prefaulted_bytes <= 64 * MIB
    assert ram.allocate(200 * MIB) is not None, "the rest can be used all the same"
    ram.close()


def test_nothing_is_touched_where_there_is_no_memory_to_spare() -> None:
    ram = prefaulted(RamTier(64 * MIB, available_memory=lambda: PREFAULT_MARGIN_BYTES))
    assert ram.stats().prefaulted_bytes == ram.stats().reserved_bytes == 0
    ram.close()


def test_closing_stops_the_touching() -> None:
    asked = threading.Semaphore(0)
    steps = 0

    def available() -> int:
        nonlocal steps
        steps += 1
        asked.release()
        return UNKNOWN

    ram = RamTier(1 << 40, extent_bytes=8 * MIB, available_memory=available)
    ram.start_prefault()
    for _ in range(4):
        asked.acquire()
    ram.close()
    touched = ram.stats().prefaulted_bytes
    assert touched <= steps * 8 * MIB < 1 << 40
    assert ram.stats().reserved_bytes == 0
    ram.start_prefault()
    assert prefaulted(ram).stats().prefaulted_bytes == touched


def test_blocks_can_be_stored_while_memory_is_touched() -> None:
    ram = RamTier(64 * MIB, available_memory=plenty)
    ram.start_prefault()
    records = [record_of(number, 200_000) for number in range(100)]
    places = ram.put(records)
    prefaulted(ram)
    assert all(
        place is not None and np.array_equal(ram.record(place), record)
        for place, record in zip(places, records, strict=True)
    )
    assert ram.stats().reserved_bytes <= 64 * MIB
    ram.slab.check_integrity()
    ram.close()


def test_huge_pages_are_asked_for_only_where_the_kernel_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    allowed = setting.exists() and "[never]" not in setting.read_text()
    ram = prefaulted(RamTier(8 * MIB, huge_pages=True, available_memory=plenty))
    assert ram.stats().huge_pages == allowed
    [place] = ram.put([record_of(1, 3 * MIB)])
    assert place is not None
    assert np.array_equal(ram.record(place), record_of(1, 3 * MIB))
    ram.close()
    assert not RamTier(0).stats().huge_pages


def test_prompts_are_left_out_of_core_dumps(ram: RamTier) -> None:
    place = ram.allocate(64 * 1024)
    assert place is not None
    assert "dd" in vm_flags(ram.record(place).ctypes.data)
    ram.drop([place])
    place = ram.allocate(2 * MIB)
    assert place is not None
    assert "dd" in vm_flags(ram.record(place).ctypes.data), "memory that was cut anew, too"


def vm_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    raise AssertionError("the address is not mapped")


# --- memory that is given back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vacate", [RamTier.drop, None], ids=["dropped", "never used"])
def test_a_smaller_capacity_really_gives_memory_back(vacate: Callable[[RamTier, list[int]], None] | None) -> None:
    before = resident_bytes()
    ram = prefaulted(RamTier(256 * MIB, available_memory=plenty))
    places = ram.allocate_many(MIB, 1000) if vacate else []
    for place in places:
        ram.record(place)[:] = 1
    assert resident_bytes() - before > 220 * MIB
    named = ram.resize(64 * MIB)
    if vacate:
        assert len(named) == 192
        assert resident_bytes() - before > 220 * MIB, "nothing is taken from a place in use"
        vacate(ram, named)
    assert ram.stats().reserved_bytes <= 64 * MIB
    assert resident_bytes() - before < 96 * MIB
    assert all((ram.record(place) == 1).all() for place in set(places) - set(named))
    ram.close()
    assert resident_bytes() - before < 32 * MIB

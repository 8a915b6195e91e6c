"""Page-locked memory of the ram tier: what was touched is locked, what is locked never moves, and goes unlocked."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.host_memory import UNKNOWN
from kvpool.tiers.ram import RamTier

from .conformance import holds, put, records_of

MIB = 1 << 20


class PageTable:
    """Keeps the books of locked ranges as a driver does, up to `max_bytes`."""

    def __init__(self, max_bytes: int = UNKNOWN) -> None:
        self.max_bytes = max_bytes
        self.locked: dict[int, int] = {}

    def lock(self, address: int, nbytes: int) -> bool:
        assert nbytes % PAGE_BYTES == address % PAGE_BYTES == 0
        assert address not in self.locked, "locked once"
        fits = sum(self.locked.values()) + nbytes <= self.max_bytes
        if fits:
            self.locked[address] = nbytes
        return fits

    def unlock(self, address: int) -> None:
        del self.locked[address]

    def covers(self, view: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> bool:
        first = view.ctypes.data
        return any(at <= first and first + view.nbytes <= at + nbytes for at, nbytes in self.locked.items())


def prefaulted(table: PageTable, capacity_bytes: int = 8 * MIB) -> RamTier:
    ram = RamTier(capacity_bytes, extent_bytes=MIB, available_memory=lambda: UNKNOWN, page_lock=table)
    ram.start_prefault()
    for thread in threading.enumerate():
        if thread.name == "kvpool-prefault":
            thread.join(timeout=60)
    return ram


def test_what_was_touched_is_locked_until_the_tier_closes() -> None:
    table = PageTable()
    ram = prefaulted(table)
    assert sum(table.locked.values()) == 8 * MIB
    assert all(table.covers(ram.record(place)) for place in ram.allocate_many(100 * PAGE_BYTES, 40))
    ram.close()
    assert table.locked == {}


def test_memory_that_was_not_touched_is_not_locked() -> None:
    table = PageTable()
    ram = RamTier(8 * MIB, page_lock=table)
    assert ram.allocate(MIB) is not None
    assert table.locked == {}
    ram.close()


def test_locked_memory_is_cut_for_other_sizes_but_never_moved() -> None:
    table = PageTable()
    ram = prefaulted(table)
    before = dict(table.locked)
    for pages in (3, 100, 7, 256):
        places = ram.allocate_many(pages * PAGE_BYTES, 10_000)
        assert len(places) == 8 * (256 // pages), "an extent holds as many as fit"
        assert all(table.covers(ram.record(place)) for place in places)
        ram.drop(places)
    assert table.locked == before
    ram.slab.check_integrity()
    ram.close()


def test_a_record_larger_than_a_locked_extent_gets_memory_that_is_not_locked() -> None:
    table = PageTable()
    ram = prefaulted(table)
    records = records_of(1, 3 * MIB)
    [place] = put(ram, records)
    assert not table.covers(ram.record(place))
    assert holds(ram, place, records[0])
    assert sum(table.locked.values()) <= 8 * MIB - records[0].nbytes
    ram.close()
    assert table.locked == {}


@pytest.mark.parametrize("max_bytes", [0, 3 * MIB])
def test_where_locking_is_refused_the_memory_serves_all_the_same(max_bytes: int) -> None:
    table = PageTable(max_bytes)
    ram = prefaulted(table)
    assert sum(table.locked.values()) == max_bytes
    assert len(ram.allocate_many(MIB, 100)) == 8
    ram.close()
    assert table.locked == {}


def test_a_smaller_capacity_unlocks_what_it_gives_back() -> None:
    table = PageTable()
    ram = prefaulted(table)
    ram.resize(2 * MIB)
    assert sum(table.locked.values()) == 2 * MIB
    ram.close()

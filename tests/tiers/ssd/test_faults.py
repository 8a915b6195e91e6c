"""Every call to the disk goes wrong once, in every way, in the middle of all that a tier does.

A fault costs records, never truth: what comes back is what was stored, the capacity holds, and the tier goes on.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.segment import RecoveredRecord
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

from .disks import Fault, FaultyDisk, Plan, QuickDisk, from_the_nth_on, nothing, the_nth
from .records import all_recovered, is_record, read, records, sound

SEGMENT_BYTES = 10 * PAGE_BYTES
"""A header, four records of two pages, and a footer."""
CAPACITY_BYTES = 4 * PAGE_BYTES + 5 * SEGMENT_BYTES
DAILY_BYTES = 1 << 30
ALL_CALLS = {
    "make_directory", "names", "stat", "open", "open_lock", "lock", "close", "fallocate", "preadv", "pwritev",
    "fdatasync", "sync_directory", "rename", "unlink",
}  # fmt: skip
WHERE = {
    Fault.FAIL: ALL_CALLS,
    Fault.LATE: {"open", "fallocate", "pwritev", "fdatasync", "unlink"},
    Fault.SHORT: {"fallocate", "preadv", "pwritev"},
    Fault.TORN: {"fallocate", "preadv", "pwritev"},
}
"""The calls in which each fault is another one than to fail."""


def bytes_on_disk(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


@dataclass
class Life:
    """One tier's life on a disk that may fail: everything is tried, and what is stored is remembered."""

    directory: Path
    disk: FaultyDisk
    tier: SsdTier | None = None
    stored: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(model, number) by place."""
    failures: list[str] = field(default_factory=list)
    capacity_bytes: int = CAPACITY_BYTES
    number: int = 0

    def all_of_it(self) -> None:
        for _ in range(2):
            self.open()
            self.put(0, 4)
            self.put(1, 2)
            self.put(0, 5)
            self.read_all()
            self.drop_every_second()
            self.free(0)
            self.put(2, 2, guaranteed=True)
            self.put(1, 3, reclaim=True)
            self.attempt(lambda tier: tier.seal_all())
            self.resize(CAPACITY_BYTES - SEGMENT_BYTES)
            self.free(0)
            self.put(0, 2)
            self.resize(CAPACITY_BYTES)
            self.read_all()
            self.close()
        self.open()

    def attempt(self, action: Callable[[SsdTier], None]) -> None:
        if self.tier is None:
            self.open()
        if self.tier is None:
            return
        try:
            action(self.tier)
        except TierUnavailableError as error:
            self.failures.append(error.reason)
        assert self.tier.used_bytes <= CAPACITY_BYTES
        assert bytes_on_disk(self.directory) <= CAPACITY_BYTES

    def open(self) -> None:
        assert self.tier is None
        try:
            self.tier = SsdTier.open(
                self.directory, capacity_bytes=self.capacity_bytes, segment_bytes=SEGMENT_BYTES,
                daily_write_bytes=DAILY_BYTES, disk=self.disk,
            )  # fmt: skip
        except TierUnavailableError as error:
            self.failures.append(error.reason)
            return
        found = all_recovered(self.tier)
        self.stored = {record.place: (int(record.fingerprint[6:7]), record.depth) for record in found}
        self.attempt(lambda tier: self.sound(tier, found))

    def sound(self, tier: SsdTier, found: list[RecoveredRecord]) -> None:
        sound(tier, found)

    def put(self, model: int, count: int, *, guaranteed: bool = False, reclaim: bool = False) -> None:
        def action(tier: SsdTier) -> None:
            numbers = range(self.number, self.number + count)
            self.number += count
            places = tier.put(records(numbers, model=model), guaranteed=guaranteed, reclaim=reclaim)
            for number, place in zip(numbers, places, strict=True):
                if place is not None:
                    assert place not in self.stored
                    self.stored[place] = (model, number)

        self.attempt(action)

    def read_all(self) -> None:
        def action(tier: SsdTier) -> None:
            for place, (model, number) in self.stored.items():
                found = read(tier, place)
                assert found is None or is_record(found, number, model=model)

        self.attempt(action)

    def drop_every_second(self) -> None:
        def action(tier: SsdTier) -> None:
            places = list(self.stored)[::2]
            tier.drop(places)
            for place in places:
                del self.stored[place]

        self.attempt(action)

    def free(self, index: int) -> None:
        def action(tier: SsdTier) -> None:
            segments = [info.id for info in tier.segments() if info.sealed]
            if len(segments) > index:
                gone = tier.places_in(segments[index])
                for place in gone:
                    del self.stored[place]
                freed = False
                try:
                    freed = tier.free_segment(segments[index])
                finally:
                    assert tier.places_in(segments[index]) == []
                assert freed

        self.attempt(action)

    def resize(self, capacity_bytes: int) -> None:
        self.attempt(lambda tier: tier.resize(capacity_bytes))

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()
            assert self.disk.open_fds == set()
            self.tier = None

    def prove_usable(self) -> None:
        """Nothing fails any more: all that is stored comes, and more can be stored, now and after a restart."""
        for _ in range(2):
            self.attempt(lambda tier: None)
            assert self.tier is not None
            for place, (model, number) in self.stored.items():
                assert is_record(read(self.tier, place), number, model=model)
            for model in range(3):
                self.put_although_full(model)
            stored = sorted(self.stored.values())
            self.close()
            self.open()
            assert set(stored) <= set(self.stored.values())

    def put_although_full(self, model: int) -> None:
        for _ in range(8):
            before = len(self.stored)
            self.put(model, 1)
            if len(self.stored) > before:
                return
            assert self.tier is not None
            assert self.tier.wants_room()
            self.free(0)
        raise AssertionError("no room, although segments were freed")


def lived(directory: Path, plan: Plan, error: int) -> Life:
    life = Life(directory, FaultyDisk(QuickDisk(), plan, error))
    life.all_of_it()
    return life


def test_the_life_without_faults_does_all_that_it_says(tmp_path: Path) -> None:
    life = lived(tmp_path / "ssd", nothing, errno.EIO)
    assert life.failures == []
    assert set(life.disk.names_of_calls) == ALL_CALLS
    life.prove_usable()
    life.close()


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_in_any_call_costs_no_truth_no_room_and_no_later_call(quick_path: Path, fault: Fault) -> None:
    error = errno.ENOSPC if fault is Fault.FAIL else errno.EIO
    names = lived(quick_path / "whole", nothing, error).disk.names_of_calls
    numbers = [number for number, name in enumerate(names, start=1) if name in WHERE[fault]]
    assert len(numbers) > 50
    for number in numbers:
        life = lived(quick_path / str(number), the_nth(number, fault), error)
        life.disk.plan = nothing
        life.prove_usable()
        life.close()
        shutil.rmtree(life.directory)


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.LATE])
def test_a_disk_that_dies_at_any_call_and_is_back_later_is_used_again(quick_path: Path, fault: Fault) -> None:
    calls = lived(quick_path / "whole", nothing, errno.EIO).disk.calls
    for number in range(1, calls + 1, 4):
        life = lived(quick_path / str(number), from_the_nth_on(number, fault), errno.EIO)
        life.disk.plan = nothing
        life.prove_usable()
        life.close()
        shutil.rmtree(life.directory)

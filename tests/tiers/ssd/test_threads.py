"""Calls that meet: reads that stall and end late, closing under way, and threads that do everything at once."""

from __future__ import annotations

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.errors import DirectoryInUseError
from kvpool.tiers.ssd.place import segment_of
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

from .accounts import check_accounts
from .disks import FaultyDisk, QuickDisk, StallingDisk, every, nothing
from .records import all_recovered, is_record, put, read, records, sound

SEGMENT_BYTES = 10 * PAGE_BYTES
CAPACITY_BYTES = 4 * PAGE_BYTES + 8 * SEGMENT_BYTES
T = TypeVar("T")
PATIENCE_S = 60.0
"""How long a test waits for what must happen; nothing waits so long unless it hangs."""


def opened(directory: Path, disk: FaultyDisk | None = None) -> SsdTier:
    return SsdTier.open(directory, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, disk=disk or QuickDisk())


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def stalled(disk: StallingDisk, *names: str) -> None:
    """The next call of these names waits, and those that come meanwhile as well."""
    disk.stalled.clear()
    disk.go_on.clear()
    disk.stall = lambda name: name in names


def let_go(disk: StallingDisk) -> None:
    disk.stall = lambda name: False
    disk.go_on.set()


def result(future: Future[T]) -> T:
    return future.result(PATIENCE_S)


def test_a_read_that_stalls_writes_its_buffer_only_before_its_call_returns(
    quick_path: Path, threads: ThreadPoolExecutor
) -> None:
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    (place,) = put(tier, [1])
    buffer = aligned(2 * PAGE_BYTES)
    stalled(disk, "preadv")
    reading = threads.submit(tier.get, [place], [buffer])
    assert disk.stalled.wait(PATIENCE_S)
    assert not buffer.any()
    assert not reading.done()
    let_go(disk)
    assert result(reading) == [True]
    assert is_record(buffer, 1)
    buffer[:] = 7
    put(tier, range(2, 9))
    assert np.all(buffer == 7), "nobody writes there afterwards"
    tier.close()


def test_a_segment_that_is_read_is_neither_freed_nor_recycled(quick_path: Path, threads: ThreadPoolExecutor) -> None:
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    places = put(tier, range(4))
    tier.seal_all()
    buffer = aligned(2 * PAGE_BYTES)
    stalled(disk, "preadv")
    reading = threads.submit(tier.get, [places[1]], [buffer])
    assert disk.stalled.wait(PATIENCE_S)
    (info,) = tier.segments()
    assert info.readers == 1
    assert not tier.free_segment(info.id)
    tier.drop(places)  # nothing lives there, and still it is not taken
    put(tier, range(10, 10 + 4 * 6))
    assert tier.put(records([90])) == [None]
    let_go(disk)
    assert result(reading) == [True]
    assert is_record(buffer, 1)
    put(tier, [90])
    assert info.id not in {info.id for info in tier.segments()}
    tier.close()


def test_a_record_is_seen_by_nobody_before_its_write_ended(quick_path: Path, threads: ThreadPoolExecutor) -> None:
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    (first,) = put(tier, [1])
    stalled(disk, "pwritev")
    writing = threads.submit(tier.put, records([2]))
    assert disk.stalled.wait(PATIENCE_S)
    segment = segment_of(first)
    assert tier.places_in(segment) == [first]
    assert read(tier, first + (2 << 16)) is None
    with pytest.raises(ValueError, match="holds no record"):
        tier.drop([first + (2 << 16)])
    assert not tier.free_segment(segment)
    assert is_record(read(tier, first), 1), "others are not held up"
    let_go(disk)
    assert result(writing) == [first + (2 << 16)]
    assert is_record(read(tier, first + (2 << 16)), 2)
    tier.close()


def test_sealing_leaves_a_segment_to_the_thread_that_writes_to_it(
    quick_path: Path, threads: ThreadPoolExecutor
) -> None:
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    put(tier, [1])
    stalled(disk, "pwritev")
    writing = threads.submit(tier.put, records([2]))
    assert disk.stalled.wait(PATIENCE_S)
    tier.seal_all()
    assert [info.sealed for info in tier.segments()] == [False]
    let_go(disk)
    result(writing)
    assert [(info.sealed, info.records) for info in tier.segments()] == [(True, 2)]
    tier.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_the_directory_is_held_until_the_last_operation_ended(
    quick_path: Path, threads: ThreadPoolExecutor, call: str
) -> None:
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    (place,) = put(tier, [1])
    tier.seal_all()
    put(tier, [2], model=1)
    buffer = aligned(2 * PAGE_BYTES)
    stalled(disk, call)
    operation: Future[object] = (
        threads.submit(tier.get, [place], [buffer]) if call == "preadv" else threads.submit(tier.put, records([3]))
    )
    assert disk.stalled.wait(PATIENCE_S)
    disk.stall = lambda name: False  # only the one that stalls already
    tier.close()
    with pytest.raises(TierUnavailableError, match="it was closed"):
        tier.get([place], [buffer])
    with pytest.raises(DirectoryInUseError):
        opened(quick_path / "ssd")
    let_go(disk)
    assert operation.exception(PATIENCE_S) is None
    assert disk.open_fds == set()
    again = opened(quick_path / "ssd")
    assert {number for _, number in sound(again, all_recovered(again))} >= {1, 2}
    again.close()


def test_two_first_puts_wait_for_one_recovery(quick_path: Path, threads: ThreadPoolExecutor) -> None:
    tier = opened(quick_path / "ssd")
    put(tier, range(8))
    tier.close()
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    stalled(disk, "preadv")
    begun = threading.Barrier(2)

    def store(number: int) -> list[int | None]:
        begun.wait(PATIENCE_S)
        return tier.put(records([number]))

    one, other = threads.submit(store, 10), threads.submit(store, 11)
    assert disk.stalled.wait(PATIENCE_S)
    let_go(disk)
    places = [*one.result(PATIENCE_S), *other.result(PATIENCE_S)]
    assert None not in places
    assert tier.recovery.records == 8
    check_accounts(tier)
    tier.close()


def test_a_put_takes_the_rest_of_a_recovery_that_another_thread_began(
    quick_path: Path, threads: ThreadPoolExecutor
) -> None:
    tier = opened(quick_path / "ssd")
    put(tier, range(12))
    tier.close()
    tier = opened(quick_path / "ssd")
    recovering = tier.recovered()
    first = next(recovering)
    result(threads.submit(put, tier, [50]))
    assert len(first) == 4
    assert list(recovering) == [], "the rest is known to places_in alone"
    assert sum(len(tier.places_in(info.id)) for info in tier.segments()) == 13
    tier.close()


@pytest.mark.parametrize("fails", [False, True])
def test_sealing_everything_while_a_segment_is_being_continued(
    quick_path: Path, threads: ThreadPoolExecutor, fails: bool
) -> None:
    tier = opened(quick_path / "ssd")
    put(tier, [1])
    tier.close()
    disk = StallingDisk(QuickDisk())
    tier = opened(quick_path / "ssd", disk)
    all_recovered(tier)
    stalled(disk, "pwritev")  # of the page that unmakes the footer
    writing = threads.submit(tier.put, records([2]))
    assert disk.stalled.wait(PATIENCE_S)
    tier.seal_all()
    disk.plan = every("pwritev") if fails else nothing
    let_go(disk)
    stored = writing.exception(PATIENCE_S) is None
    assert stored is not fails
    disk.plan = nothing
    tier.seal_all()
    assert all(info.sealed for info in tier.segments())
    check_accounts(tier)
    shutil.copytree(tier.directory, quick_path / "crashed")
    tier.close()
    again = opened(quick_path / "crashed")
    assert {number for _, number in sound(again, all_recovered(again))} == ({1, 2} if stored else {1})
    again.close()


def test_a_segment_that_was_just_made_is_not_freed_before_its_first_record(
    quick_path: Path, threads: ThreadPoolExecutor
) -> None:
    """It is empty, and so the first that an engine would free; the put that made it must find it all the same."""
    tier = opened(quick_path / "ssd")
    ended = threading.Event()

    def vulture() -> int:
        freed = 0
        while not ended.is_set():
            for info in tier.segments():
                if not info.records:
                    freed += tier.free_segment(info.id)
        return freed

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        vultures = [threads.submit(vulture) for _ in range(2)]
        for number in range(1000):  # every one makes a segment
            (place,) = put(tier, [number])
            tier.free_segment(segment_of(place))
    finally:
        ended.set()
        sys.setswitchinterval(interval)
    for future in vultures:
        result(future)
    tier.seal_all()
    check_accounts(tier)
    tier.close()


class Bustle:
    """Threads that put, read, drop and free by a seeded plan each, and what each may expect."""

    def __init__(self, tier: SsdTier) -> None:
        self.tier = tier
        self.lock = threading.Lock()
        self.numbers: dict[int, tuple[int, int]] = {}
        """(model, number) of every place that was ever stored."""
        self.held: set[int] = set()
        """Places that are stored, and that nobody has begun to drop or to free."""
        self.freeing: Counter[int] = Counter()
        """By segment, how many have begun to free it, and have not been refused."""
        self.wrong: list[str] = []

    def live(self, seed: int) -> None:
        random = Random(seed)
        for step in range(500):
            act = random.choice([self.put, self.put, self.read, self.read, self.drop, self.free, self.seal])
            act(random, seed * 1000 + step)

    def put(self, random: Random, number: int) -> None:
        model = random.randrange(3)
        numbers = [number * 4 + index for index in range(random.randint(1, 4))]
        places = self.tier.put(records(numbers, model=model))
        with self.lock:
            for stored, place in zip(numbers, places, strict=True):
                if place is None:
                    continue
                if place in self.numbers:
                    self.wrong.append(f"{place:#x} was given away twice")
                self.numbers[place] = model, stored
                if not self.freeing[segment_of(place)]:
                    self.held.add(place)

    def read(self, random: Random, number: int) -> None:
        with self.lock:
            places = random.sample(sorted(self.numbers), min(len(self.numbers), 3))
        buffers = [aligned(2 * PAGE_BYTES) for _ in places]
        arrived = self.tier.get(places, buffers)
        with self.lock:
            for place, buffer, came in zip(places, buffers, arrived, strict=True):
                model, stored = self.numbers[place]
                if came and not is_record(buffer, stored, model=model):
                    self.wrong.append(f"{stored} came back wrong")
                if not came and place in self.held:
                    self.wrong.append(f"{stored} was lost")

    def drop(self, random: Random, number: int) -> None:
        with self.lock:
            if not self.held:
                return
            place = random.choice(sorted(self.held))
            self.held.remove(place)
        self.tier.drop([place])

    def free(self, random: Random, number: int) -> None:
        infos = [info for info in self.tier.segments() if info.sealed or random.random() < 0.2]
        if not infos or not self.tier.wants_room():
            return
        segment = random.choice(infos).id
        with self.lock:
            self.freeing[segment] += 1
            gone = {place for place in self.held if segment_of(place) == segment}
            self.held -= gone
        if not self.tier.free_segment(segment):
            with self.lock:
                self.freeing[segment] -= 1
                if not self.freeing[segment]:
                    self.held |= gone & set(self.tier.places_in(segment))

    def seal(self, random: Random, number: int) -> None:
        if random.random() < 0.2:
            self.tier.seal_all()


@pytest.mark.parametrize("seed", range(5))
def test_threads_that_do_everything_at_once_see_nothing_wrong(
    quick_path: Path, threads: ThreadPoolExecutor, seed: int
) -> None:
    tier = opened(quick_path / "ssd")
    bustle = Bustle(tier)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for life in [threads.submit(bustle.live, seed * 10 + thread) for thread in range(6)]:
            life.result(PATIENCE_S)
    finally:
        sys.setswitchinterval(interval)
    assert bustle.wrong == []
    assert len(bustle.numbers) > 200
    tier.seal_all()
    check_accounts(tier)
    for place in bustle.held:
        model, number = bustle.numbers[place]
        assert is_record(read(tier, place), number, model=model)
    tier.close()
    again = opened(quick_path / "ssd")
    whole = {number for _, number in sound(again, all_recovered(again))}
    assert {bustle.numbers[place][1] for place in bustle.held} <= whole
    check_accounts(again)
    again.close()

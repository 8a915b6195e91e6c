"""What the ssd tier promises to its engine when nothing goes wrong: records, segments, bounds, and one owner."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import CorruptRecordError, Head, seal
from kvpool.errors import ConfigError, DirectoryInUseError
from kvpool.tiers.ssd.descriptors import MAX_OPEN_SEGMENTS
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.place import MAX_RECORD_PAGES, bytes_of, segment_of
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.ssd.space import SMALL_FILES_BYTES, default_segment_bytes
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

from .disks import DiskWithABadPage, Fault, FaultyDisk, MemoryDisk, QuickDisk, every, nothing
from .records import all_recovered, head, is_record, put, put_although_full, read, record, records, sound

SEGMENT_BYTES = 10 * PAGE_BYTES
"""A header, four records of two pages, and a footer."""
PER_SEGMENT = 4
SMALL_READS = 10
"""Of the small files, at start-up."""
MakeTier = Callable[..., SsdTier]


def capacity(segments: int) -> int:
    """Room for so many segments, the spare among them."""
    return SMALL_FILES_BYTES + segments * SEGMENT_BYTES


@pytest.fixture
def make_tier(tmp_path: Path) -> MakeTier:
    """Opens the tier of this test's directory."""

    def make(segments: int = 5, disk: Disk | None = None, directory: str = "ssd") -> SsdTier:
        return SsdTier.open(
            tmp_path / directory, capacity_bytes=capacity(segments), segment_bytes=SEGMENT_BYTES,
            disk=disk or QuickDisk(),
        )  # fmt: skip

    return make


def found_in(tier: SsdTier) -> dict[int, int]:
    """Places by number, of all that was recovered."""
    return {found.depth: found.place for found in all_recovered(tier)}


def crashed(tier: SsdTier, copy: Path) -> Path:
    """The directory as a kill at this moment would leave it."""
    shutil.copytree(tier.directory, copy)
    return copy


# --- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct_io", [True, False])
@pytest.mark.parametrize("misaligned", [0, 1, 512])
@pytest.mark.parametrize("pages", [1, 2, 300])
def test_records_come_back_as_they_were_from_any_memory(
    tmp_path: Path, direct_io: bool, misaligned: int, pages: int
) -> None:
    tier = SsdTier.open(tmp_path / "ssd", capacity_bytes=32 << 20, direct_io=direct_io, disk=QuickDisk())
    buffers = []
    for number in range(3):
        buffer = np.empty(pages * PAGE_BYTES + misaligned, np.uint8)[misaligned:]
        buffer[:] = record(number, pages=pages)
        buffers.append(buffer)
    places = [place for place in tier.put(buffers) if place is not None]
    into = [np.empty(pages * PAGE_BYTES + misaligned, np.uint8)[misaligned:] for _ in range(3)]
    assert tier.get(places, into) == [True] * 3
    assert all(is_record(buffer, number, pages=pages) for number, buffer in enumerate(into))
    assert all(is_record(buffer, number, pages=pages) for number, buffer in enumerate(buffers)), "put changed a record"
    tier.close()
    again = SsdTier.open(tmp_path / "ssd", capacity_bytes=32 << 20, direct_io=not direct_io, disk=QuickDisk())
    assert len(sound(again, all_recovered(again))) == 3
    again.close()


def test_records_side_by_side_are_one_call_each_way(tmp_path: Path) -> None:
    tier = SsdTier.open(tmp_path / "ssd", capacity_bytes=64 << 20, disk=QuickDisk())
    places = put(tier, range(100))
    buffers = [aligned(2 * PAGE_BYTES) for _ in places]
    assert tier.get(list(reversed(places)), buffers) == [True] * 100
    stats = tier.stats()
    assert (stats.write_calls, stats.read_calls, stats.records_written, stats.records_read) == (1, 1, 100, 100)
    assert all(is_record(buffer, number) for number, buffer in zip(reversed(range(100)), buffers, strict=True))
    tier.close()


def test_a_place_asked_for_twice_comes_twice(make_tier: MakeTier) -> None:
    tier = make_tier()
    (place,) = put(tier, [1])
    buffers = [aligned(2 * PAGE_BYTES) for _ in range(2)]
    assert tier.get([place, place], buffers) == [True, True]
    assert all(is_record(buffer, 1) for buffer in buffers)
    tier.close()


def test_what_is_no_whole_record_is_refused_and_nothing_is_written(make_tier: MakeTier) -> None:
    tier = make_tier()
    good, torn = record(1), record(2)
    torn[100] ^= 1
    with pytest.raises(CorruptRecordError):
        tier.put([good, torn])
    with pytest.raises(ValueError, match="its buffer 12288"):
        tier.put([good, np.concatenate([record(2), np.zeros(PAGE_BYTES, np.uint8)])])
    with pytest.raises(ValueError, match="its buffer 4096"):
        tier.put([good, record(2)[:PAGE_BYTES]])
    assert tier.segments() == []
    assert tier.stats().bytes_written == 0
    tier.close()


def test_a_buffer_of_another_length_than_its_record_is_refused(make_tier: MakeTier) -> None:
    tier = make_tier()
    (place,) = put(tier, [1])
    for pages in (1, 3):
        with pytest.raises(ValueError, match="has 8192 bytes; its buffer"):
            tier.get([place], [aligned(pages * PAGE_BYTES)])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        tier.get([place, place], [aligned(2 * PAGE_BYTES)])
    tier.close()


def test_a_dropped_record_is_a_miss_and_an_unknown_place_a_mistake(make_tier: MakeTier) -> None:
    tier = make_tier()
    places = put(tier, range(3))
    tier.drop([places[1]])
    assert [read(tier, place) is not None for place in places] == [True, False, True]
    assert tier.places_in(segment_of(places[0])) == [places[0], places[2]]
    with pytest.raises(ValueError, match="holds no record"):
        tier.drop([places[1]])
    with pytest.raises(ValueError, match="holds no record"):
        tier.drop([places[0] + 1])
    tier.close()


def test_nothing_in_nothing_out(make_tier: MakeTier) -> None:
    tier = make_tier()
    assert tier.put([]) == []
    assert tier.get([], []) == []
    tier.drop([])
    assert tier.segments() == []
    tier.close()


# --- segments ------------------------------------------------------------------------------------------------------


def test_each_model_has_a_segment_of_its_own(make_tier: MakeTier) -> None:
    tier = make_tier()
    places = put(tier, [1], model=0) + put(tier, [1], model=1) + put(tier, [2], model=0)
    assert segment_of(places[0]) == segment_of(places[2]) != segment_of(places[1])
    infos = {info.id: info for info in tier.segments()}
    assert infos[segment_of(places[0])].fingerprint == head(1, model=0).fingerprint
    assert infos[segment_of(places[0])].records == 2
    assert infos[segment_of(places[0])].live_bytes == 4 * PAGE_BYTES
    assert not infos[segment_of(places[0])].sealed
    tier.close()


def test_freeing_a_segment_forgets_its_records_and_makes_room(make_tier: MakeTier) -> None:
    tier = make_tier(segments=3)
    places = put(tier, range(2 * PER_SEGMENT))
    assert tier.put(records([90])) == [None]
    assert tier.free_segment(segment_of(places[0]))
    assert [read(tier, place) is not None for place in places] == [False] * PER_SEGMENT + [True] * PER_SEGMENT
    tier.drop(places[:PER_SEGMENT])  # forgotten already: no mistake
    assert tier.free_segment(segment_of(places[0])), "it is gone already"
    put(tier, [90])
    tier.close()


def test_a_segment_in_which_nothing_lives_is_used_again_unasked(make_tier: MakeTier) -> None:
    tier = make_tier(segments=3)
    places = put(tier, range(2 * PER_SEGMENT))
    tier.drop(places[:PER_SEGMENT])
    assert tier.free_segments == 1
    put(tier, range(10, 10 + PER_SEGMENT))
    assert tier.put(records([90])) == [None]
    tier.close()


def test_a_freed_file_is_recycled_and_its_old_records_are_never_seen(make_tier: MakeTier, tmp_path: Path) -> None:
    tier = make_tier(segments=3)
    places = put(tier, range(2 * PER_SEGMENT))
    inodes = {path.stat().st_ino for path in tier.directory.glob("*.segment")}
    assert tier.free_segment(segment_of(places[0]))
    put(tier, [90])
    assert {path.stat().st_ino for path in tier.directory.glob("*.segment")} == inodes
    crashed(tier, tmp_path / "crashed")
    after = make_tier(segments=3, directory="crashed")
    assert sorted(found_in(after)) == [4, 5, 6, 7, 90]
    after.close()
    tier.close()


def test_a_segment_is_continued_after_a_restart(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, [1])
    tier.close()
    tier = make_tier()
    put(tier, [2, 3])
    assert [info.records for info in tier.segments()] == [3]
    tier.close()
    assert sorted(found_in(make_tier())) == [1, 2, 3]


def test_a_restart_reads_footers_and_no_record(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, range(9))
    tier.close()
    disk = FaultyDisk(QuickDisk())
    tier = make_tier(disk=disk)
    assert len(found_in(tier)) == 9
    assert disk.names_of_calls.count("preadv") <= 2 * len(tier.segments()) + SMALL_READS
    assert disk.names_of_calls.count("pwritev") == 1, "the lock's holder"
    tier.close()


def test_parents_are_recovered_before_their_children(make_tier: MakeTier) -> None:
    tier = make_tier(segments=8)
    for number in range(6 * PER_SEGMENT):
        put(tier, [number])
    tier.close()
    again = SsdTier.open(tier.directory, capacity_bytes=capacity(8), segment_bytes=SEGMENT_BYTES, disk=QuickDisk())
    assert [found.depth for found in all_recovered(again)] == list(range(6 * PER_SEGMENT))
    again.close()


def test_a_seal_that_failed_is_made_up_for_by_the_next(make_tier: MakeTier) -> None:
    disk = FaultyDisk(QuickDisk())
    tier = make_tier(disk=disk)
    places = put(tier, range(2))
    disk.plan = every("fdatasync")
    with pytest.raises(TierUnavailableError, match="could not be sealed"):
        tier.seal_all()
    assert tier.stats().seal_failures == 1
    assert all(is_record(read(tier, place), number) for number, place in enumerate(places))
    disk.plan = nothing
    tier.seal_all()
    assert [info.sealed for info in tier.segments()] == [True]
    disk.plan = every("fdatasync", "pwritev")
    tier.seal_all()  # there is nothing left to do
    disk.plan = nothing
    tier.close()


def test_ids_go_round_and_pass_over_those_in_use(make_tier: MakeTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.tiers.ssd.space.SEGMENT_IDS", 12)
    tier = make_tier(segments=4)
    (tier.directory / "000005.segment").mkdir()  # somebody else's
    tier.close()
    tier = make_tier(segments=4)
    (first,) = put(tier, [0], model=1)
    seen = set()
    for number in range(60):
        place = put_although_full_but_keep(tier, number, keep=segment_of(first))
        seen.add(segment_of(place))
        assert is_record(read(tier, place), number)
        assert is_record(read(tier, first), 0, model=1)
    assert seen <= set(range(12)) - {5, segment_of(first)}
    assert len(seen) > 4
    tier.close()


def put_although_full_but_keep(tier: SsdTier, number: int, *, keep: int) -> int:
    (place,) = tier.put(records([number]))
    while place is None:
        assert tier.free_segment(min(info.id for info in tier.segments() if info.id != keep and info.sealed))
        (place,) = tier.put(records([number]))
    return place


def test_a_name_that_somebody_else_took_meanwhile_is_left_to_them(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, range(PER_SEGMENT))
    for number in range(2, 5):
        (tier.directory / f"{number:06x}.segment").write_bytes(b"theirs")
    with pytest.raises(TierUnavailableError, match="EEXIST"):
        put(tier, [10])
    for _ in range(3):
        with suppress(TierUnavailableError):
            put(tier, [10])
    assert tier.used_bytes == capacity(2)
    assert [path.read_bytes() for path in sorted(tier.directory.glob("*.segment"))].count(b"theirs") == 3
    tier.close()


def test_more_segments_than_descriptors_can_all_be_read(tmp_path: Path) -> None:
    count = MAX_OPEN_SEGMENTS + 20
    disk = FaultyDisk(MemoryDisk())
    tier = SsdTier.open(tmp_path, capacity_bytes=capacity(count + 1), segment_bytes=SEGMENT_BYTES, disk=disk)
    places = put(tier, range(count * PER_SEGMENT))
    for _ in range(2):
        for number, place in enumerate(places):
            assert is_record(read(tier, place), number)
        assert len(disk.open_fds) <= MAX_OPEN_SEGMENTS + 1
    buffers = [aligned(bytes_of(place)) for place in places]
    assert all(tier.get(places, buffers)), "all in one call, so that none is idle"
    tier.close()
    assert disk.open_fds == set()


# --- room ----------------------------------------------------------------------------------------------------------


def test_the_spare_is_for_reclaiming_alone_and_comes_back(make_tier: MakeTier) -> None:
    tier = make_tier(segments=4)
    first = put(tier, range(3 * PER_SEGMENT))
    assert tier.free_segments == 0
    assert tier.put(records([50])) == [None]
    again = put(tier, [0, 1, 2], reclaim=True)
    assert segment_of(again[0]) not in {segment_of(place) for place in first}
    assert tier.used_bytes == tier.capacity_bytes
    assert tier.put(records([50])) == [None], "the spare took a record that reclaims nothing"
    put(tier, [3], reclaim=True)
    assert tier.put(records([4]), reclaim=True) == [None], "there is one spare"
    assert tier.free_segment(segment_of(first[0]))
    assert tier.put(records([50])) == [None], "what was freed is the spare again"
    assert tier.free_segment(segment_of(first[PER_SEGMENT]))
    put(tier, [50])
    tier.close()


def test_a_reclaim_s_segment_is_like_any_other_once_one_was_freed(make_tier: MakeTier) -> None:
    tier = make_tier(segments=3)
    first = put(tier, range(2 * PER_SEGMENT))
    (moved,) = put(tier, [0], reclaim=True)
    assert tier.free_segment(segment_of(first[0]))
    (place,) = put(tier, [50])
    assert segment_of(place) == segment_of(moved)
    tier.close()


def test_a_full_tier_of_open_segments_gives_the_engine_one_to_free(make_tier: MakeTier) -> None:
    tier = make_tier(segments=4)
    for model in range(3):
        put(tier, [1], model=model)
    assert not any(info.sealed for info in tier.segments())
    assert tier.put(records([1], model=3)) == [None]
    assert [info.sealed for info in tier.segments()] == [True, False, False], "the one written longest ago"
    assert tier.wants_room()
    put_although_full(tier, 1, model=3)
    tier.close()


def test_a_model_that_was_refused_wants_room_although_another_s_segment_has_some(make_tier: MakeTier) -> None:
    tier = make_tier(segments=3)
    put(tier, range(PER_SEGMENT), model=0)
    put(tier, [9], model=0)
    assert not tier.wants_room()
    assert tier.put(records([1], model=1)) == [None]
    assert tier.wants_room()
    assert tier.free_segment(next(info.id for info in tier.segments() if info.sealed))
    put(tier, [1], model=1)
    assert not tier.wants_room()
    tier.close()


def test_a_segment_that_got_no_record_is_used_by_another_model(make_tier: MakeTier) -> None:
    """Sealed empty, because closing came between making it and writing to it, it is as dead as any."""
    disk = FaultyDisk(QuickDisk())
    tier = make_tier(segments=3, disk=disk)
    put(tier, range(PER_SEGMENT), model=0)
    disk.plan = every("pwritev", fault=Fault.LATE)
    with pytest.raises(TierUnavailableError):
        tier.put(records([1], model=1))
    disk.plan = nothing
    put(tier, [1], model=2)
    tier.close()


def test_a_record_larger_than_a_segment_gets_one_of_its_size(make_tier: MakeTier) -> None:
    tier = make_tier(segments=12)
    put(tier, [1])
    (place,) = put(tier, [2], pages=20)
    assert is_record(read(tier, place), 2, pages=20)
    assert tier.used_bytes <= tier.capacity_bytes
    tier.close()
    tier = make_tier(segments=12)
    assert sorted(found_in(tier)) == [1, 2]
    tier.close()


@pytest.mark.parametrize("pages", [20, 100])
def test_a_record_larger_than_the_tier_is_refused_and_costs_nobody_anything(make_tier: MakeTier, pages: int) -> None:
    tier = make_tier(segments=4)
    put(tier, range(4), model=0)
    before = tier.segments()
    assert tier.put(records([7], model=1, pages=pages)) == [None]
    assert tier.put(records([7], model=0, pages=pages), reclaim=True) == [None]
    assert tier.segments() == before
    assert not tier.wants_room(), "no room will ever do"
    tier.close()


def test_a_record_longer_than_a_place_can_say_is_refused_at_once(tmp_path: Path) -> None:
    disk = FaultyDisk(MemoryDisk())
    tier = SsdTier.open(tmp_path, capacity_bytes=4 << 30, disk=disk)
    nbytes = MAX_RECORD_PAGES * PAGE_BYTES
    huge = np.zeros(nbytes + PAGE_BYTES, np.uint8)
    seal(huge, Head(**{**{name: getattr(head(1), name) for name in Head.__slots__}, "payload_bytes": nbytes}))
    assert tier.put([huge]) == [None]
    assert "fallocate" not in disk.names_of_calls
    tier.close()


def test_the_capacity_holds_when_it_is_smaller_at_the_next_start(make_tier: MakeTier) -> None:
    tier = make_tier(segments=8)
    put(tier, range(7 * PER_SEGMENT))
    tier.close()
    for index, path in enumerate(sorted(tier.directory.glob("*.segment"))):
        os.utime(path, (index, index))
    tier = make_tier(segments=4)
    assert tier.used_bytes <= capacity(4)
    assert sorted(found_in(tier)) == list(range(3 * PER_SEGMENT, 7 * PER_SEGMENT)), "the oldest go"
    assert tier.recovery.dropped == {"over-capacity": 3}
    put_although_full(tier, 99)
    tier.close()


def test_a_smaller_capacity_takes_blanks_at_once_and_the_rest_as_segments_are_freed(make_tier: MakeTier) -> None:
    tier = make_tier(segments=6)
    places = put(tier, range(5 * PER_SEGMENT))
    assert tier.free_segment(segment_of(places[0]))
    assert tier.used_bytes == capacity(5), "the file is kept"
    tier.resize(capacity(3))
    assert tier.used_bytes == capacity(4)
    assert tier.put(records([90])) == [None]
    for number in (PER_SEGMENT, 2 * PER_SEGMENT):
        assert tier.free_segment(segment_of(places[number]))
    assert tier.used_bytes <= capacity(3)
    assert len(list(tier.directory.glob("*.segment"))) <= 3
    put_although_full(tier, 90)
    assert tier.used_bytes <= capacity(3)
    tier.resize(capacity(6))
    put(tier, range(91, 100))
    tier.close()


def test_a_larger_capacity_ends_the_want_of_room_and_gives_the_spare_back(make_tier: MakeTier) -> None:
    tier = make_tier(segments=3)
    put(tier, range(2 * PER_SEGMENT))
    (moved,) = put(tier, [0], reclaim=True)
    assert tier.put(records([90])) == [None]
    assert tier.wants_room()
    tier.resize(capacity(5))
    assert not tier.wants_room()
    (place,) = put(tier, [90])
    assert segment_of(place) == segment_of(moved)
    tier.close()


def test_a_blank_that_is_given_up_is_given_back_to_the_file_system(make_tier: MakeTier) -> None:
    tier = make_tier(segments=5)
    places = put(tier, range(3 * PER_SEGMENT))
    assert tier.free_segment(segment_of(places[0]))
    tier.close()
    tier = make_tier(segments=5)
    assert len(found_in(tier)) == 2 * PER_SEGMENT
    tier.resize(capacity(2))
    assert tier.used_bytes == capacity(2)
    held = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert not [name for name in held if str(tier.directory) in name and name.endswith("(deleted)")]
    tier.close()


def test_blanks_of_another_size_are_given_up_for_new_files(tmp_path: Path) -> None:
    tier = SsdTier.open(tmp_path, capacity_bytes=capacity(4), segment_bytes=SEGMENT_BYTES, disk=QuickDisk())
    places = put(tier, range(3 * PER_SEGMENT))
    for number in (0, PER_SEGMENT, 2 * PER_SEGMENT):
        assert tier.free_segment(segment_of(places[number]))
    tier.close()
    other = SEGMENT_BYTES + 2 * PAGE_BYTES
    tier = SsdTier.open(tmp_path, capacity_bytes=capacity(4), segment_bytes=other, disk=QuickDisk())
    assert all_recovered(tier) == []
    put(tier, range(6))
    assert tier.used_bytes <= capacity(4)
    tier.close()


@pytest.mark.parametrize("segment_bytes", [0, 1, PAGE_BYTES, 3 * PAGE_BYTES, 5 * PAGE_BYTES + 1, 65 << 30])
def test_segments_of_a_size_that_cannot_work_are_refused(tmp_path: Path, segment_bytes: int) -> None:
    if segment_bytes == 0:
        segment_bytes = -PAGE_BYTES
    with pytest.raises(ConfigError, match="segment_bytes"):
        SsdTier.open(tmp_path, capacity_bytes=1 << 40, segment_bytes=segment_bytes)


def test_a_capacity_below_two_segments_is_refused_and_the_directory_free_again(tmp_path: Path) -> None:
    least = SMALL_FILES_BYTES + 2 * SEGMENT_BYTES
    with pytest.raises(ConfigError, match=f"at least {least}"):
        SsdTier.open(tmp_path, capacity_bytes=least - 1, segment_bytes=SEGMENT_BYTES)
    tier = SsdTier.open(tmp_path, capacity_bytes=least, segment_bytes=SEGMENT_BYTES, disk=QuickDisk())
    with pytest.raises(ConfigError, match=f"at least {least}"):
        tier.resize(least - 1)
    assert tier.capacity_bytes == least
    put(tier, [1])
    tier.close()


@pytest.mark.parametrize("shift", range(16, 45))
def test_the_derived_segment_size_leaves_room_for_two_and_is_no_more_than_256_mib(shift: int) -> None:
    size = default_segment_bytes(1 << shift)
    assert size % PAGE_BYTES == 0
    assert 4 * PAGE_BYTES <= size <= 256 << 20
    assert (1 << shift) < 64 << 10 or SMALL_FILES_BYTES + 2 * size <= 1 << shift


def test_a_tier_without_a_given_segment_size_holds_its_capacity(tmp_path: Path) -> None:
    tier = SsdTier.open(tmp_path, capacity_bytes=2 << 20, disk=QuickDisk())
    for number in range(300):
        put_although_full(tier, number, pages=4)
        assert tier.used_bytes <= 2 << 20
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) <= 2 << 20
    tier.close()


def test_what_is_counted_is_what_is_there(make_tier: MakeTier) -> None:
    tier = make_tier(segments=8)
    places = put(tier, range(9))
    tier.drop(places[:2])
    stats = tier.stats()
    assert (stats.live_records, stats.live_bytes, stats.dead_bytes) == (7, 14 * PAGE_BYTES, 4 * PAGE_BYTES)
    assert stats.physical_bytes == tier.used_bytes == SMALL_FILES_BYTES + 3 * SEGMENT_BYTES
    assert (stats.segments, stats.free_segments) == (3, tier.free_segments) == (3, 4)
    assert stats.bytes_written == stats.spent_today_bytes == 18 * PAGE_BYTES + 2 * PAGE_BYTES, "records and footers"
    tier.close()


# --- owner ---------------------------------------------------------------------------------------------------------


def test_a_second_tier_on_the_directory_is_told_who_holds_it(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, [1])
    with pytest.raises(DirectoryInUseError, match=f"process {os.getpid()} on {socket.gethostname()}, since 20"):
        make_tier()
    tier.close()
    make_tier().close()


def test_another_process_is_named_and_a_killed_one_holds_nothing(make_tier: MakeTier, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from kvpool.tiers.ssd.tier import SsdTier
tier = SsdTier.open(Path({str(tmp_path / "ssd")!r}), capacity_bytes={capacity(5)}, segment_bytes={SEGMENT_BYTES})
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(DirectoryInUseError, match=rf"is in use by process {other.pid} on .*; stop it, or use ano"):
            make_tier()
        other.send_signal(signal.SIGKILL)
        other.wait()
    make_tier().close()


def test_a_closed_tier_does_nothing_more(make_tier: MakeTier) -> None:
    tier = make_tier()
    places = put(tier, [1])
    tier.close()
    tier.close()
    owner = make_tier()
    before = {path.name: path.read_bytes() for path in tier.directory.iterdir()}
    for action in (
        lambda: tier.put(records([2])), lambda: tier.get(places, [aligned(2 * PAGE_BYTES)]), tier.seal_all,
        lambda: tier.free_segment(segment_of(places[0])), lambda: tier.resize(capacity(6)),
        lambda: next(tier.recovered()),
    ):  # fmt: skip
        with pytest.raises(TierUnavailableError, match="it was closed"):
            action()
    assert {path.name: path.read_bytes() for path in tier.directory.iterdir()} == before
    owner.close()


def test_recovery_ends_with_the_tier_s_life(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, range(9))
    tier.close()
    disk = FaultyDisk(QuickDisk())
    tier = SsdTier.open(tier.directory, capacity_bytes=capacity(5), segment_bytes=SEGMENT_BYTES, disk=disk)
    recovering = tier.recovered()
    assert len(next(recovering)) == PER_SEGMENT
    tier.close()
    with pytest.raises(TierUnavailableError, match="it was closed"):
        next(recovering)
    assert disk.open_fds == set()
    tier = make_tier()
    assert len(found_in(tier)) == 9
    tier.close()


def test_prompts_are_nobody_else_s_business(tmp_path: Path) -> None:
    directory = tmp_path / "pool" / "ssd"
    directory.mkdir(parents=True, mode=0o755)
    tier = SsdTier.open(directory, capacity_bytes=capacity(5), segment_bytes=SEGMENT_BYTES, disk=QuickDisk())
    put(tier, [1])
    tier.close()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


# --- disks that differ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuses", ["open", "preadv"])
def test_a_file_system_without_o_direct_is_used_through_the_page_cache(tmp_path: Path, refuses: str) -> None:
    """As tmpfs was for long, and some network file systems are: the flag, or the first such read, is refused."""

    class Indirect(QuickDisk):
        direct: set[int]

        def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
            if direct and refuses == "open":
                raise OSError(22, "Invalid argument")
            fd = super().open(path, create=create, direct=False)
            self.direct = {fd} if direct else set()
            return fd

        def preadv(self, fd: int, buffers: object, offset: int) -> int:
            if fd in self.direct:
                raise OSError(22, "Invalid argument")
            return super().preadv(fd, buffers, offset)  # type: ignore[arg-type]

    for _ in range(2):
        tier = SsdTier.open(tmp_path, capacity_bytes=capacity(5), segment_bytes=SEGMENT_BYTES, disk=Indirect())
        found = all_recovered(tier)
        assert len(sound(tier, found)) == len(found)
        for number in range(8):
            put_although_full(tier, number)
        tier.close()


def test_a_record_on_a_bad_page_is_a_miss_and_its_neighbours_come(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, range(3))
    tier.close()
    disk = DiskWithABadPage(None)
    tier = make_tier(disk=disk)
    found = found_in(tier)
    disk.page = 4
    places = [found[number] for number in range(3)]
    buffers = [aligned(2 * PAGE_BYTES) for _ in places]
    assert tier.get(places, buffers) == [True, False, True]
    assert tier.stats().read_failures == 1
    tier.close()


def test_a_disk_that_cannot_be_read_at_all_is_no_miss_of_its_records(make_tier: MakeTier) -> None:
    disk = FaultyDisk(QuickDisk())
    tier = make_tier(disk=disk)
    places = put(tier, range(3))
    for out in (every("preadv"), every("preadv", "open")):
        disk.plan = out
        with pytest.raises(TierUnavailableError, match="reading: EIO"):
            read(tier, places[0])
    disk.plan = nothing
    assert is_record(read(tier, places[0]), 0)
    tier.close()


def test_a_segment_that_somebody_removed_is_a_miss(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, range(3))
    tier.close()
    again = SsdTier.open(tier.directory, capacity_bytes=capacity(5), segment_bytes=SEGMENT_BYTES, disk=QuickDisk())
    found = all_recovered(again)
    again._space.descriptors.close_all()  # as if it had not been read for long
    for path in tier.directory.glob("*.segment"):
        path.unlink()
    assert read(again, found[0].place) is None
    again.close()


def test_a_blank_whose_first_page_is_bad_is_not_tried_for_ever(make_tier: MakeTier) -> None:
    tier = make_tier(segments=3)
    places = put(tier, range(2 * PER_SEGMENT))
    assert tier.free_segment(segment_of(places[0]))
    tier.close()
    disk = DiskWithABadPage(None)
    tier = make_tier(segments=3, disk=disk)
    assert len(found_in(tier)) == PER_SEGMENT
    disk.condemn(min(tier.directory.glob("*.segment")))
    disk.page = 0
    with pytest.raises(TierUnavailableError, match="EIO"):
        put(tier, [50])
    put(tier, [50])
    tier.close()


def test_a_segment_that_cannot_be_continued_is_closed_for_good(make_tier: MakeTier) -> None:
    tier = make_tier()
    put(tier, [1])
    tier.close()
    disk = FaultyDisk(QuickDisk())
    tier = make_tier(disk=disk)
    disk.plan = every("pwritev")
    with pytest.raises(TierUnavailableError):
        put(tier, [2])
    disk.plan = nothing
    put(tier, [2])
    assert sorted(info.records for info in tier.segments()) == [1, 1]
    tier.close()
    assert sorted(found_in(make_tier())) == [1, 2]


def test_a_failed_write_leaves_a_gap_and_nothing_of_the_call(make_tier: MakeTier, tmp_path: Path) -> None:
    disk = FaultyDisk(QuickDisk())
    tier = make_tier(disk=disk)
    put(tier, [1])
    disk.plan = every("pwritev", fault=Fault.TORN)
    with pytest.raises(TierUnavailableError, match="writing: EIO, Input/output error"):
        tier.put(records([2, 3]))
    disk.plan = nothing
    (place,) = put(tier, [4])
    assert is_record(read(tier, place), 4)
    crashed(tier, tmp_path / "crashed")
    after = make_tier(directory="crashed")
    assert {number for _, number in sound(after, all_recovered(after))} >= {1, 4}
    after.close()
    tier.close()

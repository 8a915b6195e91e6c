"""A file system that fills up under the tier: it says so, keeps what it has, and goes on when there is room again."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

from .disks import FaultyDisk, QuickDisk, every, nothing
from .records import all_recovered, is_record, put, read, records, sound

SEGMENT_BYTES = 10 * PAGE_BYTES
FILE_SYSTEM_BYTES = 64 * PAGE_BYTES
CAPACITY_BYTES = 100 * FILE_SYSTEM_BYTES
"""More than the disk has: the bound does not help, the tier has to notice."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM_BYTES}", "none", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)  # noqa: S607 - wherever the system has it


def opened(directory: Path) -> SsdTier:
    return SsdTier.open(
        directory, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, daily_write_bytes=1 << 30
    )


def put_one_by_one(tier: SsdTier, stored: dict[int, int]) -> None:
    for number in range(200):
        (stored[number],) = put(tier, [number])


def test_a_full_file_system_takes_the_tier_out_until_there_is_room(small_disk: Path) -> None:
    tier = opened(small_disk / "ssd")
    stored: dict[int, int] = {}
    with pytest.raises(TierUnavailableError, match="ENOSPC, No space left on device"):
        put_one_by_one(tier, stored)
    assert len(stored) >= 8
    assert all(is_record(read(tier, place), number) for number, place in stored.items()), "what is there is served"
    assert tier.used_bytes <= FILE_SYSTEM_BYTES, "what could not be made does not count"
    with pytest.raises(TierUnavailableError):
        put(tier, [300])
    freed = tier.segments()[0].id
    gone = set(tier.places_in(freed))
    assert tier.free_segment(freed)
    put(tier, [300])
    tier.close()

    tier = opened(small_disk / "ssd")
    found = {number for _, number in sound(tier, all_recovered(tier))}
    assert found >= {number for number, place in stored.items() if place not in gone} | {300}
    tier.close()


def test_a_file_system_that_others_filled_is_served_from_and_left_as_it_was(small_disk: Path) -> None:
    tier = opened(small_disk / "ssd")
    put(tier, range(8))
    tier.close()
    hog = small_disk / "hog"
    with pytest.raises(OSError, match="No space left"):
        hog.write_bytes(bytes(2 * FILE_SYSTEM_BYTES))
    tier = opened(small_disk / "ssd")
    assert len(sound(tier, all_recovered(tier))) == 8
    with pytest.raises(TierUnavailableError, match="ENOSPC"):
        put(tier, range(10, 20))
    tier.close()
    hog.unlink()
    tier = opened(small_disk / "ssd")
    assert len(sound(tier, all_recovered(tier))) == 8
    put(tier, range(10, 20))
    tier.close()


@pytest.mark.parametrize("call", ["fallocate", "open", "pwritev", "rename", "fdatasync"])
def test_no_space_in_any_call_is_an_unavailable_tier_and_no_more(tmp_path: Path, call: str) -> None:
    disk = FaultyDisk(QuickDisk(), error=errno.ENOSPC)
    tier = SsdTier.open(tmp_path, capacity_bytes=20 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, disk=disk)
    (place,) = put(tier, [1])
    disk.plan = every(call)
    failures: list[str] = []
    for number in range(10, 40):
        try:
            tier.put(records([number]))
        except TierUnavailableError as error:
            failures.append(error.reason)
        assert is_record(read(tier, place), 1)
        assert tier.used_bytes <= tier.capacity_bytes
    assert failures or tier.stats().seal_failures
    assert all("ENOSPC" in failure for failure in failures)
    disk.plan = nothing
    put(tier, range(50, 54))
    tier.close()
    tier = SsdTier.open(tmp_path, capacity_bytes=20 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, disk=QuickDisk())
    assert {number for _, number in sound(tier, all_recovered(tier))} >= {1, 50, 51, 52, 53}
    tier.close()


def test_part_of_a_batch_that_found_room_is_stored_although_the_rest_met_a_full_disk(tmp_path: Path) -> None:
    disk = FaultyDisk(QuickDisk(), error=errno.ENOSPC)
    tier = SsdTier.open(tmp_path, capacity_bytes=20 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, disk=disk)
    put(tier, [1])
    disk.plan = every("fallocate")
    places = tier.put(records(range(2, 9)))
    assert [place is not None for place in places] == [True] * 3 + [False] * 4
    assert tier.stats().refused_no_room == 4
    tier.close()

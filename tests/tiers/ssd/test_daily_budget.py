"""The bytes of a day are counted across restarts, crashes, midnight and clocks that are set."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.daily_budget import DailyBudget
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError
from tests.clock import Clock

from .disks import FaultyDisk, MemoryDisk, QuickDisk, every, nothing
from .records import all_recovered, put, records

DAY = 86_400
LIMIT = 256 * PAGE_BYTES
STEP = PAGE_BYTES
"""1/256 of the limit: what a crash may charge too much."""


@pytest.fixture
def clock() -> Clock:
    return Clock(20_000 * DAY + 12 * 3600.0)


def budget(directory: Path, clock: Clock, limit: int | None = LIMIT) -> DailyBudget:
    return DailyBudget(QuickDisk(), directory, limit, clock)


def tier_on(directory: Path, clock: Clock, limit: int | None = LIMIT) -> SsdTier:
    return SsdTier.open(
        directory, capacity_bytes=8 << 20, segment_bytes=1 << 20, daily_write_bytes=limit, disk=QuickDisk(), clock=clock
    )


def test_what_is_over_the_budget_is_refused_and_counted(tmp_path: Path, clock: Clock) -> None:
    tier = tier_on(tmp_path / "ssd", clock, limit=7 * PAGE_BYTES)
    places = tier.put(records(range(5)))
    assert [place is not None for place in places] == [True, True, True, False, False]
    assert tier.stats().refused_budget == 2
    assert tier.spent_today_bytes == 6 * PAGE_BYTES
    assert tier.put(records([9], pages=1)) != [None], "a smaller one still fits"
    tier.close()


def test_guaranteed_records_are_counted_but_never_refused(tmp_path: Path, clock: Clock) -> None:
    tier = tier_on(tmp_path / "ssd", clock, limit=PAGE_BYTES)
    assert None not in tier.put(records(range(5)), guaranteed=True)
    assert tier.spent_today_bytes == 10 * PAGE_BYTES
    assert tier.put(records([9], pages=1)) == [None]
    tier.close()


def test_a_spent_budget_makes_no_segments(tmp_path: Path, clock: Clock) -> None:
    tier = tier_on(tmp_path / "ssd", clock, limit=0)
    for model in range(4):
        assert tier.put(records([1], model=model)) == [None]
    assert tier.segments() == []
    assert not tier.wants_room()
    tier.close()


def test_footers_count_too(tmp_path: Path, clock: Clock) -> None:
    tier = tier_on(tmp_path / "ssd", clock)
    put(tier, [1])
    tier.seal_all()
    assert tier.spent_today_bytes == 3 * PAGE_BYTES
    tier.close()


def test_a_restart_goes_on_where_the_day_was(tmp_path: Path, clock: Clock) -> None:
    tier = tier_on(tmp_path / "ssd", clock)
    put(tier, range(4))
    tier.close()
    spent = tier.spent_today_bytes
    assert spent == 9 * PAGE_BYTES
    tier = tier_on(tmp_path / "ssd", clock)
    assert tier.spent_today_bytes == spent
    tier.close()


def test_a_crash_charges_at_most_one_step_too_much_and_never_too_little(tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "0"
    spent = 0
    for crash in range(1, 20):
        tier = tier_on(directory, clock)
        assert spent <= tier.spent_today_bytes <= spent + STEP
        before = tier.spent_today_bytes
        assert len(all_recovered(tier)) == crash - 1
        put(tier, [crash])
        if crash % 3 == 0:
            tier.seal_all()
        spent = tier.spent_today_bytes
        assert spent > before
        directory = tmp_path / str(crash)
        shutil.copytree(tier.directory, directory)
        tier.close()


def test_spending_up_to_the_limit_writes_the_mark_some_256_times(tmp_path: Path, clock: Clock) -> None:
    disk = FaultyDisk(MemoryDisk())
    counted = DailyBudget(disk, tmp_path, LIMIT, clock)
    spent = 0
    while counted.allows(PAGE_BYTES // 4):
        counted.charge(PAGE_BYTES // 4)
        counted.keep_mark()
        spent += PAGE_BYTES // 4
    assert spent == LIMIT
    assert disk.names_of_calls.count("rename") <= 260


def test_midnight_gives_a_new_budget(tmp_path: Path, clock: Clock) -> None:
    counted = budget(tmp_path, clock)
    counted.charge(LIMIT)
    assert not counted.allows(1)
    clock.now_s += 12 * 3600 - 1
    assert not counted.allows(1)
    clock.now_s += 1
    assert counted.allows(LIMIT)
    assert counted.spent_bytes == 0


def test_a_restart_on_another_day_starts_at_nothing(tmp_path: Path, clock: Clock) -> None:
    counted = budget(tmp_path, clock)
    counted.charge(LIMIT)
    counted.close()
    clock.now_s += DAY
    assert budget(tmp_path, clock).spent_bytes == 0


@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_set_back_by_hours_buys_no_second_budget(tmp_path: Path, clock: Clock, restart: bool) -> None:
    clock.now_s = 20_000 * DAY + 60.0
    counted = budget(tmp_path, clock)
    counted.charge(LIMIT)
    counted.close()
    clock.now_s -= 3600  # yesterday
    if restart:
        counted = budget(tmp_path, clock)
    assert not counted.allows(1)
    clock.now_s += 3600
    assert not counted.allows(1)
    clock.now_s += DAY
    assert counted.allows(LIMIT)


@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_that_was_years_ahead_does_not_lock_the_tier(tmp_path: Path, clock: Clock, restart: bool) -> None:
    clock.now_s += 4000 * DAY
    counted = budget(tmp_path, clock)
    counted.charge(LIMIT)
    counted.close()
    clock.now_s -= 4000 * DAY
    if restart:
        counted = budget(tmp_path, clock)
    assert counted.allows(LIMIT)


@pytest.mark.parametrize("damage", [b"", b"day=20000 spent=\n", b"day=20000 spent=5", b"\0" * 40, b"day=-1 spent=5\n"])
def test_a_damaged_file_counts_from_nothing(tmp_path: Path, clock: Clock, damage: bytes) -> None:
    (tmp_path / "BUDGET").write_bytes(damage)
    assert budget(tmp_path, clock).spent_bytes == 0


def test_the_budget_can_be_changed_and_the_day_goes_on(tmp_path: Path, clock: Clock) -> None:
    tier = tier_on(tmp_path / "ssd", clock, limit=2 * PAGE_BYTES)
    put(tier, [1])
    assert tier.put(records([2])) == [None]
    tier.set_daily_write_bytes(4 * PAGE_BYTES)
    put(tier, [2])
    assert tier.put(records([3])) == [None]
    tier.set_daily_write_bytes(None)
    put(tier, range(3, 50))
    assert tier.spent_today_bytes == 98 * PAGE_BYTES
    tier.close()


def test_a_mark_that_cannot_be_kept_stops_writing(tmp_path: Path, clock: Clock) -> None:
    """What could not be charged to the day is not written: a full disk must not undo the budget."""
    disk = FaultyDisk(QuickDisk())
    tier = SsdTier.open(
        tmp_path, capacity_bytes=8 << 20, segment_bytes=1 << 20, daily_write_bytes=LIMIT, disk=disk, clock=clock
    )
    put(tier, [1])
    disk.plan = every("rename")
    with pytest.raises(TierUnavailableError):
        put(tier, range(2, 9))
    disk.plan = nothing
    put(tier, range(2, 9))
    tier.close()


def test_power_lost_after_the_mark_was_kept_does_not_undo_it(clock: Clock) -> None:
    disk = MemoryDisk()
    counted = DailyBudget(disk, Path("/memory"), LIMIT, clock)
    for _ in range(5):
        counted.charge(10 * PAGE_BYTES)
        counted.keep_mark()
    for seed in range(20):
        after = DailyBudget(disk.power_lost(Random(seed)), Path("/memory"), LIMIT, clock)
        assert after.spent_bytes >= 50 * PAGE_BYTES

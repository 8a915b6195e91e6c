"""Tiers that are shared: what one pool has stored, another serves; a fault of theirs is a miss, never a wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.pool.pool import Pool
from kvpool.pool.results import LeaseState, Verdict
from kvpool.resilience import Degradation
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .kv import DEADLINE_S, RECORD, check, empty_ram, flushed, load, loaded_blocks, matched, prompt, spec, store
from .shared import MemoryTier, sharing_pool

DRAGONFLY, DATABASE, RAM = TierName.DRAGONFLY, TierName.DATABASE, TierName.RAM


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier()


@pytest.fixture
def warm(tmp_path: Path, tier: MemoryTier) -> Iterator[Pool]:
    with sharing_pool(tmp_path / "warm", tier) as pool:
        yield pool


@pytest.fixture
def cold(tmp_path: Path, tier: MemoryTier) -> Iterator[Pool]:
    with sharing_pool(tmp_path / "cold", tier) as pool:
        yield pool


def two_tiers_with(tmp_path: Path, tokens: list[int]) -> tuple[MemoryTier, MemoryTier]:
    """A faster tier and a slower one, both of which have this prompt of a pool that is closed."""
    fast, slow = MemoryTier(DRAGONFLY), MemoryTier(DATABASE)
    with sharing_pool(tmp_path / "first", fast, slow) as pool:
        store(pool.register(spec()), tokens)
        flushed(pool)
    return fast, slow


def held_up(tier: MemoryTier) -> tuple[threading.Event, threading.Event]:
    """From now on the tier reads nothing before the second event is set; the first says that somebody waits for it."""
    waiting, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        assert go_on.wait(DEADLINE_S)

    tier.before_get = wait
    return waiting, go_on


def test_a_cold_pool_serves_what_another_has_stored(warm: Pool, cold: Pool) -> None:
    tokens = prompt(50)
    store(warm.register(spec()), tokens)
    flushed(warm)
    model = cold.register(spec())
    with model.match(tokens) as lease:
        assert lease.blocks == 0
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert lease.blocks == 50
        assert loaded_blocks(lease, model, tokens) == 50
        assert lease.served == {DRAGONFLY: 50}
        check(cold, [lease])
    assert load(model, tokens) == 50, "it is in ram now, and needs no wait"


def test_only_the_tail_that_is_not_here_is_asked_for(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    tokens = prompt(10)
    store(warm.register(spec()), tokens)
    flushed(warm)
    model = cold.register(spec())
    store(model, tokens[: 4 * 4])
    flushed(cold)
    with model.match(tokens) as lease:
        lease.wait(DEADLINE_S)
        assert loaded_blocks(lease, model, tokens) == 10
        assert lease.served == {RAM: 4, DRAGONFLY: 6}


def test_a_prompt_that_nobody_has_costs_one_question(cold: Pool, tier: MemoryTier) -> None:
    model = cold.register(spec())
    tier.calls.clear()
    with model.match(prompt(500)) as lease:
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert lease.blocks == 0
    assert tier.calls.count("find") == 1
    assert "get" not in tier.calls


def test_what_is_here_in_full_is_not_asked_for(cold: Pool, tier: MemoryTier) -> None:
    model = cold.register(spec())
    store(model, prompt(5))
    flushed(cold)
    tier.calls.clear()
    with model.match(prompt(5)) as lease:
        assert lease.wait(DEADLINE_S) is LeaseState.READY
    assert tier.calls == []


def test_a_match_never_asks(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    store(warm.register(spec()), prompt(5))
    flushed(warm)
    tier.calls.clear()
    assert matched(cold.register(spec()), prompt(5)) == 0
    assert not {"find", "get"} & set(tier.calls)


def test_what_does_not_come_in_time_is_not_waited_for_and_changes_nothing_later(
    warm: Pool, cold: Pool, tier: MemoryTier
) -> None:
    store(warm.register(spec()), prompt(5))
    flushed(warm)
    reading, go_on = held_up(tier)
    model = cold.register(spec())
    with model.match(prompt(5)) as lease:
        assert lease.ask(DEADLINE_S) is LeaseState.PENDING
        assert reading.wait(DEADLINE_S)
        assert lease.poll() is LeaseState.PENDING
        lookup = lease._lookup
        assert lookup is not None
        lookup._until_s = 0.0
        assert lease.poll() is LeaseState.EXPIRED
        assert lease.blocks == 0
        assert loaded_blocks(lease, model, prompt(5)) == 0
    go_on.set()
    eventually(lambda: cold._engine.ram.used_bytes == cold._engine.index.copy_bytes[1], "no slot is left over")
    check(cold, [])


def test_a_lease_that_was_closed_ends_its_lookup(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    store(warm.register(spec()), prompt(60))
    flushed(warm)
    held, go_on = held_up(tier)
    model = cold.register(spec())
    with model.match(prompt(60)) as lease:
        lease.ask(DEADLINE_S)
        assert held.wait(DEADLINE_S)
    go_on.set()
    remote = cold._engine.remote
    assert remote is not None
    eventually(lambda: not remote._running, "the lookup ends")
    assert matched(model, prompt(60)) <= 32, "no batch was begun after the lease was closed"
    check(cold, [])


@pytest.mark.parametrize("at", [100, 4095, 4096, 9000, -1])
def test_a_flipped_bit_is_a_miss_and_the_record_is_dropped(warm: Pool, cold: Pool, tier: MemoryTier, at: int) -> None:
    tokens = prompt(6)
    store(warm.register(spec()), tokens)
    flushed(warm)
    known = next(key for key, record in tier.records.items() if int.from_bytes(record[104:108], "little") == 3)
    damaged = bytearray(tier.records[known])
    damaged[at] ^= 4
    tier.records[known] = bytes(damaged)
    model = cold.register(spec())
    with model.match(tokens) as lease:
        lease.wait(DEADLINE_S)
        assert loaded_blocks(lease, model, tokens) == 3
    assert sum(cold.stats().tiers[DRAGONFLY].corrupt.values()) == 1
    assert known not in tier.records
    check(cold, [])


def test_another_programs_value_is_a_miss(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    tokens = prompt(4)
    store(warm.register(spec()), tokens)
    flushed(warm)
    for known in tier.records:
        tier.records[known] = b"x" * RECORD
    with cold.register(spec()).match(tokens) as lease:
        lease.wait(DEADLINE_S)
        assert lease.blocks == 0


@pytest.mark.parametrize("nbytes", [0, 100, 4096, RECORD - 4096, RECORD + 4096, 1 << 40])
def test_a_value_of_another_length_is_not_read(warm: Pool, cold: Pool, tier: MemoryTier, nbytes: int) -> None:
    tokens = prompt(2)
    store(warm.register(spec()), tokens)
    flushed(warm)

    class Long(bytes):
        def __len__(self) -> int:
            return nbytes

    for known in tier.records:
        tier.records[known] = Long(b"x")
    tier.calls.clear()
    with cold.register(spec()).match(tokens) as lease:
        lease.wait(DEADLINE_S)
        assert lease.blocks == 0
    assert "get" not in tier.calls


def test_a_tier_that_is_out_costs_a_miss_and_is_asked_again_when_a_probe_succeeds(
    warm: Pool, cold: Pool, tier: MemoryTier
) -> None:
    tokens = prompt(4)
    store(warm.register(spec()), tokens)
    flushed(warm)
    model = cold.register(spec())
    tier.fault = "no answer"
    with model.match(tokens) as lease:
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert lease.blocks == 0
    assert cold.degradations() == {Degradation.NO_DRAGONFLY}
    assert cold.stats().mode == "no-dragonfly"
    assert cold.stats().mode_changes[-1][1:] == (Degradation.NO_DRAGONFLY, True, "no answer")
    tier.calls.clear()
    with model.match(tokens) as lease:
        lease.wait(DEADLINE_S)
    store(model, prompt(3, seed=9))
    assert "put" not in tier.calls
    tier.fault = ""
    eventually(lambda: not cold.degradations(), "a probe finds that it is back")
    assert cold.stats().mode_changes[-1][1:] == (Degradation.NO_DRAGONFLY, False, "")
    with model.match(tokens) as lease:
        lease.wait(DEADLINE_S)
        assert loaded_blocks(lease, model, tokens) == 4


def test_a_tier_that_is_away_when_the_pool_opens_is_connected_later(tmp_path: Path, tier: MemoryTier) -> None:
    tier.fault = "not there yet"
    with sharing_pool(tmp_path / "late", tier) as pool:
        assert pool.degradations() == {Degradation.NO_DRAGONFLY}
        tier.fault = ""
        eventually(lambda: not pool.degradations(), "it is connected")


def test_an_erased_tenants_blocks_are_not_served_though_they_are_there_still(
    warm: Pool, cold: Pool, tier: MemoryTier
) -> None:
    store(warm.register(spec()), prompt(4), tenant="gone")
    flushed(warm)
    model = cold.register(spec())
    tier.fault = "away"
    report = cold.erase(tenant="gone", deadline_s=0.1)
    assert report.pending_tiers == (DRAGONFLY,)
    remote = cold._engine.remote
    assert remote is not None
    remote.eraser._pending.clear()
    tier.fault = ""
    eventually(lambda: not cold.degradations(), "the tier is back")
    assert tier.records
    with model.match(prompt(4), tenant="gone") as lease:
        lease.wait(DEADLINE_S)
        assert lease.blocks == 0


def test_erasing_clears_shared_tiers_and_says_how_much(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    store(warm.register(spec()), prompt(4), tenant="gone")
    store(warm.register(spec()), prompt(3), tenant="stays")
    flushed(warm)
    report = cold.erase(tenant="gone")
    assert report.blocks[DRAGONFLY] == 4
    assert report.pending_tiers == ()
    assert report.catalog_told
    assert len(tier.records) == 3


def test_a_tier_that_was_away_when_a_tenant_was_erased_is_cleared_when_it_is_back(cold: Pool, tier: MemoryTier) -> None:
    store(cold.register(spec()), prompt(4), tenant="gone")
    flushed(cold)
    tier.fault = "away"
    assert cold.erase(tenant="gone", deadline_s=0.0).pending_tiers == (DRAGONFLY,)
    tier.fault = ""
    eventually(lambda: not tier.records, "it is cleared")


def test_two_tenants_and_two_models_never_meet(warm: Pool, cold: Pool) -> None:
    store(warm.register(spec()), prompt(4), tenant="a")
    flushed(warm)
    for name, tenant in (("m", "b"), ("other", "a")):
        with cold.register(spec(name)).match(prompt(4), tenant=tenant) as lease:
            lease.wait(DEADLINE_S)
            assert lease.blocks == 0


def test_pools_with_different_secrets_share_nothing(tmp_path: Path, warm: Pool, tier: MemoryTier) -> None:
    store(warm.register(spec()), prompt(4))
    flushed(warm)
    (tmp_path / "elsewhere").mkdir()
    with sharing_pool(tmp_path / "elsewhere" / "pool", tier) as pool:
        pool._engine.tenants._secret = bytes(32)
        with pool.register(spec()).match(prompt(4)) as lease:
            lease.wait(DEADLINE_S)
            assert lease.blocks == 0


def test_blocks_that_come_from_the_slower_tier_are_sent_to_the_faster_one(tmp_path: Path) -> None:
    tokens = prompt(5)
    fast, slow = two_tiers_with(tmp_path, tokens)
    assert len(fast.records) == len(slow.records) == 5
    fast.records.clear()
    with sharing_pool(tmp_path / "second", fast, slow) as pool:
        model = pool.register(spec())
        with model.match(tokens) as lease:
            lease.wait(DEADLINE_S)
            assert loaded_blocks(lease, model, tokens) == 5
            assert lease.served == {DATABASE: 5}
        flushed(pool)
        assert len(fast.records) == 5


def test_a_prompt_of_which_each_tier_has_a_part_is_served_from_both(tmp_path: Path) -> None:
    tokens = prompt(9)
    fast, slow = two_tiers_with(tmp_path, tokens)
    for known in list(fast.records)[3:6]:
        del fast.records[known]
    with sharing_pool(tmp_path / "second", fast, slow) as pool:
        model = pool.register(spec())
        with model.match(tokens) as lease:
            lease.wait(DEADLINE_S)
            assert loaded_blocks(lease, model, tokens) == 9
            assert lease.served == {DRAGONFLY: 6, DATABASE: 3}


def test_what_a_tier_lost_between_the_question_and_the_reading_comes_from_the_next(tmp_path: Path) -> None:
    tokens = prompt(40)
    fast, slow = two_tiers_with(tmp_path, tokens)
    lost = list(fast.records)[3:9]

    def lose() -> None:
        for known in lost:
            fast.records.pop(known, None)

    fast.before_get = lose
    with sharing_pool(tmp_path / "second", fast, slow) as pool:
        model = pool.register(spec())
        with model.match(tokens) as lease:
            assert lease.wait(DEADLINE_S) is LeaseState.READY
            assert loaded_blocks(lease, model, tokens) == 40
            assert lease.served[DRAGONFLY] >= 3
            assert lease.served[DATABASE] >= len(lost)


def test_a_damaged_record_comes_from_the_next_tier(tmp_path: Path) -> None:
    tokens = prompt(5)
    fast, slow = two_tiers_with(tmp_path, tokens)
    damaged = list(fast.records)[2]
    fast.records[damaged] = bytes(RECORD)
    with sharing_pool(tmp_path / "second", fast, slow) as pool:
        model = pool.register(spec())
        with model.match(tokens) as lease:
            lease.wait(DEADLINE_S)
            assert loaded_blocks(lease, model, tokens) == 5
            assert lease.served == {DRAGONFLY: 4, DATABASE: 1}


def test_what_a_tier_says_it_has_and_never_gives_ends_the_lookup(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    tokens = prompt(6)
    store(warm.register(spec()), tokens)
    flushed(warm)
    withheld = list(tier.records)[4]
    tier.withheld.add(withheld)
    model = cold.register(spec())
    with model.match(tokens) as lease:
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert loaded_blocks(lease, model, tokens) == 4


def test_what_is_used_here_is_kept_there_and_sent_again_once_in_a_round(warm: Pool, tier: MemoryTier) -> None:
    model = warm.register(spec())
    tokens = prompt(6)
    store(model, tokens)
    flushed(warm)
    remote = warm._engine.remote
    assert remote is not None
    tier.calls.clear()
    assert load(model, tokens) == 6
    flushed(warm)
    assert tier.calls == [], "nothing to do in this round"
    for known in list(tier.records)[2:4]:
        del tier.records[known]
    remote.round += 1
    assert load(model, tokens) == 6
    flushed(warm)
    assert len(tier.records) == 6, "what is missing is sent again"
    assert len(tier.touched) == 6, "what is there is kept"
    tier.calls.clear()
    assert load(model, tokens) == 6
    flushed(warm)
    assert tier.calls == []


def test_a_block_that_was_evicted_before_it_was_sent_is_counted(warm: Pool, tier: MemoryTier) -> None:
    model = warm.register(spec())
    remote = warm._engine.remote
    assert remote is not None
    store(model, prompt(6))
    flushed(warm)
    tier.records.clear()
    remote.round += 1
    with model.match(prompt(6)):
        pass
    flushed(warm)
    assert len(tier.records) == 6
    empty_ram(warm)
    assert matched(model, prompt(6)) == 0


def test_a_full_memory_takes_what_fits_and_lies_about_nothing(tmp_path: Path, warm: Pool, tier: MemoryTier) -> None:
    tokens = prompt(40)
    store(warm.register(spec()), tokens)
    flushed(warm)
    with sharing_pool(tmp_path / "small", tier, ram=16 * RECORD) as pool:
        model = pool.register(spec())
        with model.match(tokens) as lease:
            lease.wait(DEADLINE_S)
            arrived = loaded_blocks(lease, model, tokens)
            assert 8 <= arrived <= 16
        check(pool, [])


def test_many_threads_look_the_same_prompt_up(tmp_path: Path, warm: Pool, tier: MemoryTier) -> None:
    tokens = prompt(40)
    store(warm.register(spec()), tokens)
    flushed(warm)
    arrived: list[int] = []

    def look_up() -> None:
        with model.match(tokens) as lease:
            lease.wait(DEADLINE_S)
            arrived.append(loaded_blocks(lease, model, tokens))

    with sharing_pool(tmp_path / "roomy", tier, ram=6 * 64 * RECORD) as pool:  # each lookup has slots of its own
        model = pool.register(spec())
        threads = [threading.Thread(target=look_up) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(arrived) == 40
        check(pool, [])


def test_too_many_questions_at_once_are_misses_and_no_outage(warm: Pool, cold: Pool, tier: MemoryTier) -> None:
    tokens = prompt(4)
    store(warm.register(spec()), tokens)
    flushed(warm)
    model = cold.register(spec())
    tier.is_busy = True
    with model.match(tokens) as lease:
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert lease.blocks == 0
    assert not cold.degradations()
    assert cold.stats().shared[DRAGONFLY].busy == 1
    tier.is_busy = False
    with model.match(tokens) as lease:
        lease.wait(DEADLINE_S)
        assert loaded_blocks(lease, model, tokens) == 4


def test_requests_for_one_prompt_fetch_its_blocks_once(tmp_path: Path, warm: Pool, tier: MemoryTier) -> None:
    tokens = prompt(40)
    store(warm.register(spec()), tokens)
    flushed(warm)
    held, go_on = held_up(tier)
    with sharing_pool(tmp_path / "roomy", tier, ram=6 * 64 * RECORD) as pool:
        model = pool.register(spec())
        leases = [model.match(tokens) for _ in range(4)]
        for lease in leases:
            lease.ask(DEADLINE_S)
        assert held.wait(DEADLINE_S)
        eventually(lambda: tier.calls.count("find") >= 4, "all have asked")
        tier.before_get = lambda: None
        go_on.set()
        for lease in leases:
            assert lease.wait(DEADLINE_S) is LeaseState.READY
            assert loaded_blocks(lease, model, tokens) == 40
            lease.close()
        remote = pool._engine.remote
        assert remote is not None
        assert remote.stores[0].fetched_blocks == 40
        check(pool, [])


def test_who_waits_for_anothers_fetch_waits_no_longer_than_its_own_deadline(
    tmp_path: Path, warm: Pool, tier: MemoryTier
) -> None:
    tokens = prompt(5)
    store(warm.register(spec()), tokens)
    flushed(warm)
    held, go_on = held_up(tier)
    with sharing_pool(tmp_path / "other", tier) as pool:
        model = pool.register(spec())
        with model.match(tokens) as patient, model.match(tokens) as hasty:
            patient.ask(DEADLINE_S)
            assert held.wait(DEADLINE_S)
            assert hasty.wait(0.05) is LeaseState.EXPIRED
            assert hasty.tokens == 0
            go_on.set()
            assert patient.wait(DEADLINE_S) is LeaseState.READY
            assert loaded_blocks(patient, model, tokens) == 5


def test_closing_the_pool_ends_lookups_that_are_under_way(tmp_path: Path, warm: Pool, tier: MemoryTier) -> None:
    store(warm.register(spec()), prompt(5))
    flushed(warm)
    held, go_on = held_up(tier)
    pool = sharing_pool(tmp_path / "closing", tier)
    lease = pool.register(spec()).match(prompt(5))
    lease.ask(DEADLINE_S)
    assert held.wait(DEADLINE_S)
    closing = threading.Thread(target=pool.close)
    closing.start()
    go_on.set()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()


def test_explain_says_which_shared_tier_has_a_block_and_which_could_not_be_asked(
    warm: Pool, cold: Pool, tier: MemoryTier
) -> None:
    store(warm.register(spec()), prompt(3))
    flushed(warm)
    model = cold.register(spec())
    assert [report.tiers for report in model.explain(prompt(3))] == [(DRAGONFLY,)] * 3
    assert {report.verdict for report in model.explain(prompt(3))} == {Verdict.HELD}
    assert "Lease.wait" in model.explain(prompt(3))[0].detail
    del tier.records[list(tier.records)[1]]
    assert [report.verdict for report in model.explain(prompt(3))] == [
        Verdict.HELD,
        Verdict.NEVER_STORED,
        Verdict.UNREACHABLE,
    ]
    tier.fault = "gone fishing"
    (report, *_) = model.explain(prompt(3))
    assert report.tiers == ()
    assert "dragonfly is out and may have it (gone fishing)" in report.detail


def test_what_was_stored_while_a_tier_was_out_goes_there_when_it_is_used_again(warm: Pool, tier: MemoryTier) -> None:
    model = warm.register(spec())
    tier.fault = "away"
    store(model, prompt(3, seed=5))
    store(model, prompt(4))
    flushed(warm)
    assert not tier.records
    tier.fault = ""
    eventually(lambda: not warm.degradations(), "the tier is back")
    remote = warm._engine.remote
    assert remote is not None
    eventually(lambda: matched(model, prompt(4)) == 4 and remote.flush(DEADLINE_S) and len(tier.records) == 4, "sent")


def test_while_one_tier_is_out_the_other_is_not_asked_again_and_again(tmp_path: Path) -> None:
    fast, slow = MemoryTier(DRAGONFLY), MemoryTier(DATABASE)
    with sharing_pool(tmp_path / "pool", fast, slow) as pool:
        model = pool.register(spec())
        slow.fault = "away"
        store(model, prompt(3))
        flushed(pool)
        matched(model, prompt(3))
        flushed(pool)
        fast.calls.clear()
        for _ in range(10):
            matched(model, prompt(3))
        flushed(pool)
        assert not {"find", "put", "touch"} & set(fast.calls)

"""RAM spills to SSD and reads back from it, within both capacities, and a restart finds what lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from kvpool.blocks.identity import BlockKey
from kvpool.blocks.record import Buffer
from kvpool.errors import DirectoryInUseError
from kvpool.pool import pool as pool_module
from kvpool.pool.pool import Pool
from kvpool.pool.results import Refusal
from kvpool.prefix.node import RAM as RAM_LEVEL
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .disks import SickDisk
from .kv import (
    BLOCK_TOKENS,
    MIB,
    RECORD,
    WIDE,
    Prompt,
    check,
    check_chains_on_ssd,
    disk_usage,
    empty_ram,
    fill_ram,
    flushed,
    is_within_capacity,
    load,
    loaded_blocks,
    matched,
    open_pool,
    prompt,
    segment_files,
    served,
    spec,
    store,
    stored_below,
)

RAM, SSD = TierName.RAM, TierName.SSD
FOUR = prompt(4, seed=1)


def on_ssd(pool: Pool) -> int:
    """Blocks that have a copy on SSD."""
    return pool.stats().tiers[SSD].blocks


# -- down and up again -------------------------------------------------------------------------------------------------


def test_what_ram_has_no_room_for_is_read_back_from_ssd(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        prompts = [prompt(6, seed=seed) for seed in range(8)]
        for tokens in prompts:
            assert store(model, tokens).stored == 6
            flushed(pool)
        assert [load(model, tokens) for tokens in prompts] == [6] * 8
        check(pool, leases=())
        check_chains_on_ssd(pool)


def test_what_came_from_ssd_is_kept_in_ram(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        assert served(model, FOUR) == {SSD: 4}
        assert served(model, FOUR) == {RAM: 4}
        tiers = pool.stats().tiers
        assert (tiers[SSD].loaded_blocks, tiers[SSD].loaded_bytes) == (4, 4 * RECORD)
        assert (tiers[RAM].loaded_blocks, tiers[RAM].blocks, tiers[SSD].blocks) == (4, 4, 4)
        check(pool, leases=())


def test_one_load_takes_each_block_from_the_fastest_tier_that_has_it(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(8, seed=1))
        flushed(pool)
        fill_ram(model, 5)
        assert served(model, prompt(8, seed=1)) == {RAM: 3, SSD: 5}


def test_blocks_after_those_from_ssd_may_come_from_ram(tmp_path: Path) -> None:
    """A prompt whose beginning was evicted, and whose end was stored anew behind it."""
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR[: 2 * BLOCK_TOKENS])
        assert store(model, FOUR).stored == 2
        assert served(model, FOUR) == {SSD: 2, RAM: 2}


def test_many_blocks_and_models_of_two_sizes_come_back_from_ssd(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=300 * RECORD, ssd=16 * MIB) as pool:
        small, wide = pool.register(spec("small")), pool.register(spec("wide", layout=WIDE))
        stored_below(pool, small, prompt(100, seed=1))
        stored_below(pool, wide, prompt(70, seed=1))
        assert served(small, prompt(100, seed=1)) == {SSD: 100}
        assert served(wide, prompt(70, seed=1)) == {SSD: 70}
        check(pool, leases=())


def test_tenants_and_extra_keys_stay_apart_on_ssd(tmp_path: Path) -> None:
    cat = {1: b"cat"}
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR, "acme")
        stored_below(pool, model, FOUR, "other")
        store(model, FOUR, extra_keys=cat)
        store(model, FOUR)
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        assert load(model, FOUR, "acme") == load(model, FOUR, "other") == load(model, FOUR) == 4
        assert load(model, FOUR, extra_keys=cat) == 4
        assert matched(model, FOUR, extra_keys={1: b"dog"}) == 1
        assert matched(model, FOUR, "third") == 0
        check(pool, leases=())


def test_a_prompt_larger_than_ram_is_loaded_from_ssd(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        store(pool.register(spec()), prompt(50))
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        assert served(model, prompt(50)) == {SSD: 50}
        check(pool, leases=())
        assert served(model, prompt(50))[SSD] < 50
        check(pool, leases=())


@pytest.mark.parametrize("ram_blocks", [5, 8, 11, 12, 14, 17, 20, 26, 32, 34])
def test_a_prompt_larger_than_ram_is_loaded_whole_wherever_its_own_blocks_fill_that(
    tmp_path: Path, ram_blocks: int
) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        store(pool.register(spec()), prompt(50))
    with open_pool(tmp_path, ram=ram_blocks * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        for _ in range(3):
            assert load(model, prompt(50)) == 50
        check(pool, leases=())


def test_a_prompt_is_loaded_through_the_one_slot_that_is_not_leased(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        store(pool.register(spec()), prompt(50))
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(7, seed=2))
        with model.match(prompt(7, seed=2)) as lease:
            assert served(model, prompt(50)) == {SSD: 50}
            assert loaded_blocks(lease, model, prompt(7, seed=2)) == 7
            check(pool, leases=[lease])


def test_where_all_of_ram_is_leased_blocks_come_from_ssd_and_are_not_kept(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        store(pool.register(spec()), FOUR)
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(8, seed=2))
        flushed(pool)
        with model.match(prompt(8, seed=2)) as lease:
            assert served(model, FOUR) == {SSD: 4}
            assert served(model, FOUR) == {SSD: 4}
            assert pool.stats().short_loads == 0
            assert loaded_blocks(lease, model, prompt(8, seed=2)) == 8
        assert load(model, FOUR) == 4
        check(pool, leases=())


def test_what_the_sink_raises_while_ssd_is_read_leaks_nothing(tmp_path: Path) -> None:
    class RaisesAt(Prompt):
        def write_block(self, index: int, payload: Buffer) -> None:
            super().write_block(index, payload)
            if index == 40:
                raise KeyError(index)

    tokens = prompt(100)
    with open_pool(tmp_path, ram=200 * RECORD, ssd=8 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, tokens)
        sink = RaisesAt(model, tokens, "default")
        with model.match(tokens) as lease, pytest.raises(KeyError):
            lease.load(sink)
        assert sink.wrong == []
        eventually(lambda: not pool._engine.readers.pending, "the reads that nobody wants have ended")
        eventually(lambda: pool.stats().tiers[RAM].used_bytes == pool.stats().tiers[RAM].block_bytes, "slots are freed")
        check(pool, leases=())
        assert load(model, tokens) == 100


def test_read_ahead_reads_while_the_sink_is_busy(tmp_path: Path) -> None:
    assert _reads_at_the_first_block(tmp_path, read_ahead=True, wait_for=3) == 3


def test_without_read_ahead_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    assert _reads_at_the_first_block(tmp_path, read_ahead=False, wait_for=1) == 1


def _reads_at_the_first_block(directory: Path, *, read_ahead: bool, wait_for: int) -> int:
    """How many reads of a prompt of three batches had begun when the sink got the first block."""
    disk = SickDisk()
    seen: list[int] = []

    class Watches(Prompt):
        def write_block(self, index: int, payload: Buffer) -> None:
            super().write_block(index, payload)
            if index == 0:
                eventually(lambda: disk.calls["preadv"] - before >= wait_for, "enough is read ahead")
                seen.append(disk.calls["preadv"] - before)

    with open_pool(directory, ram=200 * RECORD, ssd=32 * MIB, read_ahead=read_ahead, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, prompt(96))
        before = disk.calls["preadv"]
        sink = Watches(model, prompt(96), "default")
        with model.match(prompt(96)) as lease:
            assert lease.load(sink) == 96 * BLOCK_TOKENS
        assert sink.wrong == []
    return seen[0]


# -- what is worth writing, and reading --------------------------------------------------------------------------------


def test_one_time_prompts_never_reach_the_disk(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB, secondHit=True) as pool:
        model = pool.register(spec())
        for seed in range(20):
            store(model, prompt(6, seed=seed))
        flushed(pool)
        assert on_ssd(pool) == 0
        assert list(segment_files(tmp_path)) == []
        assert matched(model, prompt(6, seed=0)) == 0
        pool.close(deadline_s=0)


def test_a_prompt_that_is_matched_reaches_the_disk(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB, secondHit=True) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        store(model, prompt(4, seed=2))
        assert matched(model, FOUR[: 3 * BLOCK_TOKENS]) == 3
        flushed(pool)
        assert on_ssd(pool) == 3
        empty_ram(pool)
        assert load(model, FOUR) == 3
        assert load(model, prompt(4, seed=2)) == 0


def test_a_prompt_that_is_stored_again_after_it_was_lost_reaches_the_disk(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB, secondHit=True) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        empty_ram(pool)
        assert store(model, FOUR).stored == 4
        flushed(pool)
        empty_ram(pool)
        assert served(model, FOUR) == {SSD: 4}


def test_without_the_filter_every_prompt_reaches_the_disk(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB, secondHit=False) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        flushed(pool)
        assert on_ssd(pool) == 4


def test_a_tier_slower_than_computing_is_not_read(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, prompt(6, seed=1))
        model.observe_prefill(tokens=10**12, seconds=1.0)
        assert load(model, prompt(6, seed=1)) == 6, "nothing is known of the tier's speed yet: it is asked"
        empty_ram(pool)
        assert matched(model, prompt(6, seed=1)) == 6
        assert load(model, prompt(6, seed=1)) == 0
        stats = pool.stats()
        assert (stats.skipped_slower_blocks, stats.short_loads) == (6, 1)


def test_of_a_prompt_whose_end_is_not_worth_reading_the_beginning_comes_from_ram(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, prompt(8, seed=1))
        assert load(model, prompt(8, seed=1)) == 8
        fill_ram(model, 5)
        model.observe_prefill(tokens=10**12, seconds=1.0)
        assert served(model, prompt(8, seed=1)) == {RAM: 3}


def test_a_tier_faster_than_computing_is_read(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        model.observe_prefill(tokens=1, seconds=1000.0)
        for _ in range(3):
            stored_below(pool, model, FOUR)
            assert served(model, FOUR) == {SSD: 4}
        assert pool.stats().skipped_slower_blocks == 0


# -- closing and starting ----------------------------------------------------------------------------------------------


def test_closing_writes_everything_down_and_passes_by_the_filter(tmp_path: Path) -> None:
    prompts = [prompt(5, seed=seed) for seed in range(10)]
    with open_pool(tmp_path, ssd=4 * MIB, secondHit=True) as pool:
        model = pool.register(spec())
        for tokens in prompts:
            store(model, tokens)
        assert on_ssd(pool) == 0
    with open_pool(tmp_path, ssd=4 * MIB, secondHit=True) as pool:
        assert pool.stats().restored.blocks == 50
        model = pool.model("m")
        assert [served(model, tokens) for tokens in prompts] == [{SSD: 5}] * 10
        check(pool, leases=())


def test_closing_within_no_time_writes_nothing_and_loses_only_that(tmp_path: Path) -> None:
    pool = open_pool(tmp_path, ssd=4 * MIB, secondHit=True)
    model = pool.register(spec())
    store(model, FOUR)
    assert matched(model, FOUR) == 4
    flushed(pool)
    store(model, prompt(4, seed=2))
    pool.close(deadline_s=0)
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.model("m")
        assert load(model, FOUR) == 4
        assert load(model, prompt(4, seed=2)) == 0


def test_parents_are_written_before_their_children(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=400 * RECORD, ssd=16 * MIB) as pool:
        model = pool.register(spec())
        random = Random(1)
        for seed in range(60):
            trunk = prompt(random.randint(1, 6), seed=seed % 5)
            store(model, trunk + prompt(random.randint(1, 4), seed=100 + seed))
    tier = SsdTier.open(tmp_path / "ssd", capacity_bytes=16 * MIB)
    records = [record for batch in tier.recovered() for record in batch]
    tier.close()
    written: set[BlockKey] = set()
    for record in records:
        assert record.depth == 0 or record.parent in written
        written.add(record.key)
    assert len(records) > 100


def test_a_restart_serves_from_ssd_and_goes_on_from_there(tmp_path: Path) -> None:
    for round_ in range(4):
        with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB) as pool:
            model = pool.register(spec())
            for before in range(round_):
                assert load(model, prompt(6, seed=before)) == 6
            assert store(model, prompt(6, seed=round_)).stored == 6
            check_chains_on_ssd(pool)
    assert len(list(segment_files(tmp_path))) == 1, "the segment that has room is continued"


def test_a_restart_without_the_ssd_tier_starts_empty_and_keeps_what_lies_there(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        store(pool.register(spec()), FOUR)
    with open_pool(tmp_path) as pool:
        assert matched(pool.model("m"), FOUR) == 0
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        assert load(pool.model("m"), FOUR) == 4


def test_a_restart_with_less_ssd_keeps_within_it(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=300 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(40):
            store(model, prompt(6, seed=seed))
    assert disk_usage(tmp_path) > 2 * MIB
    with open_pool(tmp_path, ssd=2 * MIB) as pool:
        assert disk_usage(tmp_path) <= 2 * MIB
        check(pool, leases=())
        held = [load(pool.model("m"), prompt(6, seed=seed)) for seed in range(40)]
        assert sum(held) > 0


# -- little room -------------------------------------------------------------------------------------------------------


def test_capacities_hold_at_every_moment_and_what_is_promised_is_delivered(tmp_path: Path) -> None:
    capacity = 2 * MIB
    with open_pool(tmp_path, ram=16 * RECORD, ssd=capacity) as pool:
        models = [pool.register(spec("small")), pool.register(spec("wide", layout=WIDE))]
        random = Random(7)
        for step in range(300):
            model = models[random.random() < 0.2]
            trunk = prompt(random.randint(1, 3), seed=random.randrange(4))
            tokens = trunk + prompt(random.randint(0, 4), seed=10 + random.randrange(40))
            if random.random() < 0.5:
                store(model, tokens)
            else:
                flushed(pool)
                with model.match(tokens) as lease:
                    promised = lease.blocks
                    assert loaded_blocks(lease, model, tokens) == promised
            if step % 10 == 0:
                assert disk_usage(tmp_path) <= capacity
                assert is_within_capacity(pool)
        flushed(pool)
        check(pool, leases=())
        check_chains_on_ssd(pool)
        stats = pool.stats()
        assert stats.write_behind.freed_segments > 0
        assert disk_usage(tmp_path) <= capacity
    assert disk_usage(tmp_path) <= capacity


def test_when_ssd_is_full_the_prompt_used_longest_ago_makes_room(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        for seed in range(60):
            stored_below(pool, model, prompt(6, seed=seed))
        held = [matched(model, prompt(6, seed=seed)) for seed in range(60)]
        assert held[:20] == [0] * 20
        assert held[-4:] == [6] * 4
        assert pool.stats().write_behind.freed_segments > 0
        check(pool, leases=())


def test_shared_ancestors_are_written_again_and_stay_matchable(tmp_path: Path) -> None:
    system = prompt(5, seed=1)
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        for seed in range(80):
            stored_below(pool, model, system + prompt(3, seed=100 + seed))
        assert load(model, system) == 5
        stats = pool.stats().write_behind
        assert stats.rewritten_blocks >= 5
        assert stats.rewritten_bytes == stats.rewritten_blocks * RECORD
        check_chains_on_ssd(pool)
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB) as pool:
        assert load(pool.model("m"), system + prompt(3, seed=179)) == 8
        check(pool, leases=())


def test_a_leased_segment_is_passed_over(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        stored_below(pool, model, prompt(2, seed=2))
        with model.match(FOUR) as lease:
            for seed in range(60):
                stored_below(pool, model, prompt(6, seed=100 + seed))
            assert pool.stats().write_behind.freed_segments > 0
            assert loaded_blocks(lease, model, FOUR) == 4
            assert lease.served == {SSD: 4}
            assert matched(model, prompt(2, seed=2)) == 2, "what lies beside it stays too"
        for seed in range(60):
            stored_below(pool, model, prompt(6, seed=200 + seed))
        assert matched(model, FOUR) == 0
        check(pool, leases=())


def test_a_record_that_is_not_entered_in_the_index_yet_is_not_freed_under_its_writer(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        engine = pool._engine
        with model.match(FOUR) as lease:
            assert loaded_blocks(lease, model, FOUR) == 4
            assert lease._pin is not None
            records = [engine.ram.record(place).copy() for place in engine.index.places(lease._pin, RAM_LEVEL)]
        written = [place for _ in range(10) for place in engine.store.write(records) if place is not None]
        assert len(written) == 40
        for seed in range(60):
            stored_below(pool, model, prompt(3, seed=100 + seed))
        tier = engine.store.tier
        assert tier is not None
        assert tier.get(written, [aligned(RECORD) for _ in written]) == [True] * 40
        tier.drop(written)


def test_an_ssd_that_is_smaller_than_ram_is_not_written_over_and_over(tmp_path: Path) -> None:
    """All that lies on SSD is in RAM as well, with all that hangs on it: a copy there may go for a newer one."""
    with open_pool(tmp_path, ram=700 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        for seed in range(70):
            store(model, prompt(9, seed=seed))
            flushed(pool)
        stats = pool.stats().write_behind
        assert stats.dropped_blocks == {}
        assert stats.saved_blocks == 70 * 9
        assert stats.rewritten_blocks < 70
        assert stats.write_amplification < 1.2
        assert sum(load(model, prompt(9, seed=seed)) for seed in range(70)) == 70 * 9
        check(pool, leases=())
        check_chains_on_ssd(pool)


def test_a_prompt_longer_than_the_ssd_is_not_written_over_and_over(quick_path: Path) -> None:
    """Not even where each of its blocks is a chain link of its own, as extra keys make them."""
    tokens, extras = prompt(60), dict.fromkeys(range(60), b"image")
    with open_pool(quick_path, ram=64 * RECORD, ssd=MIB // 4) as pool:
        model = pool.register(spec())
        assert store(model, tokens, extra_keys=extras).stored == 60
        flushed(pool)
        stats = pool.stats().write_behind
        assert stats.physical_bytes_written < 4 * 60 * RECORD
        assert load(model, tokens, extra_keys=extras) == 60
        check(pool, leases=())
        check_chains_on_ssd(pool)


def test_where_every_segment_is_leased_writes_are_dropped_and_counted(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=100 * RECORD, ssd=MIB // 2) as pool:
        model = pool.register(spec())
        leases = []
        for seed in range(20):
            stored_below(pool, model, prompt(3, seed=seed))
            leases.append(model.match(prompt(3, seed=seed)))
        assert pool.stats().write_behind.dropped_blocks["refused"] > 0
        for seed, lease in enumerate(leases):
            assert loaded_blocks(lease, model, prompt(3, seed=seed)) == lease.blocks
        assert leases[0].blocks == 3
        assert leases[-1].blocks == 0
        check(pool, leases=leases)
        for lease in leases:
            lease.close()
        stored_below(pool, model, prompt(3, seed=50))
        assert load(model, prompt(3, seed=50)) == 3
        assert disk_usage(tmp_path) <= MIB // 2


def test_more_models_than_segments_share_the_ssd(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=100 * RECORD, ssd=MIB) as pool:
        models = [pool.register(spec(f"m{number}")) for number in range(14)]
        for model in models:
            store(model, prompt(3))
            flushed(pool)
            assert disk_usage(tmp_path) <= MIB
        empty_ram(pool)
        assert load(models[-1], prompt(3)) == 3
        assert sum(load(model, prompt(3)) for model in models) >= 3 * 6
        check(pool, leases=())


def test_a_record_larger_than_a_segment_reaches_the_disk(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=100 * RECORD, ssd=MIB // 4) as pool:
        wide = pool.register(spec("wide", layout=WIDE))
        stored_below(pool, wide, FOUR)
        assert load(wide, FOUR) == 4
        assert disk_usage(tmp_path) <= MIB // 4


def test_the_daily_write_budget_holds_over_a_restart(tmp_path: Path) -> None:
    budget = 12 * RECORD
    for seed in range(2):
        with open_pool(tmp_path, ssd=4 * MIB, dailyWriteBytes=budget) as pool:
            model = pool.register(spec())
            for more in range(3):
                store(model, prompt(6, seed=10 * seed + more))
                flushed(pool)
            if seed == 0:
                assert on_ssd(pool) == 12
            stats = pool.stats().write_behind
            assert stats.dropped_blocks["refused"] >= 6
            assert stats.saved_blocks == (12 if seed == 0 else 0)
            assert load(model, prompt(6, seed=10 * seed)) == 6
            check_chains_on_ssd(pool)


def test_write_amplification_counts_all_that_went_to_the_disk(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        assert pool.stats().write_behind.write_amplification == 1.0
        for seed in range(80):
            stored_below(pool, model, prompt(5, seed=1) + prompt(3, seed=100 + seed))
        stats = pool.stats().write_behind
        assert stats.saved_bytes == stats.saved_blocks * RECORD
        assert stats.physical_bytes_written >= stats.saved_bytes + stats.rewritten_bytes
        assert 1.0 < stats.write_amplification < 3.0
        assert stats.write_amplification == stats.physical_bytes_written / stats.saved_bytes


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_flush_gives_up_at_its_deadline_and_waits_to_the_end_without_one(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        disk.stalls = lambda name: name == "pwritev"
        try:
            store(model, FOUR)
            assert not pool.flush(deadline_s=0.01)
            assert pool.stats().write_behind.saved_blocks == 0
        finally:
            disk.recover()
        assert pool.flush()
        assert on_ssd(pool) == 4


def test_a_store_never_waits_for_the_disk_and_what_is_evicted_unwritten_is_counted(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ram=16 * RECORD, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        disk.stalls = lambda name: name == "pwritev"
        try:
            for seed in range(10):
                assert store(model, prompt(4, seed=seed)).stored == 4
            eventually(lambda: disk.held > 0, "a write has begun")
        finally:
            disk.recover()
        flushed(pool)
        dropped = pool.stats().write_behind.dropped_blocks
        assert dropped["evicted-before"] > 0
        assert on_ssd(pool) + sum(dropped.values()) == 40
        check(pool, leases=())
        check_chains_on_ssd(pool)


def test_what_is_being_written_is_not_evicted_under_the_writer(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ram=8 * RECORD, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        disk.stalls = lambda name: name == "pwritev"
        try:
            store(model, FOUR)
            eventually(lambda: disk.held > 0, "the write has begun")
            assert store(model, prompt(8, seed=2)).refused == {Refusal.NO_ROOM: 4}
        finally:
            disk.recover()
        flushed(pool)
        empty_ram(pool)
        assert load(model, FOUR) == 4


def test_closing_does_not_wait_for_a_disk_that_stalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "GRACE_S", 0.05)
    disk = SickDisk()
    pool = open_pool(tmp_path, ssd=4 * MIB, disk=disk)
    model = pool.register(spec())
    disk.stalls = lambda name: name == "pwritev"
    try:
        store(model, FOUR)
        eventually(lambda: disk.held > 0, "the write has begun")
        pool.close(deadline_s=0.05)
    finally:
        disk.recover()
    eventually(_reopens(tmp_path), "the write that was left behind has given the directory back")


def _reopens(directory: Path) -> Callable[[], bool]:
    def attempt() -> bool:
        try:
            open_pool(directory, ssd=4 * MIB).close()
        except DirectoryInUseError:
            return False
        return True

    return attempt

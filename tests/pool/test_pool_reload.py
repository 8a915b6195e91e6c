"""What can change while a pool is open takes effect at once; what cannot is named, and stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpool.config import RuntimeConfig
from kvpool.errors import ConfigError
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .disks import SickDisk
from .kv import (
    DEADLINE_S,
    KIB,
    LAYOUT,
    MIB,
    RECORD,
    WIDE,
    check,
    check_chains_on_ssd,
    config,
    disk_usage,
    empty_ram,
    flushed,
    identity,
    is_within_capacity,
    load,
    loaded_blocks,
    matched,
    open_pool,
    prompt,
    served,
    spec,
    store,
    stored_below,
)

RAM, SSD = TierName.RAM, TierName.SSD
FOUR = prompt(4, seed=1)


def changed(old: RuntimeConfig, **sections: Any) -> RuntimeConfig:
    """`old` with other values, given as in a file."""
    content = old.model_dump(by_alias=True)
    for name, change in sections.items():
        section = content.get(name)
        content[name] = {**section, **change} if isinstance(section, dict) and isinstance(change, dict) else change
    return RuntimeConfig.model_validate(content)


def ram_reserved(pool: Pool) -> int:
    """Bytes of memory that the ram tier has mapped."""
    return pool._engine.ram.stats().reserved_bytes


# -- the report --------------------------------------------------------------------------------------------------------

LIVE: list[tuple[dict[str, Any], str]] = [
    ({"ram": {"capacityBytes": MIB}}, "spec.tiers.ram.capacity"),
    ({"ram": {"indexBytes": MIB}}, "spec.tiers.ram.indexBytes"),
    ({"ssd": {"capacityBytes": 8 * MIB}}, "spec.tiers.ssd.capacity"),
    ({"ssd": {"secondHit": True}}, "spec.tiers.ssd.secondHit"),
    ({"ssd": {"dailyWriteBytes": MIB}}, "spec.tiers.ssd.dailyWrites"),
    ({"ssd": {"budgetS": 0.5}}, "spec.tiers.ssd.budget"),
    ({"policy": {"readAhead": False}}, "spec.policy.readAhead"),
    ({"sharing": {"protectShared": False}}, "spec.sharing.protectShared"),
    ({"sharing": {"maxSharedBytes": 7}}, "spec.sharing.maxSharedBytes"),
    ({"models": [{"name": "m", "prefillTokensPerSecond": 5}]}, 'spec.models["m"].prefillTokensPerSecond'),
]
FIXED: list[tuple[dict[str, Any], str]] = [
    ({"name": "other"}, "metadata.name"),
    ({"directory": "/elsewhere"}, "directory"),
    ({"blockTokens": 8}, "spec.blockTokens"),
    ({"ram": {"hugePages": True}}, "spec.tiers.ram.hugePages"),
    ({"sharing": {"scope": "pool"}}, "spec.sharing.scope"),
    ({"ssd": None}, "spec.tiers.ssd"),
    ({"gpu": {"capacityBytes": MIB}}, "spec.tiers.gpu"),
]


@pytest.mark.parametrize(("change", "path"), LIVE, ids=[path for _, path in LIVE])
def test_what_takes_effect_is_named_and_is_the_configuration_from_then_on(
    tmp_path: Path, change: dict[str, Any], path: str
) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        wanted = changed(pool.config, **change)
        report = pool.reload(wanted)
        assert (report.applied, report.needs_restart) == ((path,), ())
        assert pool.config == wanted
        again = pool.reload(wanted)
        assert (again.applied, again.needs_restart) == ((), ())


@pytest.mark.parametrize(("change", "path"), FIXED, ids=[path for _, path in FIXED])
def test_what_needs_a_restart_is_named_and_stays_as_it_was(tmp_path: Path, change: dict[str, Any], path: str) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        before = pool.config
        for _ in range(2):
            report = pool.reload(changed(before, **change))
            assert (report.applied, report.needs_restart) == ((), (path,))
            assert pool.config == before
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        assert served(model, FOUR) == {SSD: 4}


def test_of_a_mixed_change_the_part_that_can_takes_effect(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        before = pool.config
        report = pool.reload(changed(before, blockTokens=8, ram={"capacityBytes": 8 * RECORD, "hugePages": True}))
        assert report.applied == ("spec.tiers.ram.capacity",)
        assert set(report.needs_restart) == {"spec.blockTokens", "spec.tiers.ram.hugePages"}
        assert pool.config == changed(before, ram={"capacityBytes": 8 * RECORD})
        assert pool.stats().tiers[RAM].capacity_bytes == 8 * RECORD
        assert store(pool.register(spec()), FOUR).stored == 4


def test_a_configuration_that_cannot_work_is_refused_and_nothing_of_it_takes_effect(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        before = pool.config
        with pytest.raises(ConfigError, match="ssd capacity is 4096 bytes; it must be at least"):
            pool.reload(changed(before, ram={"capacityBytes": MIB}, ssd={"capacityBytes": 4096}))
        assert pool.config == before
        assert pool.stats().tiers[RAM].capacity_bytes == before.ram.capacity_bytes
        assert load(model, FOUR) == 4


# -- less and more memory ----------------------------------------------------------------------------------------------


def test_a_smaller_ram_gives_memory_back_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=64 * RECORD) as pool:
        model = pool.register(spec())
        for seed in range(16):
            store(model, prompt(4, seed=seed))
        pool.reload(config(ram=8 * RECORD))
        eventually(lambda: ram_reserved(pool) <= 8 * RECORD, "memory is given back")
        check(pool, leases=())
        held = [load(model, prompt(4, seed=seed)) for seed in range(16)]
        assert held[:14] == [0] * 14
        assert sum(held) > 0
        assert store(model, prompt(8, seed=50)).stored == 8


def test_a_smaller_ram_spares_leases_until_they_end(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=64 * RECORD) as pool:
        model = pool.register(spec())
        for seed in range(15):
            store(model, prompt(4, seed=seed))
        leases = {seed: model.match(prompt(4, seed=seed)) for seed in (0, 7, 14)}
        pool.reload(config(ram=4 * RECORD))
        eventually(lambda: pool.stats().tiers[RAM].used_bytes <= 12 * RECORD, "what is not leased goes")
        for seed, lease in leases.items():
            assert loaded_blocks(lease, model, prompt(4, seed=seed)) == 4
        assert store(model, prompt(2, seed=50)).stored == 0
        for lease in leases.values():
            lease.close()
        eventually(lambda: ram_reserved(pool) <= 4 * RECORD, "the rest goes too")
        check(pool, leases=())
        assert store(model, prompt(4, seed=50)).stored == 4


def test_ram_may_shrink_and_grow_under_load(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=64 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        for round_, blocks in enumerate([8, 40, 5, 64, 16, 100, 8]):
            store(model, prompt(5, seed=round_))
            flushed(pool)
            with model.match(prompt(5, seed=round_)) as lease:
                pool.reload(config(ram=blocks * RECORD, ssd=4 * MIB))
                for seed in range(100 * round_, 100 * round_ + 20):
                    store(model, prompt(3, seed=1000 + seed))
                    load(model, prompt(3, seed=1000 + seed))
                assert loaded_blocks(lease, model, prompt(5, seed=round_)) == 5
            eventually(lambda: ram_reserved(pool) <= pool.config.ram.capacity_bytes, "memory is given back")
            check(pool, leases=())


def test_a_larger_ram_holds_more(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD) as pool:
        model = pool.register(spec())
        assert store(model, prompt(20)).stored == 8
        pool.reload(config(ram=64 * RECORD))
        assert store(model, prompt(20)).stored == 12
        assert load(model, prompt(20)) == 20


def test_a_smaller_index_forgets_what_it_has_no_room_for(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=256 * RECORD) as pool:
        model = pool.register(spec())
        for seed in range(60):
            store(model, prompt(3, seed=seed))
        assert pool.stats().index.bytes > 12_000
        pool.reload(config(ram=256 * RECORD, index=12_000))
        eventually(lambda: pool.stats().index.bytes <= 12_000, "the housekeeper sees to it")
        check(pool, leases=())
        assert load(model, prompt(3, seed=59)) == 3
        assert load(model, prompt(3, seed=0)) == 0


# -- the ssd -----------------------------------------------------------------------------------------------------------


def test_a_smaller_ssd_gives_files_back_and_serves_the_rest(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(40):
            stored_below(pool, model, prompt(6, seed=seed))
        assert disk_usage(tmp_path) > 2 * MIB
        pool.reload(config(ram=16 * RECORD, ssd=2 * MIB))
        eventually(lambda: is_within_capacity(pool), "files are given back")
        assert disk_usage(tmp_path) <= 2 * MIB
        held = [load(model, prompt(6, seed=seed)) for seed in range(40)]
        assert sum(held) >= 40
        check(pool, leases=())
        check_chains_on_ssd(pool)
    with open_pool(tmp_path, ram=16 * RECORD, ssd=2 * MIB) as pool:
        assert [load(pool.model("m"), prompt(6, seed=seed)) for seed in range(40)] == held


def test_a_smaller_ssd_spares_leases_until_they_end(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * RECORD, ssd=2 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(20):
            stored_below(pool, model, prompt(6, seed=seed))
        leases = [model.match(prompt(6, seed=seed)) for seed in range(20)]
        pool.reload(config(ram=16 * RECORD, ssd=MIB))
        for seed, lease in enumerate(leases):
            assert loaded_blocks(lease, model, prompt(6, seed=seed)) == 6
            lease.close()
        eventually(lambda: is_within_capacity(pool), "files are given back")
        assert disk_usage(tmp_path) <= MIB
        check(pool, leases=())


def test_a_smaller_ssd_gives_up_the_segments_that_are_being_filled_too(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB // 2) as pool:
        for name, layout in (("small", LAYOUT), ("wide", WIDE)):
            stored_below(pool, pool.register(spec(name, layout=layout)), FOUR)
        pool.reload(config(ssd=160 * KIB))
        eventually(lambda: is_within_capacity(pool), "files are given back")
        assert disk_usage(tmp_path) <= 160 * KIB
        check(pool, leases=())
        model = pool.model("small")
        stored_below(pool, model, prompt(2, seed=2))
        assert served(model, prompt(2, seed=2)) == {SSD: 2}


def test_a_larger_ssd_holds_more(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        pool.reload(config(ram=16 * RECORD, ssd=8 * MIB))
        for seed in range(40):
            stored_below(pool, model, prompt(6, seed=seed))
        assert [load(model, prompt(6, seed=seed)) for seed in range(40)] == [6] * 40
        assert MIB < disk_usage(tmp_path) <= 8 * MIB


def test_a_tier_that_is_out_opens_with_what_was_reloaded_meanwhile(tmp_path: Path) -> None:
    disk = SickDisk()
    disk.errors = {"make_directory": 5}
    with open_pool(tmp_path, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        pool.reload(config(ssd=MIB, dailyWriteBytes=2 * RECORD))
        disk.recover()
        eventually(lambda: pool.stats().mode == "normal", "it is opened")
        assert pool.stats().tiers[SSD].capacity_bytes == MIB
        stored_below(pool, model, FOUR)
        assert pool.stats().tiers[SSD].blocks == 2


def test_the_second_hit_filter_can_be_switched(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB, secondHit=True) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        assert matched(model, FOUR) == 0
        pool.reload(config(ssd=4 * MIB, secondHit=False))
        stored_below(pool, model, prompt(4, seed=2))
        assert served(model, prompt(4, seed=2)) == {SSD: 4}
        pool.reload(config(ssd=4 * MIB, secondHit=True))
        stored_below(pool, model, prompt(4, seed=3))
        assert matched(model, prompt(4, seed=3)) == 0


def test_a_raised_daily_budget_lets_writes_through_at_once(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB, dailyWriteBytes=2 * RECORD) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        assert pool.stats().tiers[SSD].blocks == 2
        pool.reload(config(ssd=4 * MIB, dailyWriteBytes=100 * RECORD))
        stored_below(pool, model, prompt(4, seed=2))
        assert pool.stats().tiers[SSD].blocks == 6
        check_chains_on_ssd(pool)


def test_a_new_time_budget_holds_for_the_next_load(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=4 * MIB, budgetS=DEADLINE_S, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        pool.reload(config(ssd=4 * MIB, budgetS=0.01))
        disk.stalls = lambda name: name == "preadv"
        try:
            assert load(model, FOUR) == 0
            assert "no progress for 10 ms" in pool.stats().tiers[SSD].last_error
        finally:
            disk.recover()


def test_a_new_prefill_rate_is_used_unless_one_was_measured(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model = pool.register(ModelSpec(identity=identity(), prefill_tokens_per_second=1.0))
        measured = pool.register(spec("measured"))
        measured.observe_prefill(tokens=100, seconds=1.0)
        rates = [{"name": name, "prefillTokensPerSecond": 7} for name in ("m", "measured")]
        pool.reload(changed(pool.config, models=rates))
        assert model.prefill_tokens_per_second == 7.0
        assert measured.prefill_tokens_per_second == 100.0


def test_protection_of_shared_prefixes_can_be_switched(tmp_path: Path) -> None:
    shared = {"minPrefixTokens": 4}
    with open_pool(tmp_path, ram=12 * RECORD, sharing=shared) as pool:
        model = pool.register(spec())
        system = prompt(4, seed=1)

        def outlives_others(first_seed: int) -> bool:
            store(model, system + prompt(1, seed=first_seed))
            store(model, system + prompt(1, seed=first_seed + 1))
            for seed in range(first_seed + 2, first_seed + 12):
                store(model, prompt(4, seed=seed))
            return matched(model, system) == 4

        assert outlives_others(100)
        pool.reload(config(ram=12 * RECORD, sharing={**shared, "protectShared": False}))
        empty_ram(pool)
        assert not outlives_others(200)
        flushed(pool)
        check(pool, leases=())

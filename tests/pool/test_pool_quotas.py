"""Quotas: what is guaranteed is a model's whatever others do, a limit is a limit, and both change while it runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvpool.config import RuntimeConfig
from kvpool.config.runtime import QuotaConfig
from kvpool.errors import ConfigError, InputError
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec, Refusal, Verdict
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import RAM, SSD
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .kv import LAYOUT, MIB, RECORD, WIDE, config, empty_ram, flushed, identity, load, matched, prompt, spec, store

Shares = Mapping[str, Mapping[str, tuple[int, int | None]]]
"""By model and tier: guaranteed and limit, in blocks of `RECORD` bytes."""


def with_quotas(base: RuntimeConfig, shares: Shares) -> RuntimeConfig:
    models = [
        {
            "name": name,
            "quotas": {
                tier: {
                    "guaranteedBytes": guaranteed * RECORD,
                    "limitBytes": None if limit is None else limit * RECORD,
                }
                for tier, (guaranteed, limit) in by_tier.items()
            },
        }
        for name, by_tier in shares.items()
    ]
    plain = base.model_dump(mode="json", by_alias=True)
    return RuntimeConfig.model_validate({**plain, "models": models})


def open_with(path: Path, shares: Shares, **options: Any) -> Pool:
    pool = Pool.open(with_quotas(config(**options), shares), directory=path)
    touching = pool._engine.ram._prefault_thread
    if touching is not None:
        touching.join()
    return pool


def held(pool: Pool, name: str, level: int = RAM) -> int:
    """Blocks of `RECORD` bytes that a model holds."""
    return pool._engine.index.ledger.account(name).bytes[level] // RECORD


def check(pool: Pool) -> None:
    check_integrity(pool._engine.index)


def test_a_limit_holds_and_the_model_pays_for_it_itself(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (0, 8)}}) as pool:
        model, other = pool.register(spec()), pool.register(spec("other"))
        store(other, prompt(6, seed=1))
        for seed in range(2, 6):
            assert store(model, prompt(5, seed=seed)).stored == 5
            assert held(pool, "m") <= 8
        assert load(other, prompt(6, seed=1)) == 6
        assert load(model, prompt(5, seed=5)) == 5
        check(pool)


def test_beyond_the_limit_with_all_of_it_leased_a_store_is_refused_and_explain_says_so(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (0, 4)}}) as pool:
        model = pool.register(spec())
        store(model, prompt(4, seed=1))
        with model.match(prompt(4, seed=1)):
            result = store(model, prompt(3, seed=2))
            assert result.refused == {Refusal.OVER_QUOTA: 3}
        [report, *_] = model.explain(prompt(3, seed=2))
        assert report.verdict is Verdict.OVER_QUOTA
        assert "quota in ram" in report.detail


def test_what_is_guaranteed_stays_whatever_another_stores_and_leases(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (20, None)}}, ram=64 * RECORD) as pool:
        model, wild = pool.register(spec()), pool.register(spec("wild"))
        store(model, prompt(20, seed=1))
        leases = []
        for seed in range(2, 30):
            store(wild, prompt(10, seed=seed))
            leases.append(wild.match(prompt(10, seed=seed)))
        assert load(model, prompt(20, seed=1)) == 20
        assert sum(lease.blocks for lease in leases) <= 44
        for lease in leases:
            lease.close()
        check(pool)


def test_a_guarantee_that_was_not_used_can_be_had_while_another_leases_all_it_can(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (20, None)}}, ram=64 * RECORD) as pool:
        model, wild = pool.register(spec()), pool.register(spec("wild"))
        leases = []
        for seed in range(2, 12):
            store(wild, prompt(10, seed=seed))
            leases.append(wild.match(prompt(10, seed=seed)))
        assert store(model, prompt(20, seed=1)).stored == 20
        assert load(model, prompt(20, seed=1)) == 20
        for lease in leases:
            lease.close()


def test_a_lowered_limit_takes_effect_in_the_background_and_what_is_leased_goes_later(tmp_path: Path) -> None:
    base = config(directory=tmp_path)
    with Pool.open(base) as pool:
        model = pool.register(spec())
        store(model, prompt(10, seed=1))
        store(model, prompt(10, seed=2))
        with model.match(prompt(10, seed=1)) as lease:
            report = pool.reload(with_quotas(base, {"m": {"ram": (0, 0)}}))
            assert report.applied == ('spec.models["m"].quotas.ram.limit',)
            eventually(lambda: held(pool, "m") == 10, "all goes but what is leased")
            assert store(model, prompt(4, seed=3)).refused == {Refusal.OVER_QUOTA: 4}
            assert lease.blocks == 10
        pool._engine.wake()
        eventually(lambda: held(pool, "m") == 0, "and that goes when its lease ends")
        check(pool)
        pool.reload(base)
        assert store(model, prompt(4, seed=4)).stored == 4


def test_an_ssd_limit_counts_live_records(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ssd": (0, 12)}}, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(1, 6):
            store(model, prompt(6, seed=seed))
            flushed(pool)
            assert held(pool, "m", SSD) <= 12
        empty_ram(pool)
        assert load(model, prompt(6, seed=5)) == 6, "what was written last is there"
        check(pool)


def test_what_is_guaranteed_on_ssd_survives_another_that_fills_the_disk(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ssd": (10, None)}}, ssd=MIB, ram=32 * RECORD) as pool:
        model, wild = pool.register(spec()), pool.register(spec("wild"))
        store(model, prompt(10, seed=1))
        flushed(pool)
        for seed in range(2, 60):
            store(wild, prompt(8, seed=seed))
            flushed(pool)
        assert pool.stats().write_behind.freed_segments > 0, "the disk was filled"
        empty_ram(pool)
        assert load(model, prompt(10, seed=1)) == 10
        check(pool)


def test_guarantees_that_do_not_fit_in_whole_extents_are_refused_by_their_path(tmp_path: Path) -> None:
    ram = 640 * RECORD
    shares = {f"m{number}": {"ram": (127, None)} for number in range(5)}
    with pytest.raises(ConfigError, match=r"quotas\.ram\.guaranteed.*whole extents"):
        open_with(tmp_path, shares, ram=ram)
    with open_with(tmp_path, {}, ram=ram) as pool:
        assert pool.stats().mode == "normal", "and the directory is free again"


def test_quotas_of_a_spec_count_where_the_configuration_has_none_and_are_remembered(tmp_path: Path) -> None:
    quotas = {TierName.RAM: QuotaConfig(limit_bytes=4 * RECORD)}
    with open_with(tmp_path, {"named": {"ram": (0, 6)}}) as pool:
        for name, most in (("named", 6), ("m", 4)):
            model = pool.register(ModelSpec(identity=identity(name), quotas=quotas))
            store(model, prompt(4, seed=1))
            store(model, prompt(4, seed=2))
            assert held(pool, name) == most
    with open_with(tmp_path, {}) as pool:
        store(pool.model("m"), prompt(4, seed=1))
        store(pool.model("m"), prompt(4, seed=2))
        assert held(pool, "m") == 4


def test_a_quota_for_a_tier_that_keeps_none_is_refused(tmp_path: Path) -> None:
    with open_with(tmp_path, {}) as pool, pytest.raises(InputError, match="quota for dragonfly"):
        pool.register(ModelSpec(identity=identity(), quotas={TierName.DRAGONFLY: QuotaConfig()}))


def test_revisions_of_a_model_share_its_quota(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (0, 8)}}) as pool:
        old, new = pool.register(spec()), pool.register(spec(weights="new"))
        store(old, prompt(6, seed=1))
        store(new, prompt(6, seed=1))
        assert held(pool, "m") == 8
        assert load(new, prompt(6, seed=1)) == 6
        assert load(old, prompt(6, seed=1)) == 2


@pytest.mark.parametrize("seed", range(4))
def test_five_wild_models_never_take_what_is_guaranteed(tmp_path: Path, seed: int) -> None:
    """Random quotas and loads, on several threads, with leases held; every byte that is loaded is verified."""
    random = Random(seed)
    names = [f"m{number}" for number in range(5)]
    shares = {name: {"ram": (random.randint(2, 8), None), "ssd": (random.randint(2, 6), None)} for name in names}
    with open_with(tmp_path, shares, ram=80 * RECORD, ssd=MIB) as pool:
        models = [
            pool.register(spec(name, layout=WIDE if number == 4 else LAYOUT)) for number, name in enumerate(names)
        ]
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=partial(_run_wild, pool, model, shares[model.name]["ram"][0], number, failures))
            for number, model in enumerate(models)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert failures == []
        check(pool)
        assert all(account.in_flight[RAM] == 0 for account in pool._engine.index.ledger.accounts.values())


def _run_wild(pool: Pool, model: Model, guaranteed: int, number: int, failures: list[BaseException]) -> None:
    """Keeps within its guarantee one prompt that must always be there, and else does what it likes."""
    random = Random(number)
    mine = guaranteed * RECORD // model.layout.record_bytes
    try:
        store(model, prompt(mine, seed=1))
        leases = [model.match(prompt(mine, seed=1))]  # leased: within the guarantee by the model's own will
        assert leases[0].blocks == mine
        for _ in range(60):
            choice = random.random()
            if choice < 0.6:
                store(model, prompt(random.randint(1, 12), seed=random.randint(2, 9)))
            elif choice < 0.8 and len(leases) < 6:
                leases.append(model.match(prompt(random.randint(1, 12), seed=random.randint(2, 9))))
            elif len(leases) > 1:
                leases.pop().close()
            assert load(model, prompt(mine, seed=1)) == mine
        for lease in leases:
            lease.close()
    except BaseException as error:
        failures.append(error)


def test_unregistering_gives_back_the_bytes_of_every_tier_and_says_how_many(tmp_path: Path) -> None:
    with open_with(tmp_path, {}, ssd=4 * MIB) as pool:
        model, other = pool.register(spec()), pool.register(spec("other"))
        store(model, prompt(5, seed=1))
        store(model, prompt(5, seed=1), "acme")
        store(other, prompt(5, seed=1))
        flushed(pool)
        report = pool.unregister("m")
        assert report.blocks == {TierName.RAM: 10, TierName.SSD: 10}
        assert report.bytes == {TierName.RAM: 10 * RECORD, TierName.SSD: 10 * RECORD}
        assert pool._engine.ram.used_bytes == 5 * RECORD
        assert load(other, prompt(5, seed=1)) == 5
        with pytest.raises(InputError, match="not known"):
            pool.model("m")
        with pytest.raises(InputError, match="register it again"):
            model.match(prompt(5, seed=1))
        check(pool)


def test_unregistering_with_leases_open_waits_for_their_end_and_nobody_else_can_match(tmp_path: Path) -> None:
    with open_with(tmp_path, {}) as pool:
        model = pool.register(spec())
        store(model, prompt(5, seed=1))
        lease = model.match(prompt(5, seed=1))
        report = pool.unregister("m")
        assert report.leased_blocks == 5
        assert pool._engine.ram.used_bytes == 5 * RECORD
        again = pool.register(spec())
        assert matched(again, prompt(5, seed=1)) == 0
        lease.close()
        eventually(lambda: pool._engine.ram.used_bytes == 0, "its bytes are given back")
        assert store(again, prompt(5, seed=1)).stored == 5


def test_unregistering_one_revision_leaves_the_other_in_the_account(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (0, 8)}}) as pool:
        pool.register(spec(weights="old"))
        new = pool.register(spec(weights="new"))
        with new.match(prompt(4, seed=1)):
            pool.unregister("m", fingerprint=identity(weights="old").fingerprint)
            pool._engine.wake()
            store(new, prompt(12, seed=1))
        assert held(pool, "m") == 8, "its blocks are charged, and its limit holds"
        check(pool)


def test_accounts_of_models_that_were_unregistered_are_closed_in_the_end(tmp_path: Path) -> None:
    with open_with(tmp_path, {}) as pool:
        model = pool.register(spec())
        store(model, prompt(3, seed=1))
        with model.match(prompt(3, seed=1)):
            pool.unregister("m")
        pool._engine.wake()
        eventually(lambda: "m" not in pool._engine.index.ledger.accounts, "its account is closed")


def test_a_reload_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    base = config(ssd=4 * MIB, directory=tmp_path)
    with Pool.open(base) as pool:
        model = pool.register(spec())
        broken = with_quotas(config(ssd=4096, directory=tmp_path), {"m": {"ram": (0, 0)}})
        with pytest.raises(ConfigError):
            pool.reload(broken)
        assert store(model, prompt(4, seed=1)).stored == 4


def test_registered_guarantees_that_do_not_fit_any_more_do_not_keep_the_pool_shut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quotas = {TierName.RAM: QuotaConfig(guaranteed_bytes=100 * RECORD)}
    with open_with(tmp_path, {}, ram=128 * RECORD) as pool:
        pool.register(ModelSpec(identity=identity(), quotas=quotas))
    with open_with(tmp_path, {"m": {"ram": (0, 8)}}, ram=64 * RECORD) as pool:
        assert pool.model("m").name == "m"
    with open_with(tmp_path, {}, ram=64 * RECORD) as pool:
        assert "not in force" in caplog.text
        assert store(pool.model("m"), prompt(4, seed=1)).stored == 4


def test_a_restart_does_not_take_up_the_records_of_what_was_unregistered(tmp_path: Path) -> None:
    with open_with(tmp_path, {}, ssd=4 * MIB) as pool:
        store(pool.register(spec()), prompt(5, seed=1))
        store(pool.register(spec("other")), prompt(5, seed=1))
        flushed(pool)
        pool.unregister("m")
    with open_with(tmp_path, {}, ssd=4 * MIB) as pool:
        assert pool.stats().restored.dropped.get("unregistered", 0) in (0, 5)
        assert load(pool.model("other"), prompt(5, seed=1)) == 5
        assert matched(pool.register(spec()), prompt(5, seed=1)) == 0


def test_other_weights_under_the_same_name_are_served_nothing_of_the_old_ones(tmp_path: Path) -> None:
    with open_with(tmp_path, {}, ssd=4 * MIB) as pool:
        store(pool.register(spec()), prompt(5, seed=1))
        flushed(pool)
    with open_with(tmp_path, {}, ssd=4 * MIB) as pool:
        new = pool.register(spec(weights="new"))
        assert matched(new, prompt(5, seed=1)) == 0
        store(new, prompt(5, seed=1))
        assert load(new, prompt(5, seed=1)) == 5
        assert load(pool.register(spec()), prompt(5, seed=1)) == 5, "the old revision has its own, side by side"
        report = pool.unregister("m", fingerprint=identity().fingerprint)
        assert report.blocks[TierName.RAM] == 5
        assert load(new, prompt(5, seed=1)) == 5


def test_a_measured_prefill_rate_is_known_to_the_next_process(tmp_path: Path) -> None:
    with open_with(tmp_path, {}) as pool:
        pool.register(spec()).observe_prefill(1000, 0.5)
    with open_with(tmp_path, {}) as pool:
        assert pool.model("m").prefill_tokens_per_second == 2000


def test_use_of_each_model_and_tier_is_in_the_statistics(tmp_path: Path) -> None:
    with open_with(tmp_path, {"m": {"ram": (2, 8)}}, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(5, seed=1))
        flushed(pool)
        [account] = pool.stats().accounts
        assert account.name == "m"
        ram = account.tiers[TierName.RAM]
        assert (ram.blocks, ram.used_bytes, ram.guaranteed_bytes, ram.limit_bytes) == (
            5,
            5 * RECORD,
            2 * RECORD,
            8 * RECORD,
        )
        assert account.tiers[TierName.SSD].limit_bytes is None
        assert replace(account, name="m") == account


@pytest.mark.parametrize("seed", range(2))
def test_quotas_that_change_all_the_time_under_load_leave_every_count_exact(tmp_path: Path, seed: int) -> None:
    """Down to zero and up again, with and without guarantees, while three models store, lease and load."""
    names = ["m0", "m1", "m2"]
    base = config(ram=48 * RECORD, ssd=MIB, directory=tmp_path)
    with Pool.open(base) as pool:
        models = [pool.register(spec(name)) for name in names]
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=partial(_store_and_load, model, number, failures))
            for number, model in enumerate(models)
        ]
        for thread in threads:
            thread.start()
        random = Random(seed)
        while any(thread.is_alive() for thread in threads):
            shares = {name: {tier: _some_share(random) for tier in ("ram", "ssd")} for name in random.sample(names, 2)}
            pool.reload(with_quotas(base, shares))
            threads[0].join(0.02)
        for thread in threads:
            thread.join(60)
        assert failures == []
        pool.reload(with_quotas(base, {name: {"ram": (0, 4), "ssd": (0, 4)} for name in names}))
        eventually(lambda: all(held(pool, name, level) <= 4 for name in names for level in (RAM, SSD)), "limits hold")
        check(pool)
        ledger = pool._engine.index.ledger
        assert all(account.in_flight[RAM] == account.pinned == 0 for account in ledger.accounts.values())
        pool.reload(base)
        assert store(models[0], prompt(12, seed=99)).stored == 12


def _some_share(random: Random) -> tuple[int, int | None]:
    guaranteed = random.choice([0, 0, 3, 6])
    return guaranteed, random.choice([None, guaranteed, guaranteed + random.randint(0, 20)])


def _store_and_load(model: Model, number: int, failures: list[BaseException]) -> None:
    random = Random(number)
    leases = []
    try:
        for _ in range(150):
            blocks, first = random.randint(1, 10), random.randint(1, 8)
            store(model, prompt(blocks, seed=first))
            load(model, prompt(blocks, seed=first))
            if random.random() < 0.3:
                leases.append(model.match(prompt(blocks, seed=first)))
            if len(leases) > 2:
                leases.pop(0).close()
        for lease in leases:
            lease.close()
    except BaseException as error:
        failures.append(error)

"""A pool that evicts by the adaptive policy: quotas, ssd and erasure hold as they do under LRU."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kvpool.api import Eviction
from kvpool.config import RuntimeConfig
from kvpool.policy import POLICIES, Demand
from kvpool.policy.demand import DIGESTED_BLOCKS, MOST_EVENTS
from kvpool.pool.pool import Pool
from kvpool.prefix.node import RAM
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .kv import MIB, RECORD, check, config, empty_ram, flushed, load, matched, open_pool, prompt, spec, store

GUARANTEED, LIMIT = 8, 24


def pool_config(eviction: str) -> RuntimeConfig:
    plain = config(ram=40 * RECORD, ssd=4 * MIB).model_dump(mode="json", by_alias=True)
    quotas = {"ram": {"guaranteedBytes": GUARANTEED * RECORD, "limitBytes": LIMIT * RECORD}}
    models = [{"name": name, "quotas": quotas} for name in ("a", "b")]
    return RuntimeConfig.model_validate({**plain, "policy": {"eviction": eviction}, "models": models})


@pytest.mark.parametrize("eviction", [one.value for one in Eviction])
def test_quotas_ssd_and_erasure_hold_under_every_policy(tmp_path: Path, eviction: str) -> None:
    rng = Random(eviction)
    with Pool.open(pool_config(eviction), directory=tmp_path) as pool:
        models = [pool.register(spec(name)) for name in ("a", "b", "c")]
        for _ in range(150):
            model, tenant = rng.choice(models), rng.choice(["acme", "other"])
            tokens = prompt(rng.randint(1, 12), seed=min(int(rng.expovariate(0.1)), 60))
            store(model, tokens, tenant)
            load(model, tokens, tenant)
        flushed(pool)
        check(pool, [])
        index = pool._engine.index
        learners = [account.learner for account in index.ledger.accounts.values()]
        assert all((one is None) == (POLICIES[eviction].make_learner is None) for one in learners)
        for name in ("a", "b"):
            assert index.ledger.accounts[name].bytes[RAM] <= LIMIT * RECORD
        asked = prompt(12, seed=0)
        store(models[0], asked, "other")
        flushed(pool)
        pool.erase(tenant="acme")
        assert all(matched(model, prompt(12, seed=seed), "acme") == 0 for model in models for seed in range(60))
        empty_ram(pool)
        assert load(models[0], asked, "other") == 12, "what left ram is read back from ssd"
        store(models[0], asked, "acme")
        assert load(models[0], asked, "acme") == 12
        check(pool, [])
        assert pool.stats().tiers[TierName.RAM].used_bytes <= 40 * RECORD


def test_a_pool_learns_as_it_stores_and_one_that_only_hits_learns_beside(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=64 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(12))
        learner = pool._engine.index.ledger.accounts["m"].learner
        assert isinstance(learner, Demand)

        def ask() -> None:
            for _ in range(1 + DIGESTED_BLOCKS // 12):
                assert matched(model, prompt(12)) == 12

        ask()
        store(model, prompt(1, seed=1))
        assert learner.hindsight.asked >= DIGESTED_BLOCKS, "the thread that stores has learned"
        asked = learner.hindsight.asked
        ask()
        eventually(lambda: learner.hindsight.asked > asked, "the housekeeper has learned")
        for _ in range(3 * MOST_EVENTS):
            matched(model, prompt(1))
        eventually(lambda: learner.undigested < MOST_EVENTS, "what is kept of requests that nobody digested is bounded")

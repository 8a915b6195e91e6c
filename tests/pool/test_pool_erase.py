"""After an erasure nothing of the tenant can be matched: not here, not after a restart, whatever was going on."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path

import pytest

from kvpool.blocks.record import Buffer
from kvpool.errors import InputError
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import Refusal
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .disks import SickDisk
from .kv import (
    MIB,
    RECORD,
    WIDE,
    Prompt,
    check,
    empty_ram,
    flushed,
    load,
    loaded_blocks,
    matched,
    open_pool,
    prompt,
    spec,
    store,
    stored_below,
)

RAM, SSD = TierName.RAM, TierName.SSD
FOUR = prompt(4, seed=1)


def ram_used(pool: Pool) -> int:
    return pool.stats().tiers[RAM].used_bytes


def test_an_erased_tenant_is_gone_from_every_tier_and_model_and_nobody_else_is(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        small, wide = pool.register(spec("small")), pool.register(spec("wide", layout=WIDE))
        stored_below(pool, small, FOUR, "acme")
        load(small, FOUR[:8], "acme")
        store(wide, FOUR, "acme")
        store(small, FOUR, "other")
        flushed(pool)
        report = pool.erase(tenant="acme")
        assert (report.epoch, report.leased_blocks) == (1, 0)
        assert report.blocks == {RAM: 2 + 4, SSD: 4 + 4}
        assert report.bytes == {tier: n * RECORD + 4 * WIDE.record_bytes for tier, n in ((RAM, 2), (SSD, 4))}
        assert matched(small, FOUR, "acme") == matched(wide, FOUR, "acme") == 0
        assert load(small, FOUR, "other") == 4
        check(pool, leases=())
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        assert matched(pool.model("small"), FOUR, "acme") == matched(pool.model("wide"), FOUR, "acme") == 0
        assert load(pool.model("small"), FOUR, "other") == 4


def test_models_that_this_process_has_not_registered_are_erased_too(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        store(pool.register(spec()), FOUR, "acme")
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert pool.erase(tenant="acme").blocks[SSD] == 4
        assert matched(pool.model("m"), FOUR, "acme") == 0
        check(pool, leases=())


def test_what_is_stored_after_the_erasure_is_kept(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        for epoch in range(1, 4):
            before, after = Prompt(model, FOUR, f"{epoch - 1}"), Prompt(model, FOUR, f"{epoch}")
            model.store(FOUR, before, tenant="acme")
            assert pool.erase(tenant="acme").epoch == epoch
            assert model.store(FOUR, after, tenant="acme").stored == 4
            with model.match(FOUR, tenant="acme") as lease:
                assert (lease.load(after), after.wrong) == (len(FOUR), [])
    with open_pool(tmp_path, ssd=MIB) as pool, pool.model("m").match(FOUR, tenant="acme") as lease:
        again = Prompt(pool.model("m"), FOUR, "3")
        assert (lease.load(again), again.wrong) == (len(FOUR), [])


def test_a_tenant_that_has_stored_nothing_can_be_erased(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        report = pool.erase(tenant="nobody")
        assert (report.epoch, report.blocks, report.leased_blocks) == (1, {RAM: 0, SSD: 0}, 0)


def test_an_erasure_is_durable_before_it_returns(tmp_path: Path) -> None:
    with open_pool(tmp_path / "pool", ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR, "acme")
        pool.erase(tenant="acme")
        shutil.copytree(tmp_path / "pool", tmp_path / "crashed")
    with open_pool(tmp_path / "crashed", ssd=MIB) as pool:
        assert matched(pool.model("m"), FOUR, "acme") == 0
        assert pool.stats().restored.dropped == {"erased": 4}
        assert pool.erase(tenant="acme").epoch == 2
        check(pool, leases=())


def test_a_lease_outlives_the_erasure_and_its_memory_goes_with_it(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        store(model, FOUR + prompt(2, seed=2), "acme")
        flushed(pool)
        lease = model.match(FOUR, tenant="acme")
        report = pool.erase(tenant="acme")
        assert (report.leased_blocks, report.blocks[RAM]) == (4, 2)
        assert matched(model, FOUR, "acme") == 0
        assert loaded_blocks(lease, model, FOUR, "acme") == 4
        assert ram_used(pool) == 4 * RECORD
        lease.close()
        eventually(lambda: ram_used(pool) == 0, "the housekeeper takes it back")
        check(pool, leases=())


def test_an_open_lease_of_blocks_on_ssd_can_be_loaded_after_the_erasure_and_keeps_nothing(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR, "acme")
        with model.match(FOUR, tenant="acme") as lease:
            pool.erase(tenant="acme")
            assert loaded_blocks(lease, model, FOUR, "acme") == 4
            assert ram_used(pool) == 0, "what was read was delivered, and not kept"
        eventually(lambda: pool.stats().tiers[SSD].blocks == 0, "the housekeeper takes it back")
        check(pool, leases=())


def test_a_store_during_which_its_tenant_is_erased_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    class Erasing(Prompt):
        def read_block(self, index: int, into: Buffer) -> None:
            super().read_block(index, into)
            if index == 35:
                pool.erase(tenant="acme")

    with open_pool(tmp_path, ram=128 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        tokens = prompt(80)
        result = model.store(tokens, Erasing(model, tokens, "acme"), tenant="acme")
        assert result.stored <= 32
        assert result.refused == {Refusal.ERASED: 80 - result.stored}
        assert matched(model, tokens, "acme") == 0
        eventually(lambda: ram_used(pool) == 0, "nothing of it is left")
        check(pool, leases=())
        assert store(model, tokens, "acme").stored == 80
    with open_pool(tmp_path, ram=128 * RECORD, ssd=4 * MIB) as pool:
        assert load(pool.model("m"), tokens, "acme") == 80


def test_what_is_being_written_while_its_tenant_is_erased_is_not_kept(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=MIB, disk=disk) as pool:
        model = pool.register(spec())
        disk.stalls = lambda name: name == "pwritev"
        store(model, FOUR, "acme")
        eventually(lambda: disk.held > 0, "the write has begun")
        try:
            pool.erase(tenant="acme")
            assert matched(model, FOUR, "acme") == 0
        finally:
            disk.recover()
        flushed(pool)
        eventually(lambda: ram_used(pool) == 0, "what was leased for writing is taken back")
        tier = pool._engine.store.tier
        assert tier is not None
        assert tier.stats().live_records == pool.stats().tiers[SSD].blocks == 0
        assert pool.stats().write_behind.saved_blocks == 0
        check(pool, leases=())
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert matched(pool.model("m"), FOUR, "acme") == 0


def test_what_is_being_read_while_its_tenant_is_erased_harms_nobody(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ram=16 * RECORD, ssd=MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR, "acme")
        disk.stalls = lambda name: name == "preadv"
        arrived: list[int] = []
        reading = threading.Thread(target=lambda: arrived.append(load(model, FOUR, "acme")))
        reading.start()
        try:
            eventually(lambda: disk.held > 0, "the read has begun")
            pool.erase(tenant="acme")
            store(model, prompt(8, seed=2), "acme")
        finally:
            disk.recover()
            reading.join(20)
        assert arrived == [4]
        assert load(model, prompt(8, seed=2), "acme") == 8
        eventually(lambda: pool.stats().tiers[RAM].blocks == 8, "nothing else is left")
        check(pool, leases=())


@pytest.mark.parametrize("round_", range(5))
def test_what_was_stored_before_is_gone_whatever_is_stored_meanwhile(quick_path: Path, round_: int) -> None:
    with open_pool(quick_path, ram=40 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        store(model, FOUR, "acme")
        done = threading.Event()
        others = [threading.Thread(target=partial(_keep_storing, model, seed, done)) for seed in (100, 200)]
        for thread in others:
            thread.start()
        try:
            for seed in range(20):
                pool.erase(tenant="acme")
                assert matched(model, FOUR, "acme") == 0
                assert matched(model, prompt(3, seed=500 + seed - 1), "acme") == 0
                store(model, prompt(3, seed=500 + seed), "acme")
                if seed % 4 == round_ % 4:
                    empty_ram(pool)
        finally:
            done.set()
            for thread in others:
                thread.join(20)
        check(pool, leases=())
    with open_pool(quick_path, ram=40 * RECORD, ssd=MIB) as pool:
        assert matched(pool.model("m"), FOUR, "acme") == 0
        check(pool, leases=())


def _keep_storing(model: Model, first_seed: int, done: threading.Event) -> None:
    seed = first_seed
    while not done.is_set():
        store(model, prompt(1 + seed % 6, seed=1000 + seed % 40), "acme")
        load(model, prompt(1 + seed % 6, seed=1000 + seed % 40), "acme")
        store(model, prompt(2, seed=1000 + seed % 40), "other")
        seed += 1


def test_where_tenants_share_one_of_them_cannot_be_erased(tmp_path: Path) -> None:
    with open_pool(tmp_path, sharing={"scope": "pool"}) as pool:
        model = pool.register(spec())
        model.store(FOUR, Prompt(model, FOUR), tenant="acme")
        with pytest.raises(InputError, match=r"sharing\.scope is pool: .*; use scope tenant, or a new directory"):
            pool.erase(tenant="acme")
        assert matched(model, FOUR, "acme") == 4

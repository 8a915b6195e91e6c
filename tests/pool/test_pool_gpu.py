"""The gpu tier in the engine, on memory of the CPU through the same interface: what a device does is never an error."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from kvpool.api.codec import Codec
from kvpool.blocks.layout import KVLayout
from kvpool.config import RuntimeConfig
from kvpool.config.runtime import GpuConfig, QuotaConfig
from kvpool.errors import ConfigError, InputError
from kvpool.pool.gpu_parts import Gpu
from kvpool.pool.gpu_store import TorchDevice
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec, Verdict
from kvpool.prefix.node import GPU, RAM, SSD
from kvpool.tiers.extents import PageLock
from kvpool.tiers.gpu.cpu import CpuDevice
from kvpool.tiers.gpu.device import Device
from kvpool.tiers.gpu.tier import GpuTier
from kvpool.tiers.tier import TierName, TierUnavailableError
from tests.tiers.gpu.devices import REAL_DEVICES, FullDevice, IllDevice, LateDevice
from tests.waiting import eventually

from .kv import (
    DEADLINE_S,
    LAYOUT,
    MIB,
    RECORD,
    WIDE,
    Prompt,
    check,
    config,
    empty_ram,
    flushed,
    identity,
    matched,
    prompt,
    ram_places,
    spec,
)
from .kv import load as load_to_host
from .kv import store as store_from_host
from .test_pool_threads import Crowd

CPU = TorchDevice("cpu")
make_device: Callable[[], Device] = CpuDevice
"""What tests use that ask for nothing else; see `device_of_this_machine`."""


@pytest.fixture(autouse=True, params=REAL_DEVICES)
def device_of_this_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on memory of the CPU, and again on a GPU where there is one."""
    request.param()
    monkeypatch.setattr(sys.modules[__name__], "make_device", request.param)


class DevicePrompt(Prompt):
    """A prompt whose blocks are on the device: notes which were taken and given there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read_on_device: list[int] = []
        self.written_from_device: list[int] = []

    def read_block_on_device(self, index: int, into: Any) -> None:
        self.read_on_device.append(index)
        into.copy_(torch.from_numpy(self._payload(index)))

    def write_block_from_device(self, index: int, payload: Any) -> None:
        self.written_from_device.append(index)
        self.write_block(index, payload.cpu().numpy())


class Devices:
    """Opens tiers on the devices that `make` gives, with extents of a record each, so that little memory is cut."""

    def __init__(self, make: Callable[[], Device], *, extent_bytes: int = RECORD) -> None:
        self.make = make
        self.extent_bytes = extent_bytes
        self.opened: list[GpuTier] = []

    def open_tier(self, config: GpuConfig) -> GpuTier:
        tier = GpuTier(
            config.capacity_bytes,
            device=self.make(),
            initial_bytes=config.initial_bytes,
            streams=config.streams,
            extent_bytes=self.extent_bytes,
            margin_bytes=0,
        )
        self.opened.append(tier)
        return tier

    def page_lock(self, max_bytes: int) -> PageLock:
        raise TierUnavailableError(TierName.GPU, "not wanted here")


def gpu_config(
    *,
    gpu: int = 16 * RECORD,
    quotas: Mapping[str, QuotaConfig] | None = None,
    after_hits: int = 2,
    eviction: str = "lru",
    **options: Any,
) -> RuntimeConfig:
    plain = config(**options).model_dump(mode="json", by_alias=True)
    plain["gpu"] = {"capacityBytes": gpu}
    plain["policy"] |= {"gpuAfterHits": after_hits, "eviction": eviction}
    plain["models"] = [
        {"name": name, "quotas": {"gpu": quota.model_dump(mode="json", by_alias=True)}}
        for name, quota in (quotas or {}).items()
    ]
    return RuntimeConfig.model_validate(plain)


@contextmanager
def opened(path: Path, *, device: Any = None, at_rest: bool = True, **options: Any) -> Iterator[Pool]:
    """A pool with a gpu tier; its keeper sleeps unless asked to run (`at_rest`), so that a test decides what moves."""
    pool = Pool.open(gpu_config(**options), directory=path, gpu=device or Devices(make_device))
    touching = pool._engine.ram._prefault_thread
    if touching is not None:
        touching.join()
    if at_rest:
        pool._gpu_keeper.close(time.monotonic() + DEADLINE_S)
        gpu_of(pool).store.wake = lambda: None
    with pool:
        yield pool
        check_gpu(pool)


def gpu_of(pool: Pool) -> Gpu:
    gpu = pool._engine.gpu
    assert gpu is not None
    return gpu


def check_gpu(pool: Pool) -> None:
    """Fail unless index and tiers agree, and no slot of the device is nobody's."""
    check(pool)
    gpu, index = gpu_of(pool), pool._engine.index
    if gpu.store.tier is not None:
        eventually(lambda: gpu.store.used_bytes == index.copy_bytes[GPU], "every slot on the device is one block's")
        gpu.store.tier.slab.check_integrity()
    assert all(account.in_flight[GPU] == 0 for account in index.ledger.accounts.values())


def keep(pool: Pool) -> None:
    """What the keeper does once a second."""
    for chore in gpu_of(pool).chores():
        chore()


def fall_out(gpu: Gpu) -> None:
    """As when a call to the device has failed."""
    tier = gpu.store.tier
    assert tier is not None
    gpu.store._fall_out(tier, "an uncorrectable error")


def mode_after_a_round(pool: Pool) -> str:
    keep(pool)
    return pool.stats().mode


def store(model: Model, tokens: Any, tenant: str = "default") -> DevicePrompt:
    source = DevicePrompt(model, tokens, tenant)
    model.store(tokens, source, tenant=tenant)
    return source


def load(model: Model, tokens: Any, tenant: str = "default") -> dict[TierName, int]:
    """Match and load into device memory; how many blocks came from where. Fails if one of them is wrong."""
    with model.match(tokens, tenant=tenant) as lease:
        return loaded(lease, model, tokens, tenant)


def loaded(lease: Lease, model: Model, tokens: Any, tenant: str = "default") -> dict[TierName, int]:
    sink = DevicePrompt(model, tokens, tenant)
    arrived = lease.load(sink)
    assert sink.wrong == []
    assert sink.written == list(range(len(sink.written)))
    assert arrived == len(sink.written) * model.layout.block_tokens
    assert len(sink.written_from_device) == lease.served.get(TierName.GPU, 0)
    return lease.served


def held(pool: Pool, level: int = GPU, name: str = "m") -> int:
    return pool._engine.index.ledger.account(name).copies[level]


def test_what_an_engine_on_the_device_stores_lies_there_and_comes_back_without_a_copy_on_the_host(
    tmp_path: Path,
) -> None:
    with opened(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        source = store(model, prompt(6))
        assert (source.read_on_device, source.read) == (list(range(6)), [])
        assert load(model, prompt(6)) == {TierName.GPU: 6}
        stats = pool.stats()
        assert stats.mode == "normal"
        assert stats.tiers[TierName.GPU].blocks == stats.tiers[TierName.GPU].loaded_blocks == 6
        assert stats.tiers[TierName.RAM].blocks == 0
        assert stats.accounts[0].tiers[TierName.GPU].used_bytes == 6 * RECORD
        assert pool.notices == ()
        assert [report.tiers[0] for report in model.explain(prompt(6))] == [TierName.GPU] * 6


def test_a_source_and_a_sink_on_the_host_work_as_without_a_gpu_tier(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model = pool.register(spec())
        store_from_host(model, prompt(4))
        assert held(pool) == 0
        assert load_to_host(model, prompt(4)) == 4
        store(model, prompt(9, seed=1))
        assert held(pool) == 9
        assert load_to_host(model, prompt(9, seed=1)) == 9, "what is on the device alone comes to the host too"
        assert pool.stats().tiers[TierName.GPU].loaded_blocks == 9
        assert load(model, prompt(4)) == {TierName.RAM: 4}


def test_payloads_that_end_within_a_page_come_back_too(tmp_path: Path) -> None:
    with opened(tmp_path, ssd=4 * MIB, gpu=8 * WIDE.record_bytes) as pool:
        model = pool.register(spec(layout=WIDE))
        store(model, prompt(5))
        assert load(model, prompt(5)) == {TierName.GPU: 5}
        assert load_to_host(model, prompt(5)) == 5
        flushed(pool)
        assert held(pool, SSD) == 5


def test_what_is_on_the_device_alone_is_written_to_ssd_behind_the_callers_back(tmp_path: Path) -> None:
    with opened(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(6))
        flushed(pool)
        assert (held(pool, GPU), held(pool, RAM), held(pool, SSD)) == (6, 0, 6)
    with Pool.open(config(ssd=4 * MIB), directory=tmp_path) as pool:
        assert load_to_host(pool.model("m"), prompt(6)) == 6


def test_closing_keeps_what_was_on_the_device_alone_also_where_ram_is_smaller(tmp_path: Path) -> None:
    with opened(tmp_path, ssd=4 * MIB, gpu=60 * RECORD, ram=8 * RECORD, secondHit=True) as pool:
        model = pool.register(spec())
        store(model, prompt(40))
        assert (held(pool, GPU), held(pool, SSD)) == (40, 0)
    with opened(tmp_path, ssd=4 * MIB) as pool:
        assert load(pool.model("m"), prompt(40)) == {TierName.SSD: 40}


def test_the_coldest_goes_down_to_ram_before_the_device_is_full_and_from_there_to_ssd(tmp_path: Path) -> None:
    with opened(tmp_path, ssd=4 * MIB, gpu=20 * RECORD) as pool:
        model = pool.register(spec())
        for seed in range(3):
            store(model, prompt(6, seed=seed))
        assert load(model, prompt(6, seed=0)) == {TierName.GPU: 6}
        flushed(pool)  # what is being written is leased
        gpu_of(pool).demoter.run()
        assert held(pool, GPU) == 15
        assert held(pool, RAM) == 3
        assert load(model, prompt(6, seed=0)) == {TierName.GPU: 6}
        assert load(model, prompt(6, seed=1)) == {TierName.GPU: 3, TierName.RAM: 3}, "the end of the coldest"
        assert gpu_of(pool).demoter.demoted_blocks == 3


def test_a_store_that_finds_the_device_full_moves_colder_blocks_down_and_loses_none(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model = pool.register(spec())
        for seed in range(5):
            assert len(store(model, prompt(6, seed=seed)).read_on_device) == 6
        assert held(pool, GPU) == 16
        assert held(pool, RAM) == 14
        for seed in range(5):
            assert sum(load(model, prompt(6, seed=seed)).values()) == 6


def test_a_block_comes_back_through_gpu_ram_and_ssd(tmp_path: Path) -> None:
    with opened(tmp_path, ssd=8 * MIB, ram=16 * RECORD, after_hits=1000) as pool:
        model = pool.register(spec())
        for seed in range(8):
            store(model, prompt(6, seed=seed))
            flushed(pool)
        assert load(model, prompt(6, seed=7)) == {TierName.GPU: 6}
        assert load(model, prompt(6, seed=0)) == {TierName.SSD: 6}
        found = {tier for seed in range(8) for tier in load(model, prompt(6, seed=seed))}
        assert found == {TierName.GPU, TierName.RAM, TierName.SSD}


def test_leased_blocks_stay_on_the_device_and_the_rest_of_a_store_goes_to_ram(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(12, seed=1))
        with model.match(prompt(12, seed=1)) as lease:
            source = store(model, prompt(10, seed=2))
            assert (len(source.read_on_device), len(source.read)) == (4, 6)
            assert load(model, prompt(10, seed=2)) == {TierName.GPU: 4, TierName.RAM: 6}
            gpu_of(pool).demoter.run()
            assert loaded(lease, model, prompt(12, seed=1)) == {TierName.GPU: 12}
        assert load(model, prompt(10, seed=2)) == {TierName.RAM: 10}


def test_out_of_memory_in_the_middle_of_a_batch_puts_the_rest_into_ram(tmp_path: Path) -> None:
    device = FullDevice(5 * RECORD)
    with opened(tmp_path, device=Devices(lambda: device)) as pool:
        model = pool.register(spec())
        with model.match(prompt(1)):
            source = store(model, prompt(9))
        assert source.read_on_device == list(range(5))
        assert source.read == list(range(5, 9))
        assert load(model, prompt(9)) == {TierName.GPU: 5, TierName.RAM: 4}
        assert pool.stats().mode == "normal"
        store(model, prompt(5, seed=1))
        assert load(model, prompt(5, seed=1)) == {TierName.GPU: 5}, "a full device makes room as a full tier does"
        assert sum(load(model, prompt(9)).values()) == 9
        gpu_of(pool).demoter.run()
        assert held(pool, GPU) == 3, "nearly full is measured by what the device has"


def test_memory_is_given_back_when_the_engine_needs_it_and_nothing_is_lost(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(16))
        assert pool.release_device_memory(6 * RECORD) == 6 * RECORD
        assert pool.stats().tiers[TierName.GPU].capacity_bytes == 10 * RECORD
        assert (held(pool, GPU), held(pool, RAM)) == (10, 6)
        assert load(model, prompt(16)) == {TierName.GPU: 10, TierName.RAM: 6}


def test_leased_blocks_are_given_back_when_their_lease_has_ended(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(16))
        with model.match(prompt(16)) as lease:
            assert pool.release_device_memory(6 * RECORD) == 0
            assert loaded(lease, model, prompt(16)) == {TierName.GPU: 16}
        gpu_of(pool).memory.vacate_leaving()
        assert held(pool, GPU) == 10
        assert sum(load(model, prompt(16)).values()) == 16


def test_without_a_gpu_tier_there_is_no_memory_to_give_back(tmp_path: Path) -> None:
    with Pool.open(config(), directory=tmp_path) as pool:
        assert pool.release_device_memory(1 << 30) == 0


def test_a_machine_without_the_device_opens_without_the_tier_and_finds_it_later(tmp_path: Path) -> None:
    class Absent(Devices):
        there = False

        def open_tier(self, config: GpuConfig) -> GpuTier:
            if not self.there:
                raise TierUnavailableError(TierName.GPU, "torch finds no CUDA device")
            return super().open_tier(config)

    device = Absent(make_device)
    with opened(tmp_path, device=device, at_rest=False) as pool:
        model = pool.register(spec())
        source = store(model, prompt(3))
        assert (source.read_on_device, source.read) == ([], [0, 1, 2])
        assert load(model, prompt(3)) == {TierName.RAM: 3}
        stats = pool.stats()
        assert stats.mode == "no-gpu"
        assert not stats.tiers[TierName.GPU].available
        assert stats.tiers[TierName.GPU].last_error == "torch finds no CUDA device"
        device.there = True
        eventually(lambda: pool.stats().mode == "normal", "the device is found")
        assert len(store(model, prompt(3, seed=1)).read_on_device) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_configuration_with_a_gpu_runs_on_a_machine_without_one(tmp_path: Path) -> None:
    with Pool.open(gpu_config(), directory=tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(3))
        assert load(model, prompt(3)) == {TierName.RAM: 3}
        assert pool.stats().mode == "no-gpu"


def test_a_device_that_fails_in_the_middle_of_a_store_is_no_error_and_what_lay_there_is_forgotten(
    tmp_path: Path,
) -> None:
    ill, well = IllDevice(), make_device()
    devices: list[Device] = [well, ill]
    with opened(tmp_path, device=Devices(devices.pop)) as pool:
        model = pool.register(spec())
        store(model, prompt(4))
        store_from_host(model, prompt(3, seed=1))
        ill.fails = {"record", "clear", "allocate", "copy", "query"}
        source = store(model, prompt(3, seed=2))
        assert source.read == [0, 1, 2]
        assert load(model, prompt(3, seed=2)) == {TierName.RAM: 3}
        assert load(model, prompt(3, seed=1)) == {TierName.RAM: 3}
        assert load(model, prompt(4)) == {}
        gpu_of(pool).forget_lost()
        assert held(pool, GPU) == 0
        assert matched(model, prompt(4)) == 0
        assert model.explain(prompt(4))[0].verdict is Verdict.TIER_DOWN
        assert pool.stats().mode == "no-gpu"
        check(pool)
        eventually(lambda: mode_after_a_round(pool) == "normal", "another tier is opened")
        assert len(store(model, prompt(4)).read_on_device) == 4
        assert load(model, prompt(4)) == {TierName.GPU: 4}


@pytest.mark.parametrize("direct", [False, True])
def test_a_device_that_hangs_holds_a_call_up_for_its_budget_once_and_no_bytes_arrive_where_somebody_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr("kvpool.tiers.gpu.tier.CLOSE_S", 0.05)
    device = LateDevice(1, direct=direct)
    with opened(tmp_path, device=Devices(lambda: device)) as pool:
        model, gpu = pool.register(spec()), gpu_of(pool)
        store(model, prompt(4))
        store_from_host(model, prompt(2, seed=1))
        gpu.store._budget_s = 0.05
        device.hung = True
        assert gpu.demoter.bring_down(2 * RECORD) == 0
        assert pool.stats().mode == "no-gpu"
        assert load_to_host(model, prompt(4)) == 0
        used = pool._engine.ram.used_bytes
        gpu.forget_lost()
        store_from_host(model, prompt(40, seed=2))
        assert used == 4 * RECORD, "the slots that bytes may still arrive in are not given to anybody"
        device.hung = False
        device.run()
        assert load_to_host(model, prompt(40, seed=2)) == 40
        assert load_to_host(model, prompt(2, seed=1)) == 2
        lost = pool._engine.index.ledger.account("m")
        assert lost.in_flight[RAM] == 2 * RECORD
        lost.in_flight[RAM] = 0
        pool._engine.ram.drop(unaccounted(pool))


def unaccounted(pool: Pool) -> list[int]:
    """Slots in RAM that are in use, and no block's."""
    extents = pool._engine.ram.slab._extents()
    return sorted({slot for extent in extents for slot in extent.slots_in_use()} - set(ram_places(pool)))


def test_places_of_a_tier_that_fell_out_mean_nothing_to_the_next_one(tmp_path: Path) -> None:
    with opened(tmp_path, device=Devices(make_device)) as pool:
        model, gpu = pool.register(spec()), gpu_of(pool)
        store(model, prompt(4))
        with model.match(prompt(4)) as lease:
            fall_out(gpu)
            assert gpu.store.open()
            store(model, prompt(4, seed=1))
            gone = pool._engine.index.evict(GPU, 2 * RECORD)
            assert loaded(lease, model, prompt(4)) == {}
            pool._engine.copies.release(gone)
            gpu.forget_lost()
        assert sum(load(model, prompt(4, seed=1)).values()) == 4 - len(gone)


def test_a_load_goes_on_with_what_lies_elsewhere_when_the_device_fails_in_its_middle(tmp_path: Path) -> None:
    class Failing(DevicePrompt):
        def write_block_from_device(self, index: int, payload: Any) -> None:
            super().write_block_from_device(index, payload)
            if index == 2:
                fall_out(gpu)

    with opened(tmp_path, ssd=4 * MIB) as pool:
        model, gpu = pool.register(spec()), gpu_of(pool)
        store(model, prompt(6))
        flushed(pool)
        sink = Failing(model, prompt(6), "default")
        with model.match(prompt(6)) as lease:
            assert lease.load(sink) == 6 * LAYOUT.block_tokens
            assert lease.served == {TierName.GPU: 3, TierName.SSD: 3}
        assert (sink.written, sink.wrong) == (list(range(6)), [])
        keep(pool)


def test_what_is_loaded_again_and_again_goes_up_to_the_device(tmp_path: Path) -> None:
    with opened(tmp_path, after_hits=3) as pool:
        model = pool.register(spec())
        store_from_host(model, prompt(5))
        for _ in range(2):
            assert load(model, prompt(5)) == {TierName.RAM: 5}
            keep(pool)
        assert load_to_host(model, prompt(5)) == 5
        keep(pool)
        assert held(pool, GPU) == 0, "loads to the host do not count"
        assert load(model, prompt(5)) == {TierName.RAM: 5}
        keep(pool)
        assert load(model, prompt(5)) == {TierName.GPU: 5}
        assert held(pool, RAM) == 0, "else it could not be evicted there"


def test_a_promotion_takes_the_place_of_colder_blocks_only_and_of_none_that_are_leased(tmp_path: Path) -> None:
    with opened(tmp_path, after_hits=1) as pool:
        model = pool.register(spec())
        store_from_host(model, prompt(4))
        store(model, prompt(16, seed=1))
        with model.match(prompt(16, seed=1)):
            assert load(model, prompt(4)) == {TierName.RAM: 4}
            gpu_of(pool).promoter.run()
            assert held(pool, GPU) == 16, "all is leased"
        pool._engine.index.uses += 1
        load(model, prompt(16, seed=1))
        gpu_of(pool).promoter.note(pin_of(model, prompt(4)), 0)
        load(model, prompt(16, seed=1))
        gpu_of(pool).promoter.run()
        assert load(model, prompt(16, seed=1)) == {TierName.GPU: 16}, "they were used later"
        load(model, prompt(4))
        gpu_of(pool).promoter.run()
        assert load(model, prompt(4)) == {TierName.GPU: 4}
        assert load(model, prompt(16, seed=1)) == {TierName.GPU: 12, TierName.RAM: 4}


def pin_of(model: Model, tokens: Any) -> Any:
    with model.match(tokens) as lease:
        return lease._pin


def test_a_limit_holds_on_the_device_and_beyond_it_blocks_go_down(tmp_path: Path) -> None:
    quotas = {"m": QuotaConfig(limit_bytes=5 * RECORD)}
    with opened(tmp_path, quotas=quotas) as pool:
        model, other = pool.register(spec()), pool.register(spec("other"))
        store(other, prompt(6, seed=9))
        for seed in range(3):
            store(model, prompt(4, seed=seed))
            assert held(pool, GPU) <= 5
        assert load(other, prompt(6, seed=9)) == {TierName.GPU: 6}
        for seed in range(3):
            assert sum(load(model, prompt(4, seed=seed)).values()) == 4


def test_a_limit_that_is_lowered_moves_blocks_down(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(10))
        lowered = gpu_config(quotas={"m": QuotaConfig(limit_bytes=3 * RECORD)})
        pool.reload(lowered)
        pool._chores.keep_quotas()
        assert (held(pool, GPU), held(pool, RAM)) == (3, 7)
        assert load(model, prompt(10)) == {TierName.GPU: 3, TierName.RAM: 7}


def test_what_is_guaranteed_on_the_device_stays_whatever_another_stores_leases_and_promotes(tmp_path: Path) -> None:
    quotas = {"m": QuotaConfig(guaranteed_bytes=6 * RECORD)}
    with opened(tmp_path, quotas=quotas, after_hits=1) as pool:
        model, wild = pool.register(spec()), pool.register(spec("wild"))
        store(model, prompt(6, seed=1))
        leases = []
        for seed in range(2, 8):
            store(wild, prompt(5, seed=seed))
            load(wild, prompt(5, seed=seed))
            keep(pool)
            leases.append(wild.match(prompt(5, seed=seed)))
        assert load(model, prompt(6, seed=1)) == {TierName.GPU: 6}
        assert held(pool, GPU, "wild") <= 10
        for lease in leases:
            lease.close()


def test_a_guarantee_that_was_not_used_can_be_had_though_another_has_filled_the_device(tmp_path: Path) -> None:
    quotas = {"m": QuotaConfig(guaranteed_bytes=6 * RECORD)}
    with opened(tmp_path, quotas=quotas) as pool:
        model, wild = pool.register(spec()), pool.register(spec("wild"))
        store(wild, prompt(16, seed=2))
        assert len(store(model, prompt(6, seed=1)).read_on_device) == 6
        assert load(model, prompt(6, seed=1)) == {TierName.GPU: 6}
        assert sum(load(wild, prompt(16, seed=2)).values()) == 16


def test_guarantees_above_what_the_device_has_left_are_kept_first_come_first_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quotas = {name: QuotaConfig(guaranteed_bytes=6 * RECORD) for name in ("m", "n")}
    with opened(tmp_path, quotas=quotas) as pool:
        one, two = pool.register(spec()), pool.register(spec("n"))
        gpu_of(pool).store.tier.resize(8 * RECORD)  # type: ignore[union-attr]
        gpu_of(pool).note_capacity()
        assert "first come, first served" in caplog.text
        store(one, prompt(6))
        store(two, prompt(6))
        assert (held(pool, GPU), held(pool, GPU, "n")) == (6, 2)
        assert load(one, prompt(6)) == {TierName.GPU: 6}
        assert load(two, prompt(6)) == {TierName.GPU: 2, TierName.RAM: 4}


def test_guarantees_above_the_capacity_and_quotas_without_a_tier_are_refused(tmp_path: Path) -> None:
    quota = {TierName.GPU: QuotaConfig(guaranteed_bytes=17 * RECORD)}
    with opened(tmp_path / "with") as pool, pytest.raises(ConfigError, match="gpu"):
        pool.register(ModelSpec(identity=identity(), quotas=quota))
    with Pool.open(config(), directory=tmp_path / "without") as pool, pytest.raises(InputError, match="gpu"):
        pool.register(ModelSpec(identity=identity(), quotas=quota))


def test_models_of_other_sizes_share_the_device(tmp_path: Path) -> None:
    with opened(tmp_path, gpu=24 * RECORD, device=Devices(make_device, extent_bytes=6 * RECORD)) as pool:
        narrow, wide = pool.register(spec()), pool.register(spec("wide", layout=WIDE))
        store(narrow, prompt(24))
        assert len(store(wide, prompt(6, seed=1)).read_on_device) == 6
        assert load(wide, prompt(6, seed=1)) == {TierName.GPU: 6}
        assert sum(load(narrow, prompt(24)).values()) == 24
        store(narrow, prompt(20, seed=2))
        assert sum(load(narrow, prompt(20, seed=2)).values()) == 20
        assert sum(load(wide, prompt(6, seed=1)).values()) == 6


def test_a_tenant_never_sees_what_another_had_in_the_slot(tmp_path: Path) -> None:
    class Peeking(DevicePrompt):
        def read_block_on_device(self, index: int, into: Any) -> None:
            seen.append(into.clone())
            super().read_block_on_device(index, into)

    seen: list[Any] = []
    with opened(tmp_path, gpu=4 * RECORD) as pool:
        model = pool.register(spec())
        store(model, prompt(4), tenant="a")
        model.store(prompt(4), Peeking(model, prompt(4), "b"), tenant="b")
        assert len(seen) == 4
        assert not any(bool(block.any()) for block in seen)
        assert load(model, prompt(4), tenant="b") == {TierName.GPU: 4}


def test_erased_and_unregistered_blocks_leave_the_device(tmp_path: Path) -> None:
    with opened(tmp_path) as pool:
        model, other = pool.register(spec()), pool.register(spec("other"))
        store(model, prompt(4), tenant="a")
        store(other, prompt(5), tenant="b")
        assert pool.erase(tenant="a").blocks[TierName.GPU] == 4
        assert pool.unregister("other").blocks[TierName.GPU] == 5
        assert gpu_of(pool).store.used_bytes == 0


def test_what_a_source_raises_reaches_the_caller_and_no_slot_is_lost(tmp_path: Path) -> None:
    class Failing(DevicePrompt):
        def read_block_on_device(self, index: int, into: Any) -> None:
            if index == 2:
                raise ZeroDivisionError
            super().read_block_on_device(index, into)

    with opened(tmp_path) as pool:
        model = pool.register(spec())
        with pytest.raises(ZeroDivisionError):
            model.store(prompt(4), Failing(model, prompt(4)))
        assert matched(model, prompt(4)) == 0
        assert gpu_of(pool).store.used_bytes == 0


def test_a_block_that_was_decoded_for_the_device_is_never_encoded_again(tmp_path: Path) -> None:
    large = KVLayout(layers=4, kv_heads=4, head_size=64, dtype=LAYOUT.dtype, block_tokens=4)
    plain = gpu_config(gpu=16 * large.record_bytes, ram=MIB, ssd=4 * MIB, after_hits=1).model_dump(
        mode="json", by_alias=True
    )
    plain["ram"]["codec"] = Codec.INT8_SYMMETRIC
    plain["compression"] |= {"onEviction": False, "outlierPercentile": 100.0}
    with Pool.open(RuntimeConfig.model_validate(plain), directory=tmp_path, gpu=Devices(make_device)) as pool:
        pool._gpu_keeper.close(time.monotonic() + DEADLINE_S)
        model = pool.register(spec(layout=large))
        source = Floats(model)
        model.store(prompt(4), source)
        codec = pool._engine.encodings.codec(model.identity.fingerprint, RAM)
        assert codec is not None
        eventually(lambda: held_bytes(pool, RAM) == 4 * codec.record_bytes, "all are encoded")
        encoded = pool.stats().encoding.encoded_blocks
        from_ram = arrived(model)
        keep(pool)
        assert held(pool, GPU) == 4
        assert arrived(model) == from_ram, "the device holds what ram would have given"
        assert held(pool, RAM) == 4, "the encoded copy stays"
        flushed(pool)
        empty_ram(pool)
        assert held(pool, RAM) < 4
        gpu_of(pool).demoter.bring_down(4 * large.record_bytes)
        pool._engine.ram_encoder.run()
        pool._engine.writer.want_everything()
        flushed(pool)
        assert pool.stats().encoding.encoded_blocks == encoded
        assert held_bytes(pool, RAM) == held(pool, RAM) * codec.record_bytes
        check_gpu(pool)


class Floats:
    """Blocks of floats that every codec can hold."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.arrived: list[bytes] = []

    def read_block(self, index: int, into: Any) -> None:
        values = np.random.Generator(np.random.PCG64(index)).standard_normal(len(into) // 4, np.float32)
        into[:] = values.view(np.uint8)

    def write_block(self, index: int, payload: Any) -> None:
        self.arrived.append(bytes(payload))

    def write_block_from_device(self, index: int, payload: Any) -> None:
        self.arrived.append(payload.cpu().numpy().tobytes())


def arrived(model: Model) -> list[bytes]:
    sink = Floats(model)
    with model.match(prompt(4)) as lease:
        lease.load(sink)
    return sink.arrived


def held_bytes(pool: Pool, level: int) -> int:
    return pool._engine.index.copy_bytes[level]


def test_a_shared_prefix_on_the_device_is_counted_and_protected(tmp_path: Path) -> None:
    with opened(tmp_path, sharing={"minPrefixTokens": 4}) as pool:
        model = pool.register(spec())
        shared = prompt(4)
        for seed in range(1, 6):
            store(model, [*shared, *prompt(3, seed=seed)])
        assert pool.stats().shared_bytes[TierName.GPU] == 4 * RECORD
        assert load(model, shared) == {TierName.GPU: 4}


def test_threads_store_and_load_on_a_device_that_is_too_small_and_falls_out(tmp_path: Path) -> None:
    with opened(tmp_path, ssd=8 * MIB, ram=24 * RECORD, after_hits=1, at_rest=False) as pool:
        models = [pool.register(spec()), pool.register(spec("wide", layout=WIDE))]
        crowd = Crowd()
        gpu = gpu_of(pool)
        stores: list[Callable[..., Any]] = [store, store_from_host]
        loads: list[Callable[..., Any]] = [load, load_to_host]

        def work(seed: int) -> None:
            random = Random(seed)
            for turn in range(60):
                model, tokens = random.choice(models), prompt(random.randrange(1, 8), seed=random.randrange(12))
                tenant = random.choice("ab")
                if random.random() < 0.5:
                    stores[random.randrange(2)](model, tokens, tenant)
                else:
                    loads[random.randrange(2)](model, tokens, tenant)
                if seed == 0 and turn % 15 == 14:
                    fall_out(gpu)
                    assert gpu.store.open()

        for seed in range(4):
            crowd.add(partial(work, seed))
        crowd.run()
        assert gpu.store.generation >= 3
        gpu.forget_lost()
        flushed(pool)
        eventually(lambda: not gpu.promoter._queue, "the keeper is idle")
        check(pool)


class Late(DevicePrompt):
    """A prompt whose copies are queued on a device that works late, on whatever stream is current."""

    def __init__(self, device: LateDevice, *args: Any) -> None:
        super().__init__(*args)
        self.device = device

    def read_block_on_device(self, index: int, into: Any) -> None:
        self.device.queue(self.device.current_stream(), partial(np.copyto, into.numpy(), self._payload(index)))

    def write_block_from_device(self, index: int, payload: Any) -> None:
        self.written_from_device.append(index)
        self.device.queue(self.device.current_stream(), partial(self.write_block, index, payload.numpy()))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_streams_store_and_load_a_block_is_read_when_it_was_written_and_before_its_slot_is_used_again(
    tmp_path: Path, seed: int
) -> None:
    random, device = Random(seed), LateDevice(seed, direct=bool(seed % 2))
    sinks: list[Late] = []
    with opened(tmp_path, device=Devices(lambda: device), gpu=8 * RECORD, after_hits=1, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        streams = [device.engine_stream, device.new_stream(), device.new_stream()]
        for _ in range(40):
            tokens, tenant = prompt(random.randrange(1, 6), seed=random.randrange(6)), random.choice("ab")
            prompt_of = Late(device, model, tokens, tenant)
            with device.on(random.choice(streams)):
                if random.random() < 0.5:
                    model.store(tokens, prompt_of, tenant=tenant)
                else:
                    with model.match(tokens, tenant=tenant) as lease:
                        lease.load(prompt_of)
                    sinks.append(prompt_of)
            if random.random() < 0.2:
                keep(pool)
        device.run()
        assert any(sink.written_from_device for sink in sinks)
        assert [sink.wrong for sink in sinks] == [[] for _ in sinks]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eviction", ["lru", "adaptive"])
def test_whatever_happens_every_block_comes_back_right_and_nothing_is_lost_count_of(
    quick_path: Path, seed: int, eviction: str
) -> None:
    random = Random(seed)
    quotas = {"m": QuotaConfig(guaranteed_bytes=4 * RECORD), "n": QuotaConfig(limit_bytes=5 * RECORD)}
    options: dict[str, Any] = {"ram": 24 * RECORD, "ssd": 4 * MIB if seed % 2 else None, "after_hits": 1 + seed % 3}
    with opened(quick_path, quotas=quotas, eviction=eviction, **options) as pool:
        models = [pool.register(spec()), pool.register(spec("n")), pool.register(spec("wide", layout=WIDE))]
        gpu, leases = gpu_of(pool), list[tuple[Lease, Model, Any, str]]()

        def match() -> None:
            model, tokens, tenant = choose()
            leases.append((model.match(tokens, tenant=tenant), model, tokens, tenant))

        def load_leased() -> None:
            if leases:
                loaded(*random.choice(leases))

        def unlease() -> None:
            if leases:
                leases.pop(random.randrange(len(leases)))[0].close()

        def fall() -> None:
            if gpu.store.tier is not None and random.random() < 0.3:
                fall_out(gpu)
                gpu.store.open()

        def choose() -> tuple[Model, Any, str]:
            return random.choice(models), prompt(random.randrange(1, 8), seed=random.randrange(9)), random.choice("ab")

        actions: list[Callable[[], Any]] = [
            *[lambda: store(*choose())] * 4,
            lambda: store_from_host(*choose()),
            *[lambda: load(*choose())] * 4,
            lambda: load_to_host(*choose()),
            match,
            load_leased,
            unlease,
            unlease,
            gpu.demoter.run,
            gpu.promoter.run,
            lambda: pool.release_device_memory(random.randrange(3) * RECORD),
            lambda: pool.erase(tenant=random.choice("ab")) if random.random() < 0.2 else None,
            fall,
            lambda: keep(pool),
        ]
        for _ in range(150):
            random.choice(actions)()
            assert pool._engine.index.ledger.account("n").bytes[GPU] <= 5 * RECORD
        for lease, *_ in leases:
            lease.close()
        pool._chores.bury()
        gpu.forget_lost()
        check_gpu(pool)


def test_the_device_of_this_machine_is_used_through_torch(tmp_path: Path) -> None:
    with Pool.open(gpu_config(), directory=tmp_path, gpu=CPU) as pool:
        model = pool.register(spec())
        store(model, prompt(4))
        assert load(model, prompt(4)) == {TierName.GPU: 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_the_gpu_of_this_machine_is_used_with_pinned_ram(tmp_path: Path) -> None:
    with Pool.open(gpu_config(ssd=4 * MIB), directory=tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(12))
        assert load(model, prompt(12)) == {TierName.GPU: 12}
        assert load_to_host(model, prompt(12)) == 12
        flushed(pool)
        pool.release_device_memory(1 << 30)
        assert sum(load(model, prompt(12)).values()) == 12
        check_gpu(pool)


def test_a_pool_without_a_gpu_tier_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from kvpool.config import RuntimeConfig;"
        "from kvpool.pool.pool import Pool;"
        f"Pool.open(RuntimeConfig.model_validate({{'name': 't'}}), directory=Path({str(tmp_path)!r})).close();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

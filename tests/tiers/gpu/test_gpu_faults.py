"""A device that is absent or ill is a tier that is out, with the reason: never another error, never a wrong byte."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.gpu import open_gpu_tier, page_lock_for
from kvpool.tiers.gpu.cuda import CudaDevice
from kvpool.tiers.gpu.pinning import PageLocks
from kvpool.tiers.gpu.tier import GpuTier
from kvpool.tiers.ram import RamTier
from kvpool.tiers.tier import TierName, TierUnavailableError

from .devices import IllDevice, cuda

MIB = 1 << 20
RECORD = 4 * PAGE_BYTES
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def ill_tier(device: IllDevice) -> GpuTier:
    return GpuTier(MIB, device=device, margin_bytes=0, streams=2, budget_s=5)


def fill(tier: GpuTier) -> None:
    """Store, by both ways, until the tier is full."""
    while tier.put([np.full(RECORD, 2, np.uint8)]) != [None]:
        tier.drop(tier.allocate_many(RECORD, 1, "a"))


# --- no device --------------------------------------------------------------------------------------------------------


@without_cuda
def test_without_cuda_opening_says_that_the_tier_is_out_and_why() -> None:
    for name in ("cuda", "cuda:3"):
        with pytest.raises(TierUnavailableError, match="CUDA") as raised:
            open_gpu_tier(MIB, device=name)
        assert raised.value.tier is TierName.GPU
        assert "\n" not in raised.value.reason
    with pytest.raises(TierUnavailableError, match="CUDA"):
        page_lock_for("cuda", MIB)


@pytest.mark.gpu
def test_a_device_that_does_not_exist_is_a_tier_that_is_out() -> None:
    cuda()
    with pytest.raises(TierUnavailableError, match="cuda:99"):
        open_gpu_tier(MIB, device="cuda:99")


def test_without_torch_opening_says_so_and_nothing_else_needs_it() -> None:
    script = """
import sys
sys.modules["torch"] = None
import kvpool.pool, kvpool.tiers.ram
from kvpool.tiers.gpu import open_gpu_tier, page_lock_for
from kvpool.tiers.tier import TierUnavailableError
for attempt in (lambda: open_gpu_tier(1 << 20), lambda: page_lock_for("cuda", 1 << 20)):
    try:
        attempt()
    except TierUnavailableError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "gpu: torch is not installed\n" * 2


def test_the_interface_is_imported_without_torch() -> None:
    script = "import kvpool.tiers.gpu, sys; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_host_memory_serves_through_the_same_door() -> None:
    tier = open_gpu_tier(8 * MIB, initial_bytes=MIB, streams=2, device="cpu")
    assert tier.capacity_bytes == 8 * MIB
    assert MIB <= tier.stats().reserved_bytes < 2 * MIB
    [place] = tier.allocate_many(RECORD, 1, "a")
    assert tier.upload([place], [np.full(10, 3, np.uint8)]).wait(10)
    assert tier.payload(place)[:11].tolist() == [3] * 10 + [0]
    tier.close()


# --- an ill device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["allocate", "clear", "record", "copy", "query"])
def test_a_device_that_fails_is_a_tier_that_is_out_with_what_the_device_said(fault: str) -> None:
    device = IllDevice()
    tier = ill_tier(device)
    [place] = tier.put([np.full(RECORD, 1, np.uint8)])
    assert place is not None
    device.fails.add(fault)
    with pytest.raises(TierUnavailableError) as raised:
        fill(tier)
    assert raised.value.reason == "CUDA error: uncorrectable ECC error encountered"
    tier.slab.check_integrity()
    tier.close()
    assert tier.stats().reserved_bytes == 0


def test_a_device_that_fails_at_the_start_is_not_opened() -> None:
    device = IllDevice()
    device.fails.add("allocate")
    with pytest.raises(TierUnavailableError, match="ECC"):
        GpuTier(MIB, device=device, initial_bytes=MIB, margin_bytes=0)


def test_a_copy_that_was_taken_before_the_fault_keeps_its_place_until_it_has_arrived() -> None:
    device = IllDevice(seed=None)
    device.direct = True
    tier = ill_tier(device)
    places = tier.allocate_many(RECORD, 1000, "a")
    device.fails.add("copy")
    ended: list[int] = []
    transfer = tier.upload(places[:2], [np.full(100, 5, np.uint8)] * 2, ended=lambda: ended.append(1))
    with pytest.raises(TierUnavailableError, match="ECC"):
        transfer.wait(0)
    assert not transfer.done, "the first of the two is under way"
    tier.drop(places)
    assert len(tier.allocate_many(RECORD, 1000, "a")) == len(places) - 2
    assert ended == []
    device.run()
    assert transfer.done
    assert ended == [1]
    assert sorted(tier.allocate_many(RECORD, 1000, "a")) == sorted(places[:2])
    tier.close()


def test_a_download_that_failed_never_reaches_the_hosts_memory() -> None:
    device = IllDevice(seed=None)
    tier = ill_tier(device)
    places = tier.allocate_many(RECORD, 2, "a")
    device.run()
    into = [np.full(100, 9, np.uint8) for _ in places]
    device.fails.add("copy")
    transfer = tier.download(places, into)
    device.fails.clear()
    while not transfer.done:
        device.run()
    with pytest.raises(TierUnavailableError, match="ECC"):
        transfer.wait(0)
    assert all((target == 9).all() for target in into)
    tier.close()


def test_dropping_and_closing_work_on_an_ill_device() -> None:
    device = IllDevice()
    tier = ill_tier(device)
    places = tier.allocate_many(RECORD, 40, "a")
    tier.upload(places[:3], [np.zeros(9, np.uint8)] * 3)
    device.fails |= {"allocate", "clear", "record", "copy", "query", "retire", "trim"}
    tier.drop(places)
    tier.resize(0)
    assert tier.stats().in_flight == 0
    tier.close()
    tier.close()
    assert tier.stats().reserved_bytes == 0


def test_after_a_fault_that_passes_everything_works_again() -> None:
    device = IllDevice()
    tier = ill_tier(device)
    records = [np.full(RECORD, number, np.uint8) for number in range(30)]
    device.fails.add("query")
    for _ in range(30):
        with pytest.raises(TierUnavailableError):
            tier.put(records)
    device.fails.clear()
    device.run()
    tier.advance()
    assert tier.used_bytes == 0
    places = [place for place in tier.put(records) if place is not None]
    buffers = [np.empty(RECORD, np.uint8) for _ in places]
    assert tier.get(places, buffers) == [True] * 30
    assert all((buffer == number).all() for number, buffer in enumerate(buffers))
    tier.close()


# --- page locks -------------------------------------------------------------------------------------------------------


class Driver:
    """Registers ranges as CUDA does: refuses what is registered already, and what is beyond its limit."""

    def __init__(self, limit: int = 1 << 62) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}
        self.attempts = 0

    def register(self, address: int, nbytes: int) -> None:
        self.attempts += 1
        if address in self.registered or sum(self.registered.values()) + nbytes > self.limit:
            raise RuntimeError("cudaHostRegister: CUDA error 2")
        self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        if address not in self.registered:
            raise RuntimeError("cudaHostUnregister: CUDA error 713")
        del self.registered[address]


def test_page_locks_keep_to_their_bound() -> None:
    driver = Driver()
    locks = PageLocks(driver.register, driver.unregister, max_bytes=3 * MIB)
    assert [locks.lock(number << 30, MIB) for number in range(5)] == [True] * 3 + [False] * 2
    assert locks.locked_bytes == sum(driver.registered.values()) == 3 * MIB
    locks.unlock(1 << 30)
    assert locks.lock(9 << 30, MIB)
    assert not locks.refused
    assert driver.attempts == 4


def test_after_a_refusal_nothing_more_is_asked_for_and_what_is_locked_stays(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(limit=2 * MIB)
    locks = PageLocks(driver.register, driver.unregister, max_bytes=10 * MIB)
    assert [locks.lock(number << 30, MIB) for number in range(6)] == [True] * 2 + [False] * 4
    assert driver.attempts == 3
    assert locks.refused == "cudaHostRegister: CUDA error 2"
    assert len(caplog.records) == 1
    for number in range(2):
        locks.unlock(number << 30)
    assert locks.locked_bytes == 0
    assert driver.registered == {}


def test_unlocking_that_fails_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver()
    locks = PageLocks(driver.register, driver.unregister, max_bytes=10 * MIB)
    assert locks.lock(1 << 30, MIB)
    driver.registered.clear()
    locks.unlock(1 << 30)
    assert locks.locked_bytes == 0
    assert "713" in caplog.text


def test_a_ram_tier_locks_its_pages_for_the_device_that_then_copies_directly() -> None:
    tier = open_gpu_tier(4 * MIB, device="cpu", streams=2)
    ram = RamTier(4 * MIB, available_memory=lambda: 1 << 60, page_lock=PageLocks(
        tier._device.register, tier._device.unregister, max_bytes=4 * MIB
    ))  # fmt: skip
    while ram.slab.prefault_extent(lambda: False):
        pass
    slots = ram.allocate_many(RECORD, 20)
    places = tier.allocate_many(RECORD, 20, "a")
    sources = [ram.record(slot)[PAGE_BYTES:] for slot in slots]
    for number, source in enumerate(sources):
        source[:] = number + 1
    assert tier.upload(places, sources).wait(10)
    assert [set(tier.payload(place).tolist()) for place in places] == [{number + 1} for number in range(20)]
    assert tier.stats().staging_bytes == 0
    tier.close()
    del sources, source
    ram.close()


@pytest.mark.gpu
def test_memory_that_was_registered_is_page_locked_for_cuda_and_no_error_is_left_behind() -> None:
    device = CudaDevice() if torch.cuda.is_available() else cuda()
    locks = PageLocks(device.register, device.unregister, max_bytes=64 * MIB)
    ram = RamTier(8 * MIB, page_lock=locks)
    while ram.slab.prefault_extent(lambda: False):
        pass
    [slot] = ram.allocate_many(MIB, 1)
    assert torch.from_numpy(ram.record(slot)).is_pinned()
    with pytest.raises(RuntimeError, match="CUDA error"):
        device.register(12345 * PAGE_BYTES, PAGE_BYTES)
    assert torch.ones(10, device="cuda").sum().item() == 10
    ram.close()
    assert locks.locked_bytes == 0

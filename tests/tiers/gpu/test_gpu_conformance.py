"""The gpu tier against the suite of every local tier: on host memory, on a device that works late, and on CUDA."""

from __future__ import annotations

from functools import partial

import pytest

from kvpool.tiers.gpu.cpu import CpuDevice
from kvpool.tiers.gpu.tier import GpuTier
from tests.tiers.conformance import MakeTier, TierConformance

from .devices import LateDevice, cuda


class TestGpuTierOnHostMemory(TierConformance):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return partial(GpuTier, device=CpuDevice())


class TestGpuTierOnADeviceThatWorksLate(TierConformance):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return partial(GpuTier, device=LateDevice(seed=3), streams=3, staging_buffer_bytes=100_000, staging_buffers=3)


@pytest.mark.gpu
class TestGpuTierOnCuda(TierConformance):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return partial(GpuTier, device=cuda())

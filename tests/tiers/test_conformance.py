"""Every local tier against the one suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpool.tiers.ram import RamTier
from kvpool.tiers.ssd.tier import SsdTier

from .conformance import MakeTier, TierConformance


class TestRamTier(TierConformance):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return RamTier


class TestRamTierWithRecordsLargerThanItsExtents(TierConformance):
    @pytest.fixture
    def make_tier(self) -> MakeTier:
        return lambda capacity_bytes: RamTier(capacity_bytes, extent_bytes=16 << 10)


class TestSsdTierPastThePageCache(TierConformance):
    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> MakeTier:
        if not has_direct_io(tmp_path):
            pytest.skip(f"the file system of {tmp_path} has no O_DIRECT")
        return lambda capacity_bytes: SsdTier.open(
            tmp_path / "ssd", capacity_bytes=capacity_bytes, segment_bytes=1 << 20
        )


class TestSsdTierThroughThePageCache(TierConformance):
    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> MakeTier:
        return lambda capacity_bytes: SsdTier.open(tmp_path / "ssd", capacity_bytes=capacity_bytes, direct_io=False)


def has_direct_io(directory: Path) -> bool:
    file = directory / "probe"
    file.touch()
    try:
        os.close(os.open(file, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True

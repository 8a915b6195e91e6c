"""Values for the fields that a `KVCachePool` leaves open: the built-in defaults, and the profiles of the tuning guide.

Paths are below `spec`. A value for a tier that the pool does not have says nothing. To change what a profile does,
change its table; a field that comes into any of them must lose its default in `kvpool.api` (a test says so).
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from kvpool.api.pool import Profile


class Blocks(NamedTuple):
    """Tokens, counted in blocks."""

    blocks: int


class WithinCapacity(NamedTuple):
    """A size, or the capacity of the tier where that is smaller."""

    size: str


Value: TypeAlias = str | int | float | bool | Blocks | WithinCapacity
Values: TypeAlias = Mapping[str, Value]

TIERS_WITH_CODEC = ("ram", "dragonfly", "database", "ssd")


def _codec(name: str) -> Values:
    return {f"tiers.{tier}.codec": name for tier in TIERS_WITH_CODEC}


_LARGE_GPU: Values = {
    "tiers.gpu.capacity": "16Gi",
    "tiers.gpu.initialSize": WithinCapacity("4Gi"),
    "tiers.gpu.streams": 8,
    "tiers.gpu.pinnedMemory": True,
}

DEFAULTS: Values = {
    **_LARGE_GPU,
    **_codec("none"),
    "tiers.dragonfly.ttl": "2h",
    "tiers.dragonfly.connections": 20,
    "tiers.dragonfly.batchSize": 200,
    "tiers.database.postgres.connections": 10,
    "compression.calibrationSamples": 1000,
    "compression.outlierPercentile": 100,
    "sharing.autoDetect": True,
    "sharing.minPrefixTokens": Blocks(1),
    "sharing.maxSharedBytes": "8Gi",
    "sharing.protectShared": True,
    "sharing.compressShared": False,
}

PROFILES: Mapping[Profile, Values] = {
    Profile.THROUGHPUT: {
        **_LARGE_GPU,
        **_codec("fp16"),
        "compression.calibrationSamples": 100,
        "compression.outlierPercentile": 100,
        "tiers.dragonfly.connections": 20,
        "tiers.dragonfly.batchSize": 200,
        "tiers.dragonfly.ttl": "2h",
        "tiers.database.postgres.connections": 10,
    },
    Profile.LATENCY: {
        **_LARGE_GPU,
        "tiers.dragonfly.connections": 50,
        "tiers.dragonfly.batchSize": 50,
        "tiers.dragonfly.ttl": "30m",
        "tiers.database.postgres.connections": 20,
    },
    Profile.MEMORY_SAVER: {
        "tiers.gpu.capacity": "4Gi",
        "tiers.gpu.initialSize": WithinCapacity("1Gi"),
        "tiers.gpu.streams": 2,
        "tiers.gpu.pinnedMemory": False,
        **_codec("int8-asymmetric"),
        "compression.calibrationSamples": 1000,
        "compression.outlierPercentile": 100,
    },
    Profile.CHAT: {
        "sharing.minPrefixTokens": Blocks(1),
        "sharing.maxSharedBytes": "8Gi",
        "sharing.protectShared": True,
        "sharing.compressShared": True,
    },
    Profile.VARIED: {
        "sharing.minPrefixTokens": Blocks(2),
        "sharing.maxSharedBytes": "4Gi",
        "sharing.autoDetect": True,
    },
}

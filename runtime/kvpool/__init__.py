"""kvpool keeps the attention keys and values of LLM prompts, so that the next prompt does not pay for them again.

The names below are the public face; they are loaded when first used, so that `kvpool.api` and `kvpool.config` import
without numpy or torch. Adapters are imported from where they live: `from kvpool.adapters.transformers import ...`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpool.api import KVCachePool
    from kvpool.blocks.identity import ModelIdentity
    from kvpool.blocks.layout import Dtype, KVLayout
    from kvpool.blocks.tokens import Tokens
    from kvpool.blocks.transfer import BlockSink, BlockSource
    from kvpool.config import RuntimeConfig, load_config
    from kvpool.errors import (
        ConfigError,
        DirectoryInUseError,
        IncompatibleDataError,
        InputError,
        KvpoolError,
        PoolClosedError,
        SharedTierOutError,
        UnsupportedModelError,
    )
    from kvpool.pool.events import BlockRemoved, BlockStored, Event
    from kvpool.pool.finding import FoundEntry
    from kvpool.pool.lease import Lease
    from kvpool.pool.model import Model
    from kvpool.pool.pool import Pool
    from kvpool.pool.results import (
        BlockReport,
        EraseReport,
        LeaseState,
        ModelSpec,
        Refusal,
        ReloadReport,
        StoreResult,
        Verdict,
    )
    from kvpool.pool.stats import PoolStats
    from kvpool.tiers.tier import TierName

__version__ = "0.1.0"

__all__ = [
    "BlockRemoved",
    "BlockReport",
    "BlockSink",
    "BlockSource",
    "BlockStored",
    "ConfigError",
    "DirectoryInUseError",
    "Dtype",
    "EraseReport",
    "Event",
    "FoundEntry",
    "IncompatibleDataError",
    "InputError",
    "KVCachePool",
    "KVLayout",
    "KvpoolError",
    "Lease",
    "LeaseState",
    "Model",
    "ModelIdentity",
    "ModelSpec",
    "Pool",
    "PoolClosedError",
    "PoolStats",
    "Refusal",
    "ReloadReport",
    "RuntimeConfig",
    "SharedTierOutError",
    "StoreResult",
    "TierName",
    "Tokens",
    "UnsupportedModelError",
    "Verdict",
    "load_config",
]

_NAMES_IN = {
    "kvpool.api": ("KVCachePool",),
    "kvpool.blocks.identity": ("ModelIdentity",),
    "kvpool.blocks.layout": ("Dtype", "KVLayout"),
    "kvpool.blocks.tokens": ("Tokens",),
    "kvpool.blocks.transfer": ("BlockSink", "BlockSource"),
    "kvpool.config": ("RuntimeConfig", "load_config"),
    "kvpool.errors": (
        "ConfigError",
        "DirectoryInUseError",
        "IncompatibleDataError",
        "InputError",
        "KvpoolError",
        "PoolClosedError",
        "SharedTierOutError",
        "UnsupportedModelError",
    ),
    "kvpool.pool.events": ("BlockRemoved", "BlockStored", "Event"),
    "kvpool.pool.finding": ("FoundEntry",),
    "kvpool.pool.lease": ("Lease",),
    "kvpool.pool.model": ("Model",),
    "kvpool.pool.pool": ("Pool",),
    "kvpool.pool.results": (
        "BlockReport",
        "EraseReport",
        "LeaseState",
        "ModelSpec",
        "Refusal",
        "ReloadReport",
        "StoreResult",
        "Verdict",
    ),
    "kvpool.pool.stats": ("PoolStats",),
    "kvpool.tiers.tier": ("TierName",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

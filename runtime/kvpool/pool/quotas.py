"""From the quotas of a configuration, and of registered models, to those that the index keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvpool.config import RuntimeConfig
from kvpool.config.runtime import QuotaConfig
from kvpool.errors import ConfigError
from kvpool.prefix.accounts import UNLIMITED, Quota, Quotas
from kvpool.prefix.node import GPU, RAM, SSD
from kvpool.tiers.tier import TierName

LEVEL_OF = {"gpu": GPU, "ram": RAM, "ssd": SSD}
"""The tiers whose quotas this process enforces, and their levels in the index."""


def quotas_of(config: RuntimeConfig, registered: Mapping[str, Mapping[TierName, QuotaConfig]]) -> Quotas:
    """By model and level. What the configuration says of a model counts; for others, what they were registered with."""
    registered_by_level = {name: _by_level(quotas.items()) for name, quotas in registered.items()}
    named = {model.name: _by_level(model.quotas.items()) for model in config.models if model.quotas}
    return {**registered_by_level, **named}


def check_guarantees(quotas: Quotas, level: int, *, capacity_bytes: int, extent_bytes: int, path: str) -> None:
    """Raise `ConfigError` where what is guaranteed at `level` cannot be held all at once.

    Memory is cut into extents of one record size each, so a guarantee may take up to an extent more than its bytes.
    """
    needed = sum(
        -(-by_level[level].guaranteed // extent_bytes) * extent_bytes
        for by_level in quotas.values()
        if level in by_level
    )
    if needed > capacity_bytes:
        raise ConfigError(
            f"{path}: the models' guaranteed bytes take {needed} bytes in whole extents of {extent_bytes}, above the "
            f"capacity of {capacity_bytes}: lower them, or raise the capacity"
        )


def _by_level(quotas: Iterable[tuple[str, QuotaConfig]]) -> dict[int, Quota]:
    return {
        LEVEL_OF[tier]: Quota(quota.guaranteed_bytes, UNLIMITED if quota.limit_bytes is None else quota.limit_bytes)
        for tier, quota in quotas
        if tier in LEVEL_OF
    }

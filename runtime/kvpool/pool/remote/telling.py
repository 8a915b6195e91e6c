"""An erasure beyond this process: other nodes are told, shared tiers are cleared."""

from __future__ import annotations

import time
from typing import NamedTuple

from kvpool.blocks.identity import TenantDigest
from kvpool.pool.engine import Engine
from kvpool.tiers.tier import TierName, TierUnavailableError

CONFIRMED_EVERY_S = 0.2


class Told(NamedTuple):
    """How far an erasure has come elsewhere by the deadline."""

    removed: dict[TierName, int]
    pending_tiers: tuple[TierName, ...]
    unconfirmed_nodes: tuple[str, ...]
    catalog_told: bool


def erase_elsewhere(engine: Engine, tenant: TenantDigest, epoch: int, *, deadline_s: float) -> Told:
    """Tell of a tenant's new epoch, and clear its records; waits for both, at most until the deadline."""
    remote, sync = engine.remote, engine.epoch_sync
    if remote is None:
        return Told({}, (), (), True)
    until_s = time.monotonic() + deadline_s
    sequence = sync.tell(tenant, epoch)
    if engine.catalog is not None:
        engine.catalog.tenant_was_erased(tenant, engine.tenants.epochs.of(tenant))
    if engine.prompts is not None:
        engine.prompts.erase(tenant, engine.tenants.epochs.of(tenant))
    erasure = remote.eraser.erase_tenant(tenant, engine.tenants.epochs.of(tenant))
    unconfirmed: list[str] = [] if sequence is None else _wait_for_nodes(engine, sequence, until_s)
    erasure.cleared.wait(max(0.0, until_s - time.monotonic()))
    return Told(
        dict(erasure.removed),
        tuple(tier for tier in TierName if tier in erasure.first),
        tuple(unconfirmed),
        sync.authority is None or sequence is not None,
    )


def _wait_for_nodes(engine: Engine, sequence: int, until_s: float) -> list[str]:
    """The nodes that have not confirmed a change by then."""
    while True:
        try:
            unconfirmed = engine.epoch_sync.unconfirmed(sequence)
        except TierUnavailableError as error:
            return [f"unknown: {error.reason}"]
        left_s = until_s - time.monotonic()
        if left_s <= 0 or all(name.endswith("(silent)") for name in unconfirmed):
            return unconfirmed
        time.sleep(min(left_s, CONFIRMED_EVERY_S))

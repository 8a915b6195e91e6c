"""Pools that share servers and nothing else: each has a directory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpool.config import RuntimeConfig
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.remote.catalog import PoolCatalog
from kvpool.pool.remote.parts import Remote
from kvpool.pool.remote.prompts import PromptMemory
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.tier import TierName
from tests.pool.kv import DEADLINE_S, MIB, config, flushed, loaded_blocks
from tests.waiting import eventually

SECRET = bytes(range(32))
"""Of all pools that share."""
DRAGONFLY, POSTGRES = "dragonfly", "postgres"
"""The folders of the two services."""
PATIENT_S = 10.0
"""The budget of tiers in tests that are not about budgets: one that a busy machine keeps."""
EMBEDDED_QDRANT: Mapping[str, Any] = {"qdrant": {"tls": False}}
"""Among `database_options`: prompts are remembered by a Qdrant of the pool's own."""


def shared_config(
    directory: Path,
    *,
    name: str = "test",
    dragonfly: Path | Mapping[str, Any] | None = None,
    database: Path | Mapping[str, Any] | None = None,
    dragonfly_options: Mapping[str, Any] | None = None,
    database_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> RuntimeConfig:
    """The configuration of a pool in `directory`; a tier is the service folder of a server, or how one is managed."""
    beside = directory.parent
    beside.mkdir(parents=True, exist_ok=True)
    secret = beside / "pool-secret"
    if not secret.exists():
        secret.touch(0o600)
        secret.write_bytes(SECRET)
    services = beside / f"{directory.name}-services"
    services.mkdir(exist_ok=True)
    plain = config(**{"ram": 16 * MIB, **options}).model_dump(mode="json", by_alias=True)
    plain |= {"name": name, "secretFile": str(secret), "services": str(services)}
    if dragonfly is not None:
        plain["dragonfly"] = {
            **_place(dragonfly, services / DRAGONFLY),
            "codec": "none", "ttlS": 7200.0, "connections": 8, "batchSize": 200, "budgetS": PATIENT_S, "tls": False,
            **(dragonfly_options or {}),
        }  # fmt: skip
    if database is not None:
        plain["database"] = {
            "postgres": {**_place(database, services / POSTGRES), "connections": 6, "tls": False},
            "codec": "none", "inlineMaxBytes": 2 * MIB, "inlineBytes": 1 << 30, "journalBytes": 64 * MIB,
            "budgetS": PATIENT_S,
            **(database_options or {}),
        }  # fmt: skip
    return RuntimeConfig.model_validate(plain)


def open_shared(directory: Path, *, disk: Disk | None = None, **options: Any) -> Pool:
    """A pool of `shared_config(**options)` in `directory`."""
    return Pool.open(shared_config(directory, **options), directory=directory, disk=disk)


def looked_up(
    model: Model, tokens: Any, tenant: str = "default", *, deadline_s: float = DEADLINE_S
) -> dict[TierName, int]:
    """Match, wait and load; how many blocks came from where. Fails if one of them is wrong."""
    with model.match(tokens, tenant=tenant) as lease:
        lease.wait(deadline_s)
        loaded_blocks(lease, model, tokens, tenant)
        return lease.served


def remote_of(pool: Pool) -> Remote:
    remote = pool._engine.remote
    assert remote is not None
    return remote


def catalog_of(pool: Pool) -> PoolCatalog:
    catalog = pool._engine.catalog
    assert catalog is not None
    return catalog


def prompts_of(pool: Pool) -> PromptMemory:
    prompts = pool._engine.prompts
    assert prompts is not None
    return prompts


def reported(pool: Pool) -> None:
    """Wait until all that happened by now is in shared tiers and in the catalog."""
    flushed(pool)
    assert catalog_of(pool).flush(DEADLINE_S), "the catalog is not told in time"


def in_normal_mode(pool: Pool, deadline_s: float = DEADLINE_S) -> None:
    """Wait until no tier is out."""
    eventually(lambda: not pool.degradations(), f"no tier is out, but {pool.stats().mode}", deadline_s)


def _place(service: Path | Mapping[str, Any], link: Path) -> Mapping[str, Any]:
    if not isinstance(service, Path):
        return service
    if not link.exists():
        link.symlink_to(service.absolute())
    return {"secret": link.name}

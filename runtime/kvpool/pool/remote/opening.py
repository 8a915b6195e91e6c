"""Which shared tiers a configuration names, and what connects them. Imports what each needs only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvpool.blocks.identity import Fingerprint
from kvpool.config import RuntimeConfig
from kvpool.pool.remote.connecting import Connector
from kvpool.pool.remote.epoch_sync import EpochSync

LOCAL_NAME, SERVICES_NAME = "local", "services"


def connectors(
    config: RuntimeConfig,
    directory: Path,
    epochs: EpochSync,
    *,
    record_bytes_of: Callable[[Fingerprint], int | None],
) -> list[Connector]:
    """One for each shared tier of the configuration, in the waterfall's order. Nothing is connected or started yet.

    `record_bytes_of` says how long a model's records are in the database tier; None: the model is not known.
    """
    services, local = config.services or directory / SERVICES_NAME, directory / LOCAL_NAME
    found: list[Connector] = []
    if config.dragonfly is not None:
        from kvpool.pool.remote.dragonfly import DragonflyConnector

        found.append(DragonflyConnector(config.dragonfly, services, local, epochs))
    if config.database is not None:
        from kvpool.pool.remote.database import DatabaseConnector

        found.append(DatabaseConnector(config.database, services, local, epochs, record_bytes_of=record_bytes_of))
    return found

"""Which shared tiers a configuration names, and what connects them. Imports what each needs only then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from kvpool.blocks.identity import Fingerprint
from kvpool.config import RuntimeConfig
from kvpool.pool.remote.connecting import Connector
from kvpool.pool.remote.epoch_sync import EpochSync
from kvpool.prefix.index import PrefixIndex

if TYPE_CHECKING:
    from kvpool.pool.remote.catalog import Catalog

LOCAL_NAME, SERVICES_NAME = "local", "services"


class SharedTiers(NamedTuple):
    """What connects the shared tiers, in the waterfall's order; and the catalog, where there is a database tier."""

    connectors: Sequence[Connector]
    catalog: Catalog | None = None


def shared_tiers(
    config: RuntimeConfig,
    directory: Path,
    index: PrefixIndex,
    node: UUID,
    epochs: EpochSync,
    *,
    record_bytes_of: Callable[[Fingerprint], int | None],
) -> SharedTiers:
    """Those that the configuration names. Nothing is connected or started yet.

    `record_bytes_of` says how long a model's records are in the database tier; None: the model is not known.
    """
    services, local = config.services or directory / SERVICES_NAME, directory / LOCAL_NAME
    found: list[Connector] = []
    catalog = None
    if config.dragonfly is not None:
        from kvpool.pool.remote.dragonfly import DragonflyConnector

        found.append(DragonflyConnector(config.dragonfly, services, local, epochs))
    if config.database is not None:
        from kvpool.pool.remote.catalog import Catalog
        from kvpool.pool.remote.database import DatabaseConnector

        database = DatabaseConnector(
            config.database,
            services,
            local,
            epochs,
            make_catalog=partial(Catalog, config.database, directory, node, index),
            record_bytes_of=record_bytes_of,
        )
        found.append(database)
        catalog = database.catalog
    return SharedTiers(found, catalog)

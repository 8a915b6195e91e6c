"""Which shared tiers a configuration names, and what connects them. Imports what each needs only then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from kvpool.blocks.identity import Fingerprint
from kvpool.config import QdrantConfig, RuntimeConfig
from kvpool.config.service import read_service
from kvpool.pool.remote.connecting import Connector
from kvpool.pool.remote.epoch_sync import EpochSync
from kvpool.prefix.index import PrefixIndex

if TYPE_CHECKING:
    from kvpool.pool.remote.catalog import PoolCatalog
    from kvpool.pool.remote.prompts import PromptMemory

LOCAL_NAME, SERVICES_NAME = "local", "services"


class SharedTiers(NamedTuple):
    """What connects the shared tiers, in the waterfall's order; and the catalog, where there is a database tier."""

    connectors: Sequence[Connector]
    catalog: PoolCatalog | None = None
    prompts: PromptMemory | None = None


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
    catalog = prompts = None
    if config.dragonfly is not None:
        from kvpool.pool.remote.dragonfly import DragonflyConnector

        found.append(DragonflyConnector(config.dragonfly, services, local, epochs))
    if config.database is not None:
        from kvpool.pool.remote.catalog import PoolCatalog
        from kvpool.pool.remote.database import DatabaseConnector

        database = DatabaseConnector(
            config.database,
            services,
            local,
            epochs,
            make_catalog=partial(
                PoolCatalog,
                config.database,
                directory,
                node,
                index,
                dragonfly_ttl_s=None if config.dragonfly is None else config.dragonfly.ttl_s,
            ),
            record_bytes_of=record_bytes_of,
        )
        found.append(database)
        catalog = database.catalog
        if config.database.qdrant is not None:
            prompts = _prompt_memory(config.database.qdrant, services, local, index, epochs)
    return SharedTiers(found, catalog, prompts)


def _prompt_memory(
    config: QdrantConfig, services: Path, local: Path, index: PrefixIndex, epochs: EpochSync
) -> PromptMemory:
    """What remembers prompts: in Qdrant's engine below the pool's directory, or on a server."""
    from kvpool.catalog.embedding.hashed_ngrams import HashedNgrams
    from kvpool.catalog.vectors.contract import PromptVectors
    from kvpool.local import QDRANT_DIRECTORY
    from kvpool.pool.remote.prompts import PromptMemory

    def open_vectors() -> PromptVectors:
        if config.secret is None:
            from kvpool.catalog.vectors.embedded import EmbeddedVectors

            return EmbeddedVectors(local / QDRANT_DIRECTORY)
        from kvpool.catalog.vectors.remote import RemoteVectors
        from kvpool.catalog.vectors.session import SCHEMES

        folder = services / config.secret
        return RemoteVectors(lambda: read_service(folder, schemes=SCHEMES), tls=config.tls)

    return PromptMemory(index, HashedNgrams(), open_vectors, is_trusted=lambda: epochs.trusted)

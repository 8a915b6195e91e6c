"""The database tier does what every keyed tier must do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.tiers.tier import KeyedTier
from tests.catalog.payload_pool import Database, database_of
from tests.local.servers import postgres_database, postgres_folder
from tests.tiers.keyed_conformance import KeyedConformance, MakeKeyedTier

__all__ = ["postgres_folder"]


class TestPayloadTier(KeyedConformance):
    """On a database of each test's own."""

    @pytest.fixture
    def database(self, postgres_folder: Path, tmp_path: Path) -> Iterator[Database]:
        with postgres_database(postgres_folder, tmp_path) as folder, database_of(folder) as database:
            yield database

    @pytest.fixture
    def make_tier(self, database: Database) -> MakeKeyedTier:
        def make() -> KeyedTier:
            return database.tier(inline_bytes=1 << 30)

        return make

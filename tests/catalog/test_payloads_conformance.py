"""The database tier does what every keyed tier must do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.tiers.tier import KeyedTier
from tests.catalog.payload_pool import Database, database_of
from tests.tiers.keyed_conformance import KeyedConformance, MakeKeyedTier


class TestPayloadTier(KeyedConformance):
    """On a database of each test's own."""

    @pytest.fixture
    def database(self, empty_database: Path) -> Iterator[Database]:
        with database_of(empty_database) as database:
            yield database

    @pytest.fixture
    def make_tier(self, database: Database) -> MakeKeyedTier:
        def make() -> KeyedTier:
            return database.tier(inline_bytes=1 << 30)

        return make

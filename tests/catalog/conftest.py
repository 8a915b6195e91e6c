from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.catalog.samples import Database, catalog_in
from tests.local.servers import postgres_database
from tests.local.servers import postgres_folder as postgres_folder


@pytest.fixture
def empty_database(postgres_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The service folder of a database that has nothing of ours in it."""
    with postgres_database(postgres_folder, tmp_path) as folder:
        yield folder


@pytest.fixture
def catalog(empty_database: Path) -> Iterator[Database]:
    with catalog_in(empty_database) as database:
        yield database

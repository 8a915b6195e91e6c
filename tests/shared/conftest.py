"""Fixtures of the tests of pools that share servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.local.servers import Server, postgres_database, postgres_folder, postgres_server, redis_folder, redis_server
from tests.tiers.dragonfly.servers import client_of

__all__ = ["postgres_folder", "redis_folder"]


@pytest.fixture
def dragonfly(redis_folder: Path) -> Path:
    """The service folder of a Redis server that is empty, and that other tests use too."""
    with client_of(redis_folder) as client:
        client.flushall()
    return redis_folder


@pytest.fixture
def postgres(postgres_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The service folder of an empty database on a server that other tests use too."""
    with postgres_database(postgres_folder, tmp_path) as folder:
        yield folder


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    """A Redis server that the test may stop, kill and spoil."""
    with redis_server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def redis_client(own_redis: Server) -> Iterator[redis.Redis]:
    """A client of that server that is not ours."""
    with client_of(own_redis.folder) as client:
        yield client


@pytest.fixture(scope="session")
def spare_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A PostgreSQL server for the tests that stop, kill and spoil one: it is started again for each."""
    with postgres_server(tmp_path_factory.mktemp("spare"), connections=20) as server:
        yield server


class OwnDatabase(Server):
    """A server with a database that only this test uses; `folder` is its service."""

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server.local)
        self._folder = folder

    @property
    def folder(self) -> Path:
        return self._folder


@pytest.fixture
def own_postgres(spare_postgres: Server, tmp_path: Path) -> Iterator[Server]:
    """A PostgreSQL server with an empty database, that the test may stop, kill and spoil."""
    spare_postgres.start()
    with postgres_database(spare_postgres.folder, tmp_path) as folder:
        yield OwnDatabase(spare_postgres, folder)

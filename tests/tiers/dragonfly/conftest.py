"""A server that the tests of this package share, empty for each of them, and a cluster likewise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.local.servers import redis_folder
from tests.tiers.dragonfly.servers import Cluster, client_of, redis_cluster

__all__ = ["redis_folder"]


@pytest.fixture
def folder(redis_folder: Path) -> Path:
    """The service folder of an empty server."""
    with client_of(redis_folder) as client:
        client.flushall()
    return redis_folder


@pytest.fixture
def client(folder: Path) -> Iterator[Any]:
    """A client of that server that is not ours."""
    with client_of(folder) as client:
        yield client


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """An empty cluster."""
    shared_cluster.flush()
    return shared_cluster

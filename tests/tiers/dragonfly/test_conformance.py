"""The dragonfly tier against the suite of keyed tiers: on one server, through TLS, and on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.config.service import ServiceAddress
from tests.tiers.dragonfly.servers import (
    PASSWORD,
    Between,
    Cluster,
    RedisProcess,
    certificates,
    client_of,
    tcp_server,
    tier_at,
    tier_of,
)
from tests.tiers.keyed_conformance import KeyedConformance, MakeKeyedTier


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with tcp_server(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: RedisProcess) -> Iterator[ServiceAddress]:
    made = certificates(server.directory)
    with Between(server.port, tls=made) as front:
        yield ServiceAddress(
            url=f"rediss://localhost:{front.port}", username="default", password=PASSWORD, ca_file=made.authority
        )


class TestDragonflyTier(KeyedConformance):
    @pytest.fixture
    def make_tier(self, folder: Path) -> MakeKeyedTier:
        return lambda: tier_of(folder)


class TestDragonflyTierWithOneRequestInFlight(KeyedConformance):
    @pytest.fixture
    def make_tier(self, folder: Path) -> MakeKeyedTier:
        return lambda: tier_of(folder, batch_size=1)


class TestDragonflyTierOnACluster(KeyedConformance):
    @pytest.fixture
    def make_tier(self, cluster: Cluster) -> MakeKeyedTier:
        return lambda: tier_of(cluster.folder)


class TestDragonflyTierThroughTls(KeyedConformance):
    @pytest.fixture
    def make_tier(self, server: RedisProcess, address: ServiceAddress) -> MakeKeyedTier:
        with client_of(server.folder) as client:
            client.flushall()
        return lambda: tier_at(lambda: address)

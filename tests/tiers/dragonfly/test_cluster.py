"""A cluster of Redis whose nodes die, come back and hand slots to each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from redis.crc import key_slot

from kvpool.blocks.record import CODEC_NONE
from kvpool.tiers.dragonfly.commands import ServerError
from kvpool.tiers.dragonfly.names import Names
from kvpool.tiers.dragonfly.tier import DragonflyTier
from kvpool.tiers.dragonfly.topology import Topology, elsewhere, topology_of
from kvpool.tiers.tier import TierUnavailableError
from tests.tiers.dragonfly.servers import (
    Cluster,
    client_of,
    cluster_lines,
    free_ports,
    is_whole,
    redis_cluster,
    tcp_server,
    tier_of,
)
from tests.tiers.keyed_conformance import chain, found_of, holds, keys_of, put, tree_of
from tests.waiting import eventually

TREE = tree_of()
SHORT_S = 0.5


@pytest.fixture
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with redis_cluster(tmp_path_factory.mktemp("own")) as cluster:
        yield cluster


@pytest.fixture
def tier(cluster: Cluster) -> Iterator[DragonflyTier]:
    tier = tier_of(cluster.folder)
    yield tier
    tier.close()


def owner_of(cluster: Cluster, name: bytes) -> int:
    """Which of the nodes has a key."""
    return next(at for at, client in enumerate(cluster.clients) if name in client.keys(name))


def test_what_is_said_of_a_cluster_is_the_sum_of_its_nodes(cluster: Cluster, tier: DragonflyTier) -> None:
    info = tier.info()
    assert info.nodes == 3
    assert info.program in ("redis", "valkey")
    assert info.used_bytes > 3 * 500_000


@pytest.mark.parametrize("stopped", ["killed", "frozen"])
def test_a_node_that_fails_costs_its_own_blocks_alone(own_cluster: Cluster, stopped: str) -> None:
    records = chain(60)
    tier = tier_of(own_cluster.folder)
    put(tier, TREE, records)
    names = [Names(TREE).of(sealed.key, CODEC_NONE) for sealed in records]
    there = [owner_of(own_cluster, name) != 2 for name in names]
    tier.budget_s = SHORT_S
    lost = own_cluster.servers[2]
    lost.kill() if stopped == "killed" else lost.freeze()
    began_s = time.monotonic()
    found = tier.find(TREE, keys_of(records), [CODEC_NONE])
    assert [block is not None for block in found] == there
    assert time.monotonic() - began_s < SHORT_S + 1.5
    began_s = time.monotonic()
    buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in records]
    moved = tier.get(TREE, [found_of(sealed) for sealed in records], buffers)
    assert moved.done == there
    assert moved.fault
    assert time.monotonic() - began_s < SHORT_S, "a node that just failed is let alone"
    lost.start() if stopped == "killed" else lost.thaw()
    tier.budget_s = 5.0
    new = chain(60, first=1000)
    eventually(lambda: all(tier.put(TREE, new, []).done), "the node is used again")
    assert all(holds(tier, TREE, sealed) for sealed in new)
    tier.close()


def test_a_cluster_of_which_no_node_answers_is_out(own_cluster: Cluster) -> None:
    tier = tier_of(own_cluster.folder)
    put(tier, TREE, chain(20))
    for server in own_cluster.servers:
        server.kill()
    with pytest.raises(TierUnavailableError):
        tier.find(TREE, keys_of(chain(20)), [CODEC_NONE])
    with pytest.raises(TierUnavailableError):
        tier.put(TREE, chain(20), [])
    tier.close()


def test_the_cluster_is_known_without_the_node_that_the_address_names(own_cluster: Cluster) -> None:
    tier = tier_of(own_cluster.folder, budget_s=1.0)
    records = chain(30)
    put(tier, TREE, records)
    own_cluster.servers[0].kill()
    for _ in range(3):
        found = tier.find(TREE, keys_of(records), [CODEC_NONE])
        assert any(found)
        assert not all(found)
    tier.close()


def test_a_first_node_that_stalls_costs_a_budget_once_and_its_own_blocks(own_cluster: Cluster) -> None:
    records = chain(30)
    tier = tier_of(own_cluster.folder)
    put(tier, TREE, records)
    there = [owner_of(own_cluster, Names(TREE).of(sealed.key, CODEC_NONE)) != 0 for sealed in records]
    tier.budget_s = SHORT_S
    own_cluster.servers[0].freeze()
    assert [block is not None for block in tier.find(TREE, keys_of(records), [CODEC_NONE])] == there
    asked, slow = 0, 0
    end_s = time.monotonic() + 3.0
    while time.monotonic() < end_s:  # beyond some pauses, after each of which it is tried again
        began_s = time.monotonic()
        found = tier.find(TREE, keys_of(records), [CODEC_NONE])
        assert [block is not None for block in found] == there
        asked += 1
        slow += time.monotonic() - began_s > SHORT_S / 2
    assert slow <= 4
    assert asked > 20
    own_cluster.servers[0].thaw()
    eventually(lambda: all(tier.find(TREE, keys_of(records), [CODEC_NONE])), "the node is used again")
    tier.close()


def test_blocks_are_found_while_and_after_their_slot_moves(own_cluster: Cluster) -> None:
    tier = tier_of(own_cluster.folder)
    records = chain(3)
    put(tier, TREE, records)
    name = Names(TREE).of(records[0].key, CODEC_NONE)
    slot, source = key_slot(name), owner_of(own_cluster, name)
    target = (source + 1) % 3
    here, there = own_cluster.clients[source], own_cluster.clients[target]
    ids = [str(client.execute_command("CLUSTER", "MYID"), "ascii") for client in (here, there)]
    there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    assert holds(tier, TREE, records[0])
    move(here, own_cluster.servers[target].port, name)
    assert name in there.keys("*")
    assert all(holds(tier, TREE, sealed) for sealed in records)
    tier.touch(TREE, keys_of(records), [CODEC_NONE])
    for client in (there, here):
        client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
    assert all(holds(tier, TREE, sealed) for sealed in records)
    put(tier, TREE, records)
    tier.drop(TREE, [found_of(records[0])])
    put(tier, TREE, records[:1])
    assert name in there.keys("*")
    tier.close()


def move(source: Any, port: int, name: bytes) -> None:
    """Hand one key to another node, as the tool that moves slots does."""
    password = source.connection_pool.connection_kwargs["password"]
    source.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "AUTH2", "default", password, "KEYS", name)


def test_a_cluster_of_one_node_is_asked_at_its_address(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What it calls itself may mean nothing to us."""
    lines = (*cluster_lines(*free_ports(1)), "cluster-announce-ip 192.0.2.1")
    with tcp_server(tmp_path_factory.mktemp("one"), *lines) as server:
        with client_of(server.folder) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            eventually(lambda: is_whole(client, 1), "it is a cluster")
        tier = tier_of(server.folder)
        put(tier, TREE, chain(5))
        assert all(holds(tier, TREE, sealed) for sealed in chain(5))
        tier.close()


def test_what_a_cluster_says_of_its_slots_is_read_with_care() -> None:
    rows: list[Any] = [
        [0, 9000, [b"10.0.0.1", 7000, b"id"], [b"10.0.0.9", 7000, b"replica"]],
        [9001, 16383, [None, 7001, b"id"]],
    ]
    topology = topology_of(rows, "seed")
    assert topology.masters == (("10.0.0.1", 7000), ("seed", 7001))
    assert (topology.by_slot[0], topology.by_slot[9000], topology.by_slot[9001]) == (0, 0, 1)
    assert topology_of([[0, 16383, [b"10.0.0.1", 7000]]], "seed") == Topology()
    odd: list[Any] = [*rows, [5], 7, [1, 2, b"x"], [0, 9000, [b"10.0.0.3", 0]], [b"0", b"1", []]]
    assert topology_of(odd, "seed") == topology
    assert topology_of([*rows, [-5, 20_000, [b"10.0.0.3", 7000]]], "seed").by_slot == topology.by_slot


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("MOVED 3999 127.0.0.1:6381", ("127.0.0.1", 6381)), ("ASK 1 ::1:6381", ("::1", 6381)), ("MOVED 1 :6381", None),
        ("MOVED", None), ("MOVED 1 host:0", None), ("MOVED 1 host:99999", None), ("MOVED 1 host:" + "9" * 9999, None),
    ],
)  # fmt: skip
def test_where_a_key_went_is_read_with_care(text: str, node: tuple[str, int] | None) -> None:
    assert elsewhere(ServerError(text)) == node

"""Nothing is kept for ever, and no block is kept longer than one that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.blocks.record import CODEC_NONE
from kvpool.config.service import ServiceAddress
from kvpool.tiers.dragonfly.names import Names
from kvpool.tiers.dragonfly.tier import DragonflyTier
from kvpool.tiers.tier import Sealed
from tests.tiers.dragonfly.servers import PASSWORD, Between, Cluster, client_of, tcp_server, tier_at, tier_of
from tests.tiers.keyed_conformance import OTHER_CODEC, chain, found_of, keys_of, put, sealed_of, tree_of

BLOCKS = 6
TREE = tree_of(1, tenant=2, epoch=3)
CODECS = [CODEC_NONE, OTHER_CODEC]
LONG_S, SHORT_S = 1000.0, 10.0

ranges = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).map(lambda ends: (ends[0], ends[0] + ends[1]))
stores = st.tuples(st.just("put"), ranges, st.sampled_from(CODECS))
reads = st.tuples(st.just("get"), ranges, st.sampled_from(CODECS))
touches = st.tuples(st.just("touch"), ranges, st.sampled_from(CODECS))
drops = st.tuples(st.just("drop"), ranges, st.sampled_from(CODECS))


def records_in(codec: int) -> list[Sealed]:
    return [sealed_of(number, 5000 + 4096 * codec, codec) for number in range(BLOCKS)]


def do(tier: DragonflyTier, what: str, blocks: tuple[int, int], codec: int) -> None:
    """One call as the engine makes it: blocks from the prompt's start on, or with those before them."""
    records = records_in(codec)
    chosen = records[slice(*blocks)]
    if what == "put":
        put(tier, TREE, chosen, keys_of(records[: blocks[0]]))
    elif what == "get":
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in chosen]
        tier.get(TREE, [found_of(sealed) for sealed in chosen], buffers)
        tier.touch(TREE, keys_of(records[: blocks[1]]), CODECS)
    elif what == "touch":
        tier.touch(TREE, keys_of(records[: blocks[1]]), CODECS)
    else:
        tier.drop(TREE, [found_of(sealed) for sealed in chosen])


def ends_ms(client: Any) -> list[list[int]]:
    """Per block, when each of its records is gone, on the server's clock."""
    names = Names(TREE)
    with client.pipeline(transaction=True) as asked:
        for sealed in chain(BLOCKS):
            for codec in CODECS:
                asked.pexpiretime(names.of(sealed.key, codec))
        each = asked.execute()
    assert -1 not in each, "a record without an end"
    return [[end for end in each[at : at + 2] if end > 0] for at in range(0, 2 * BLOCKS, 2)]


def check_chain(blocks: Sequence[Sequence[int]], tolerance_ms: int = 0) -> None:
    for parents, children in pairwise(blocks):
        if parents and children:
            assert min(parents) + tolerance_ms >= max(children), blocks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.one_of(stores, reads, touches, drops), min_size=1, max_size=8))
def test_a_parent_is_kept_as_long_as_its_children(
    folder: Path, client: Any, calls: list[tuple[str, tuple[int, int], int]]
) -> None:
    client.flushall()
    tier = tier_of(folder)
    tier.find(TREE, keys_of(chain(1)), CODECS)
    for call in calls:
        do(tier, *call)
        check_chain(ends_ms(client))
    tier.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(st.tuples(st.booleans(), st.one_of(stores, reads, touches)), min_size=1, max_size=8))
def test_so_it_is_where_two_pools_keep_blocks_for_different_times(
    folder: Path, client: Any, calls: list[tuple[bool, tuple[str, tuple[int, int], int]]]
) -> None:
    client.flushall()
    tiers = [tier_of(folder, ttl_s=SHORT_S), tier_of(folder, ttl_s=LONG_S)]
    for tier in tiers:
        tier.find(TREE, keys_of(chain(1)), CODECS)
    put(tiers[0], TREE, records_in(CODEC_NONE))
    put(tiers[0], TREE, records_in(OTHER_CODEC))
    for is_long, call in calls:
        do(tiers[is_long], *call)
        check_chain(ends_ms(client))
    for tier in tiers:
        tier.close()


def test_on_a_cluster_it_is_so_to_the_duration_of_a_call(cluster: Cluster) -> None:
    tier = tier_of(cluster.folder)
    records = chain(40)
    put(tier, TREE, records[:20])
    put(tier, TREE, records[20:], keys_of(records[:20]))
    ends = []
    for sealed in records:
        name = Names(TREE).of(sealed.key, CODEC_NONE)
        ends.append([end for client in cluster.clients if (end := _end_ms(client, name)) > 0])
    assert all(len(end) == 1 for end in ends)
    check_chain(ends, tolerance_ms=2000)
    tier.close()


def _end_ms(client: Any, name: bytes) -> int:
    return int(client.pexpiretime(name)) if name in client.keys(name) else 0


@pytest.mark.parametrize("what", ["put", "get", "touch"])
def test_use_makes_a_ttl_longer_and_never_shorter(folder: Path, client: Any, what: str) -> None:
    tier = tier_of(folder, ttl_s=SHORT_S)
    do(tier, "put", (0, 3), CODEC_NONE)
    tier.ttl_s = LONG_S
    do(tier, what, (0, 3), CODEC_NONE)
    long = ends_ms(client)
    now_ms = client.time()[0] * 1000
    assert all(end > now_ms + 0.9 * LONG_S * 1000 for block in long[:3] for end in block)
    tier.ttl_s = SHORT_S
    do(tier, what, (0, 3), CODEC_NONE)
    assert ends_ms(client) == long
    tier.close()


def test_a_ttl_of_nothing_still_is_one(folder: Path, client: Any) -> None:
    tier = tier_of(folder, ttl_s=0.0)
    assert tier.put(TREE, chain(1), []).done == [True]
    assert client.pttl(Names(TREE).of(chain(1)[0].key, CODEC_NONE)) in (-2, 0, 1)
    tier.close()


def test_a_server_that_knows_no_gt_is_asked_without(tmp_path: Path) -> None:
    """As Redis before 7; here what we ask for is made into what no server knows."""
    with (
        tcp_server(tmp_path) as server,
        Between(server.port, requests=lambda data: data.replace(b"\r\nGT\r\n", b"\r\nG?\r\n")) as between,
        client_of(server.folder) as client,
    ):
        tier = tier_at(
            lambda: ServiceAddress(url=f"redis://127.0.0.1:{between.port}", password=PASSWORD), ttl_s=SHORT_S
        )
        records = records_in(CODEC_NONE)
        put(tier, TREE, records[:4])
        tier.ttl_s = LONG_S
        put(tier, TREE, records[4:], keys_of(records[:4]))
        check_chain(ends_ms(client))
        now_ms = client.time()[0] * 1000
        assert all(end > now_ms + 0.9 * LONG_S * 1000 for block in ends_ms(client) for end in block)
        do(tier, "get", (2, 5), CODEC_NONE)
        check_chain(ends_ms(client))
        tier.close()

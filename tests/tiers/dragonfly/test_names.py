"""What a key says, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.record import CODEC_NONE
from kvpool.tiers.dragonfly.names import Names, Parts, epoch_name, model_pattern, parts_of, tenant_pattern
from kvpool.tiers.dragonfly.tier import DragonflyTier
from tests.tiers.dragonfly.servers import Cluster, tier_of
from tests.tiers.keyed_conformance import OTHER_CODEC, chain, found_of, keys_of, put, tree_of

trees = st.builds(
    TreeId,
    st.binary(min_size=32, max_size=32).map(Fingerprint),
    st.binary(min_size=16, max_size=16).map(TenantDigest),
    st.integers(0, 2**64 - 1),
)
keys = st.binary(min_size=16, max_size=16).map(BlockKey)
codecs = st.integers(0, 2**16 - 1)


@pytest.fixture
def tier(folder: Path) -> Iterator[DragonflyTier]:
    tier = tier_of(folder)
    yield tier
    tier.close()


@given(tree=trees, key=keys, codec=codecs)
def test_a_key_is_plain_text_without_braces_and_says_whose_the_record_is(
    tree: TreeId, key: BlockKey, codec: int
) -> None:
    name = Names(tree).of(key, codec)
    text = name.decode("ascii")
    assert text.startswith("kvpool:1:")
    assert set(text) <= set("0123456789abcdef:kvpool")
    assert parts_of(name) == Parts(tree.tenant.hex(), tree.epoch, tree.fingerprint[:8].hex())
    assert fnmatchcase(text, tenant_pattern(tree.tenant).decode())
    assert fnmatchcase(text, model_pattern(tree.fingerprint).decode())


@given(first=st.tuples(trees, keys, codecs), second=st.tuples(trees, keys, codecs))
def test_no_two_records_have_one_key(first: tuple[TreeId, BlockKey, int], second: tuple[TreeId, BlockKey, int]) -> None:
    same = Names(first[0]).of(*first[1:]) == Names(second[0]).of(*second[1:])
    assert same == (first == second)


@given(st.binary(max_size=200))
def test_what_is_no_key_of_ours_says_nothing(name: bytes) -> None:
    parts = parts_of(name)
    assert parts is None or name.startswith(b"kvpool:1:")


def test_an_epoch_longer_than_any_says_nothing(tier: DragonflyTier, client: Any) -> None:
    name = f"kvpool:1:{tree_of().tenant.hex()}:{'9' * 9999}:0:0:0".encode()
    client.set(name, "x")
    assert parts_of(name) is None
    assert tier.erase(tree_of().tenant, 5) == 0


@given(st.binary(min_size=16, max_size=16).map(TenantDigest))
def test_an_epoch_is_no_record(tenant: TenantDigest) -> None:
    assert parts_of(epoch_name(tenant)) is None


def test_all_that_lies_in_the_server_is_named_so_and_has_an_end(tier: DragonflyTier, client: Any) -> None:
    tree, records = tree_of(1, tenant=2, epoch=3), chain(5)
    put(tier, tree, records[:3])
    put(tier, tree, [sealed._replace(codec=OTHER_CODEC) for sealed in records[3:]], keys_of(records[:3]))
    tier.get(tree, [found_of(records[0])], [np.empty(records[0].record.nbytes, np.uint8)])
    tier.touch(tree, keys_of(records), [CODEC_NONE, OTHER_CODEC])
    tier.note_epoch(tree.tenant, 3)
    names = client.keys("*")
    assert len(names) == 6
    for name in names:
        assert name.startswith(b"kvpool:1:")
        assert not set(name) & set(b"{}")
        assert client.pttl(name) > 0


def test_the_keys_of_a_prompt_are_spread_over_a_cluster(cluster: Cluster) -> None:
    tier = tier_of(cluster.folder)
    put(tier, tree_of(), chain(60))
    assert all(client.dbsize() > 5 for client in cluster.clients)
    tier.close()

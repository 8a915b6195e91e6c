"""The hint at tenants' epochs: the highest that anybody noted, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvpool.blocks.identity import TenantDigest
from kvpool.tiers.dragonfly.epochs import TTL_MS
from kvpool.tiers.dragonfly.names import epoch_name
from kvpool.tiers.dragonfly.tier import DragonflyTier
from tests.tiers.dragonfly.servers import Cluster, tier_of

TENANT, OTHER = TenantDigest(b"t" * 16), TenantDigest(b"o" * 16)


@pytest.fixture
def tier(folder: Path) -> Iterator[DragonflyTier]:
    tier = tier_of(folder)
    yield tier
    tier.close()


def test_an_epoch_that_nobody_noted_is_not_known_rather_than_zero(tier: DragonflyTier) -> None:
    assert tier.epoch_hint(TENANT) is None
    tier.note_epoch(TENANT, 0)
    assert tier.epoch_hint(TENANT) == 0
    assert tier.epoch_hint(OTHER) is None


def test_the_highest_epoch_counts_whoever_notes_it_when(tier: DragonflyTier, folder: Path) -> None:
    epochs = [*range(100), 2**53, 2**53 + 1, 2**62]
    Random(1).shuffle(epochs)
    tiers = [tier_of(folder) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda at: tiers[at % 3].note_epoch(TENANT, epochs[at]), range(len(epochs))))
    assert tier.epoch_hint(TENANT) == 2**62
    for each in tiers:
        each.note_epoch(TENANT, 5)
        assert each.epoch_hint(TENANT) == 2**62
        each.close()


def test_a_hint_takes_the_room_of_one_and_is_kept_for_thirty_days(tier: DragonflyTier, client: Any) -> None:
    for epoch in (3, 1, 4, 1, 5, 9, 2, 6):
        tier.note_epoch(TENANT, epoch)
    assert client.zcard(epoch_name(TENANT)) == 1
    assert TTL_MS - 60_000 < client.pttl(epoch_name(TENANT)) <= TTL_MS


@pytest.mark.parametrize("value", [b"7", b"", b"x" * 20])
def test_what_else_lies_under_the_key_is_no_hint(tier: DragonflyTier, client: Any, value: bytes) -> None:
    client.set(epoch_name(TENANT), value)
    assert tier.epoch_hint(TENANT) is None
    client.delete(epoch_name(TENANT))
    client.zadd(epoch_name(TENANT), {value: 0})
    assert tier.epoch_hint(TENANT) is None


def test_erasing_a_tenant_leaves_the_hint(tier: DragonflyTier) -> None:
    tier.note_epoch(TENANT, 4)
    assert tier.erase(TENANT, 4) == 0
    assert tier.epoch_hint(TENANT) == 4


def test_hints_work_on_a_cluster(cluster: Cluster) -> None:
    tier = tier_of(cluster.folder)
    for number in range(20):
        tenant = TenantDigest(bytes([number]) * 16)
        tier.note_epoch(tenant, number)
        tier.note_epoch(tenant, 0)
        assert tier.epoch_hint(tenant) == number
    tier.close()

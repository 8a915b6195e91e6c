"""What was erased goes from shared tiers too: from those that are away later, and once more for late writers."""

from __future__ import annotations

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.pool.remote.erasing import AGAIN_S, MAX_PENDING, Eraser
from kvpool.pool.remote.store import RemoteStore
from kvpool.tiers.tier import TierName
from tests.clock import Clock

from .shared import MemoryTier

TREE = TreeId(Fingerprint(bytes(32)), TenantDigest(b"t" * 16), 0)
KNOWN = (TREE, BlockKey(bytes(16)), 0)


def eraser_of(*tiers: MemoryTier, clock: Clock) -> tuple[Eraser, list[RemoteStore]]:
    stores = [RemoteStore(tier.name, clock=clock) for tier in tiers]
    for store, tier in zip(stores, tiers, strict=True):
        store.publish(tier)
    return Eraser(stores, clock=clock), stores


def test_what_a_late_writer_has_left_goes_the_second_time_and_then_the_erasure_is_over() -> None:
    tier, clock = MemoryTier(), Clock()
    eraser, _ = eraser_of(tier, clock=clock)
    tier.records[KNOWN] = b"early"
    erasure = eraser.erase_tenant(TREE.tenant, 1)
    eraser.step()
    assert erasure.cleared.is_set()
    assert erasure.removed == {TierName.DRAGONFLY: 1}
    tier.records[KNOWN] = b"late"
    eraser.step()
    assert tier.records, "not before its time"
    clock.now_s += AGAIN_S
    eraser.step()
    assert not tier.records
    assert eraser.pending == 0


def test_a_tier_that_is_out_is_cleared_when_it_is_back_and_holds_no_other_up() -> None:
    away, here, clock = MemoryTier(), MemoryTier(TierName.DATABASE), Clock()
    eraser, stores = eraser_of(away, here, clock=clock)
    away.records[KNOWN] = here.records[KNOWN] = b"x"
    away.fault = "away"
    erasure = eraser.erase_tenant(TREE.tenant, 1)
    eraser.step()
    assert not here.records
    assert not erasure.cleared.is_set()
    assert erasure.first == {TierName.DRAGONFLY}
    away.fault = ""
    stores[0].breaker.succeeded()
    stores[0].publish(away)
    clock.now_s += 1000
    while erasure.first:
        stores[0].probe()
        eraser.step()
    assert not away.records
    assert erasure.cleared.is_set()


def test_epochs_that_are_not_over_stay() -> None:
    tier, clock = MemoryTier(), Clock()
    eraser, _ = eraser_of(tier, clock=clock)
    tier.records[KNOWN] = tier.records[TREE._replace(epoch=1), KNOWN[1], 0] = b"x"
    eraser.erase_tenant(TREE.tenant, 1)
    eraser.step()
    assert [tree.epoch for tree, _, _ in tier.records] == [1]


def test_no_more_than_so_many_are_pending() -> None:
    tier, clock = MemoryTier(), Clock()
    eraser, _ = eraser_of(tier, clock=clock)
    tier.fault = "away"
    for _ in range(MAX_PENDING + 5):
        eraser.erase_tenant(TREE.tenant, 1)
    assert eraser.pending == MAX_PENDING

"""Models of one index without guarantees: whose blocks go, under every policy."""

from __future__ import annotations

from random import Random

import pytest

from kvpool.blocks.identity import Fingerprint, KeyChain, TenantDigest, TreeId
from kvpool.policy import POLICIES
from kvpool.prefix.index import PrefixIndex, SharingRules
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import RAM
from kvpool.prefix.tree import PrefixTree

CAPACITY = 120


def tree_of(index: PrefixIndex, model: str) -> PrefixTree:
    tree_id = TreeId(Fingerprint(model.encode().ljust(32)), TenantDigest(bytes(16)), 0)
    chain = KeyChain(bytes(32), *tree_id)
    return index.add_tree(PrefixTree(tree_id, token_bytes=4, record_bytes=1, chain=chain, model=model))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_models_that_share_a_tier_make_room_for_each_other(policy: str, seed: int) -> None:
    choice, rng = POLICIES[policy], Random(seed)
    index = PrefixIndex(
        limit_bytes=1 << 40,
        make_policy=choice.make_policy,
        make_learner=choice.make_learner,
        sharing=SharingRules(protect=False),
    )
    trees = [tree_of(index, model) for model in ("one", "two", "three")]
    hits = 0
    for place in range(0, 100_000, 20):
        tree, prompt = rng.choice(trees), min(int(rng.expovariate(0.05)), 200)
        blocks = 1 + prompt % 9
        tokens = b"".join((prompt * 100 + at).to_bytes(4, "big") for at in range(blocks))
        pin = index.match(tree, tokens, asked=blocks)
        hits += pin.depth
        while index.copies[RAM] + blocks - pin.depth > CAPACITY:
            assert index.evict(RAM, index.copies[RAM] + blocks - pin.depth - CAPACITY)
        index.attach(pin, tokens, RAM, list(range(place, place + blocks - pin.depth)))
        index.unpin(pin)
        if place > 20_000 and not rng.randrange(500):
            check_integrity(index)
    assert hits > 1_000
    assert all(account.copies[RAM] for account in index.ledger.accounts.values())

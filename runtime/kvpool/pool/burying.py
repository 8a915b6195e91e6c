"""Takes what was erased out of the tiers: a tenant's blocks, or a model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvpool.blocks.identity import TreeId
from kvpool.pool.engine import Engine
from kvpool.prefix.index import LEVEL_NAMES
from kvpool.prefix.tree import PrefixTree
from kvpool.tiers.tier import TierName


class Buried(NamedTuple):
    """What was given back, by tier; and how many blocks are being read still, and go when their leases end."""

    blocks: dict[TierName, int]
    bytes: dict[TierName, int]
    leased_blocks: int


def trees_of(engine: Engine, is_wanted: Callable[[TreeId], bool]) -> list[PrefixTree]:
    """The trees in the index whose identity is wanted."""
    with engine.index.lock:
        return [tree for tree_id, tree in engine.index.trees.items() if is_wanted(tree_id)]


def bury(engine: Engine, is_wanted: Callable[[PrefixTree], bool]) -> Buried:
    """Give back all that was erased. `is_wanted` says of which trees leased blocks are to be counted."""
    blocks = dict.fromkeys((*([TierName.GPU] if engine.gpu else []), TierName.RAM, TierName.SSD), 0)
    nbytes = dict(blocks)
    while gone := engine.index.bury():
        engine.copies.release(gone)
        for copy in gone:
            tier = TierName(LEVEL_NAMES[copy.level])
            blocks[tier] += 1
            nbytes[tier] += copy.record_bytes
    with engine.index.lock:
        trees = [tree for tree in engine.index.buried_trees() if is_wanted(tree)]
        leased = sum(node.leased_to() - node.start for tree in trees for node in tree.nodes())
    return Buried(blocks, nbytes, leased)

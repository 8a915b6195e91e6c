"""A node of the prefix tree: the edge of whole blocks that leads to it, and where each of those blocks has copies.

Only `kvpool.prefix` writes these fields, under the index's lock. Layout of a node with three blocks of which the last
is in RAM alone and the first two on SSD too:

    tokens  |block 0|block 1|block 2|        int32 token ids of the edge
    keys    |key 0  |key 1  |key 2  |        16 bytes each
    places  gpu: None   ram: [7, 8, 9]   ssd: [64, 65]      an array ends with the last block that the tier holds

A *hole* is a block with no copy anywhere before another that has one; its place is -1. A leaf may end in blocks without
copies: they are cut off when they are many, and taken up again when they are stored again before that.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvpool.prefix.tree import PrefixTree

GPU: Final = 0
RAM: Final = 1
SSD: Final = 2
LEVELS: Final = (GPU, RAM, SSD)
"""The local tiers, fastest first; they index `Node.places`."""
NOWHERE: Final = -1

NO_CHILDREN: Final[dict[object, Node]] = {}
"""Shared by all leaves, and never written to."""
NO_COUNTS: Final = (0, 0, 0)

ChildKey = bytes | tuple[bytes, bytes]
"""The first block's token bytes; together with its extra key where it has one."""


class Node:
    """An edge of one or more blocks, `start` to `end` in blocks from the prompt's beginning.

    A node that has left the tree has no blocks (`end == start`); its `parent` and `start` stay, so that a pin that was
    made in it before a split finds its way up.
    """

    __slots__ = (
        "below",
        "busy",
        "children",
        "end",
        "ends",
        "extra",
        "heads",
        "hits",
        "keys",
        "last_use",
        "offered",
        "parent",
        "parked",
        "places",
        "queued",
        "refs",
        "save_to",
        "sent",
        "shared",
        "solid",
        "start",
        "tokens",
        "traits",
        "tree",
        "whole",
    )

    def __init__(
        self, tree: PrefixTree, parent: Node | None, tokens: bytes, keys: bytes, extra: bytes, start: int, end: int
    ) -> None:
        self.tree = tree
        self.parent = parent
        self.tokens = tokens
        self.keys = keys
        """Block keys, 16 bytes each."""
        self.extra = extra
        """Extra key of the first block; the others have none."""
        self.start = start
        self.end = end
        self.children: dict[object, Node] = NO_CHILDREN
        self.places: list[array[int] | None] = [None, None, None]
        self.below: list[int] | tuple[int, ...] = NO_COUNTS
        """Per level: how many children have, in themselves or below, a copy at that level or a faster one."""
        self.solid = 0
        """How many leading blocks have a copy somewhere."""
        self.whole = False
        """Whether all have."""
        self.refs = 0
        """Leases that pass through to a child, and so hold every block."""
        self.ends: dict[int, int] | None = None
        """Leases that end in this edge: depth -> how many."""
        self.last_use = 0
        """The index's clock when the whole edge was used last; 0 for never."""
        self.heads: list[tuple[int, int]] | None = None
        """Later uses of a part of the edge: (depth, clock), longest and oldest first. Void if before `last_use`."""
        self.offered = 0
        """Bit per level: on offer as a candidate for eviction."""
        self.parked = 0
        """Bit per level: would be on offer, were it not leased."""
        self.traits = b""
        """A byte for each block, where a learner gives them; else empty: see `kvpool.prefix.learning`."""
        self.shared = False
        self.hits = 0
        """Requests whose longest shared prefix ended with this edge."""
        self.queued = False
        """In the write queue."""
        self.busy: object | None = None
        """Whoever is writing some of its blocks to SSD right now; a split hands it on to the upper part."""
        self.save_to = 0
        """Blocks before this depth are wanted on SSD."""
        self.sent = 0
        """The round in which the whole edge was offered to the tiers that are shared; 0 for never: see `sending`."""

    @property
    def blocks(self) -> int:
        """How many blocks the edge has."""
        return self.end - self.start

    def place(self, index: int, level: int) -> int:
        """Where block `index` of this edge lies at `level`; -1 for nowhere."""
        places = self.places[level]
        return places[index] if places is not None and index < len(places) else NOWHERE

    def run_at(self, level: int, first: int, most: int) -> list[int]:
        """Where the blocks of this edge from index `first` on lie at `level`: up to the first that does not."""
        places = self.places[level]
        run = places[first : first + most].tolist() if places is not None and most > 0 else []
        return run[: run.index(NOWHERE)] if NOWHERE in run else run

    def has_copy(self, index: int) -> bool:
        """Whether block `index` of this edge lies at any level."""
        return any(places is not None and index < len(places) and places[index] != NOWHERE for places in self.places)

    def held_to(self) -> int:
        """Index after the last block of this edge that has a copy."""
        gpu, ram, ssd = self.places
        held = len(ram) if ram is not None else 0
        if ssd is not None and len(ssd) > held:
            held = len(ssd)
        if gpu is not None and len(gpu) > held:
            held = len(gpu)
        return held

    def holds(self, level: int) -> bool:
        """Whether this edge, or anything below it, has a copy at `level` or a faster one."""
        gpu, ram, ssd = self.places
        return bool(self.below[level] or gpu or (ram and level >= RAM) or (ssd and level == SSD))

    def leased_to(self) -> int:
        """Depth up to which the blocks of this edge are leased; `start` when none is."""
        if self.refs:
            return self.end
        return max(self.ends) if self.ends else self.start

    def is_leaf_at(self, level: int) -> bool:
        """Whether this edge has copies at `level` and nothing below it has any there or at a faster one."""
        return bool(self.places[level]) and not self.below[level]

    def tail(self, level: int) -> int:
        """Index of the block that can leave `level` next, or -1: the last one there, if nothing deeper is as fast."""
        places = self.places[level]
        if not places or self.below[level]:
            return NOWHERE
        held = len(places)
        for faster in self.places[:level]:
            if faster is not None and len(faster) > held:
                return NOWHERE
        return held - 1 if self.start + held > self.leased_to() else NOWHERE

    # -- ages ----------------------------------------------------------------------------------------------------------

    def use_head(self, depth: int, now: int) -> None:
        """Note that the blocks before `depth`, fewer than all, were used."""
        heads = self.heads
        if heads is None or heads[0][1] <= self.last_use:
            self.heads = [(depth, now)]
            return
        while heads and heads[-1][0] <= depth:
            heads.pop()
        heads.append((depth, now))

    def used_at(self, index: int) -> int:
        """When block `index` of this edge was used last."""
        if self.heads is not None:
            depth = self.start + index
            for end, use in reversed(self.heads):
                if end > depth:
                    return max(use, self.last_use)
        return self.last_use

    def trait(self, index: int) -> int:
        """What the policy is told of block `index` of this edge; 0 where nothing learns."""
        return self.traits[index] if self.traits else 0

    def same_trait_from(self, index: int) -> int:
        """The first index from which on to `index` all blocks have one trait."""
        return len(self.traits[: index + 1].rstrip(self.traits[index : index + 1])) if self.traits else 0

    def same_age_from(self, index: int) -> int:
        """The first index from which on to `index` all blocks were used at one time."""
        if self.heads is not None and self.heads[0][1] > self.last_use:
            for end, _ in self.heads:
                if end <= self.start + index:
                    return end - self.start
        return 0

    def live_heads(self) -> list[tuple[int, int]]:
        """`heads` without void ones."""
        return self.heads if self.heads is not None and self.heads[0][1] > self.last_use else []

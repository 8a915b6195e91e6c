"""Rebuilds trees from what lay on SSD: 100,000 records in well below two seconds.

Records name their parent's key, so chains are found by key and entered as whole edges. A record whose ancestors are not
there, or whose key is not the one that they and its tokens give, can be matched by nobody and is dropped, and so is a
second record of one block.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple, Protocol

from kvpool.blocks.identity import BlockKey
from kvpool.prefix.index import MAX_EDGE_BYTES, PrefixIndex
from kvpool.prefix.node import SSD, Node
from kvpool.prefix.tree import PrefixTree


class Found(Protocol):
    """What recovery tells of one record."""

    @property
    def key(self) -> BlockKey:
        """Its block key."""
        ...

    @property
    def parent(self) -> BlockKey:
        """The key of the block before it; the chain's root for a first block."""
        ...

    @property
    def depth(self) -> int:
        """In blocks from the prompt's start."""
        ...

    @property
    def tokens(self) -> bytes:
        """Token ids as int32 bytes."""
        ...

    @property
    def extra(self) -> bytes:
        """Extra key, or nothing."""
        ...

    @property
    def place(self) -> int:
        """Where it lies on SSD."""
        ...


class Restored(NamedTuple):
    """How many blocks were entered, and the places of records that could not be."""

    blocks: int
    orphans: list[int]
    duplicates: list[int]


class _Run:
    """A chain of blocks that will be one edge, or a part of one."""

    __slots__ = ("depth", "end", "extra", "keys", "node", "parent", "places", "tokens")

    def __init__(self, parent: _Run | None, record: Found) -> None:
        self.parent = parent
        self.depth = record.depth
        self.end = record.depth + 1
        self.extra = record.extra
        self.tokens = [record.tokens]
        self.places = [record.place]
        self.keys = [record.key]
        self.node: Node | None = None

    def append(self, record: Found) -> None:
        self.end += 1
        self.tokens.append(record.tokens)
        self.places.append(record.place)
        self.keys.append(record.key)


def restore(index: PrefixIndex, tree: PrefixTree, records: Iterable[Found]) -> Restored:
    """Enter `records`, all of `tree`'s identity, in any order. Later records of one block are duplicates.

    The tree is one that `add_tree` has returned. Restored blocks count as never used.
    """
    runs: dict[BlockKey, _Run] = {}
    chains: list[_Run] = []
    orphans: list[int] = []
    duplicates: list[int] = []
    most_blocks = max(MAX_EDGE_BYTES // tree.token_bytes, 1)
    root, extend = tree.chain.root, tree.chain.extend
    for record in sorted(records, key=attrgetter("depth")):
        key, depth = record.key, record.depth
        parent = runs.get(record.parent)
        if key in runs:
            duplicates.append(record.place)
        elif (
            not _fits(parent, record, root, tree.token_bytes)
            or extend(record.parent, record.tokens, record.extra) != key
        ):
            orphans.append(record.place)
        elif (
            parent is not None
            and parent.end == depth
            and not record.extra
            and parent.keys[-1] == record.parent
            and len(parent.keys) < most_blocks
        ):
            parent.append(record)
            runs[key] = parent
        else:
            runs[key] = run = _Run(parent, record)
            chains.append(run)
    blocks = 0
    with index.lock:
        tree = index._entered(tree)
        if tree.erased:
            return Restored(0, orphans + [place for run in chains for place in run.places], duplicates)
        for run in chains:
            refused = _enter(index, tree, run)
            duplicates += refused
            blocks += len(run.places) - len(refused)
        index._prune(tree.root)
    return Restored(blocks, orphans, duplicates)


def _fits(parent: _Run | None, record: Found, root: BlockKey, token_bytes: int) -> bool:
    """Whether the record is one of this tree's blocks, and follows the block that it names."""
    if len(record.tokens) != token_bytes:
        return False
    if parent is None:
        return record.depth == 0 and record.parent == root
    at = record.depth - 1 - parent.depth
    return 0 <= at < len(parent.keys) and parent.keys[at] == record.parent


def _enter(index: PrefixIndex, tree: PrefixTree, run: _Run) -> list[int]:
    node = tree.root
    if run.parent is not None:
        assert run.parent.node is not None
        node = run.parent.node
        while node.start >= run.depth and node.parent is not None:
            node = node.parent
    extras = {run.depth: run.extra} if run.extra else None
    run.node, refused = index._enter(node, run.depth, b"".join(run.tokens), b"".join(run.keys), SSD, run.places, extras)
    return refused

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
    """A chain of records that will be one edge, or a part of one."""

    __slots__ = ("depth", "extra", "node", "parent", "records")

    def __init__(self, parent: _Run | None, record: Found) -> None:
        self.parent = parent
        self.depth = record.depth
        self.extra = record.extra
        self.records = [record]
        self.node: Node | None = None


def restore(index: PrefixIndex, tree: PrefixTree, records: Iterable[Found]) -> Restored:
    """Enter `records`, all of `tree`'s identity, in any order. Later records of one block are duplicates.

    The tree is one that `add_tree` has returned. Restored blocks count as never used.
    """
    runs: dict[BlockKey, _Run] = {}
    chains: list[_Run] = []
    orphans: list[int] = []
    duplicates: list[int] = []
    most_blocks = max(MAX_EDGE_BYTES // tree.token_bytes, 1)
    extend = tree.chain.extend
    for record in sorted(records, key=attrgetter("depth")):
        key = record.key
        parent = runs.get(record.parent)
        if key in runs:
            duplicates.append(record.place)
        elif not _fits(parent, record, tree) or extend(record.parent, record.tokens, record.extra) != key:
            orphans.append(record.place)
        elif parent is not None and _lengthens(parent, record, most_blocks):
            parent.records.append(record)
            runs[key] = parent
        else:
            runs[key] = run = _Run(parent, record)
            chains.append(run)
    blocks = 0
    lengths = {index.bytes_at(SSD, record.place) for run in chains for record in run.records}
    encoded = bool(lengths - {None, tree.record_bytes})
    with index.lock:
        tree = index._entered(tree)
        tree.encoded = tree.encoded or encoded
        if tree.erased:
            return Restored(0, orphans + [record.place for run in chains for record in run.records], duplicates)
        for run in chains:
            refused = _enter(index, tree, run)
            duplicates += refused
            blocks += len(run.records) - len(refused)
        index._prune(tree.root)
    return Restored(blocks, orphans, duplicates)


def _fits(parent: _Run | None, record: Found, tree: PrefixTree) -> bool:
    """Whether the record is one of this tree's blocks, and follows the block that it names."""
    if len(record.tokens) != tree.token_bytes:
        return False
    if parent is None:
        return record.depth == 0 and record.parent == tree.chain.root
    at = record.depth - 1 - parent.depth
    return 0 <= at < len(parent.records) and parent.records[at].key == record.parent


def _lengthens(run: _Run, record: Found, most_blocks: int) -> bool:
    """Whether the record can be the next of the run's edge: the first child found, without an extra key."""
    blocks = len(run.records)
    return record.depth == run.depth + blocks and not record.extra and blocks < most_blocks


def _enter(index: PrefixIndex, tree: PrefixTree, run: _Run) -> list[int]:
    node = tree.root
    if run.parent is not None:
        assert run.parent.node is not None
        node = run.parent.node
        while node.start >= run.depth and node.parent is not None:
            node = node.parent
    records = run.records
    places = [record.place for record in records]
    tokens, keys = records[0].tokens, bytes(records[0].key)
    if len(records) > 1:
        tokens = b"".join([record.tokens for record in records])
        keys = b"".join([record.key for record in records])
    extras = {run.depth: run.extra} if run.extra else None
    run.node, refused = index._enter(node, run.depth, tokens, keys, SSD, places, extras)
    return refused

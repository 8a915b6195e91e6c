"""Shared prefixes of the index: which are used most, and how they are known again after a restart.

An edge is shared only where all before it are, so the shared part of a tree hangs together at its root. It is walked 32
edges to a hold of the lock (the children of one edge are listed at once): what changes meanwhile may be missed, or be
reported as it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import nlargest
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey, TreeId
from kvpool.prefix.index import BATCH_BLOCKS, Pin, PrefixIndex
from kvpool.prefix.node import LEVELS, Node
from kvpool.prefix.tree import PrefixTree


class SharedPrefix(NamedTuple):
    """A prefix that requests have in common, up to where they part or it was declared to end."""

    tree: TreeId
    model: str
    """The model's name."""
    key: BlockKey
    """Of its last block."""
    depth: int
    """Its length in blocks."""
    tokens: int
    hits: int
    """Requests whose longest shared prefix it was: those that went on in a longer shared one count there."""
    bytes: tuple[int, ...]
    """Per level (gpu, ram, ssd): what its blocks take there, from the prompt's first block on."""
    children: int
    """How many different continuations are held."""
    idle_uses: int
    """How many leases were opened since it was last used, of whatever prompts."""


class SharedMark(NamedTuple):
    """What is kept of a shared prefix over a restart."""

    tree: TreeId
    depth: int
    key: BlockKey
    hits: int


def top_shared(index: PrefixIndex, count: int) -> list[SharedPrefix]:
    """The `count` shared prefixes with most hits, most first; of as many hits the one used last.

    Those of which nothing is held any more are left out, and so are prefixes that are only the way to longer ones: no
    request has ended there.
    """
    used = (node for node in shared_nodes(index) if node.hits or not _has_shared_child(node))
    found = []
    for node in nlargest(count, used, key=lambda node: (node.hits, node.last_use)):
        with index.lock:
            if node.blocks and node.shared:
                found.append(_described(index, node))
    return found


def shared_nodes(index: PrefixIndex) -> Iterator[Node]:
    """Every shared edge, parents before children. The lock is not held while the caller works."""
    with index.lock:
        trees = list(index.trees.values())
    for tree in trees:
        with index.lock:
            pending = list(tree.root.children.values())
        while pending:
            found = []
            with index.lock:
                for node in pending[-BATCH_BLOCKS:]:
                    pending.pop()
                    if node.shared and node.blocks:
                        found.append(node)
                for node in found:
                    pending.extend(node.children.values())
            yield from found


def shared_marks(index: PrefixIndex, most: int) -> list[SharedMark]:
    """What to keep of the shared prefixes; of more than `most`, those with most hits."""
    found = []
    for node in nlargest(most, shared_nodes(index), key=lambda node: (node.hits, node.last_use)):
        with index.lock:
            if node.blocks:
                found.append(SharedMark(node.tree.id, node.end, BlockKey(node.keys[-KEY_BYTES:]), node.hits))
    return found


def mark_again(index: PrefixIndex, marks: Iterable[SharedMark]) -> int:
    """Declare shared what was so before a restart, as far as it is there again; the number of prefixes found."""
    by_tree: dict[TreeId, dict[int, dict[BlockKey, int]]] = defaultdict(lambda: defaultdict(dict))
    for mark in marks:
        by_tree[mark.tree][mark.depth][mark.key] = mark.hits
    found = 0
    for tree_id, wanted in by_tree.items():
        tree = index.tree(tree_id)
        if tree is not None:
            ends = _ends_in(index, tree, wanted)
            for node, depth, hits in ends:
                _mark(index, node, depth, hits)
            found += len(ends)
    return found


def _ends_in(
    index: PrefixIndex, tree: PrefixTree, wanted: Mapping[int, Mapping[BlockKey, int]]
) -> list[tuple[Node, int, int]]:
    """Where the wanted prefixes end in the tree: edge, depth, hits. Holds the lock for the whole walk, at start-up."""
    depths = sorted(wanted)
    found = []
    with index.lock:
        for node in tree.nodes():
            for depth in depths[bisect_right(depths, node.start) : bisect_right(depths, node.end)]:
                at = (depth - node.start) * KEY_BYTES
                hits = wanted[depth].get(BlockKey(node.keys[at - KEY_BYTES : at]))
                if hits is not None:
                    found.append((node, depth, hits))
    return found


def _mark(index: PrefixIndex, node: Node, depth: int, hits: int) -> None:
    """Mark the prefix of this depth, which ends in `node` or, after a split, in what is above it."""
    pin = Pin(node.tree, node, depth)  # not counted: nothing is read through it
    index.mark_shared(pin)
    with index.lock:
        marked = index._settled(pin)
        marked.hits = max(marked.hits, hits)


def _described(index: PrefixIndex, node: Node) -> SharedPrefix:
    tree = node.tree
    nbytes = [0] * len(LEVELS)
    above: Node = node
    while above.parent is not None:
        for level in LEVELS:
            nbytes[level] += index.size(above, level)
        above = above.parent
    return SharedPrefix(
        tree=tree.id,
        model=tree.model,
        key=BlockKey(node.keys[-KEY_BYTES:]),
        depth=node.end,
        tokens=node.end * tree.token_bytes // 4,
        hits=node.hits,
        bytes=tuple(nbytes),
        children=len(node.children),
        idle_uses=index.uses - node.used_at(node.blocks - 1),
    )


def _has_shared_child(node: Node) -> bool:
    return any(child.shared for child in list(node.children.values()))

"""Looks at the index without using it: for `explain`, which must not make a block younger."""

from __future__ import annotations

from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import LEVELS, NOWHERE
from kvpool.prefix.tree import Extras, PrefixTree, Runs, child_key, common_blocks


def levels_of(index: PrefixIndex, tree: PrefixTree, tokens: bytes, extras: Extras | None = None) -> list[list[int]]:
    """At which levels each whole block of `tokens` has a copy, holes included; empty lists where it has none.

    Unlike a match this goes on behind a hole. The lock is held for the whole walk: an operator's question, not a
    request's.
    """
    size = tree.token_bytes
    total = len(tokens) // size
    found: list[list[int]] = []
    runs = Runs(extras, total)
    with index.lock:
        node = tree.root
        while len(found) < total:
            depth = len(found)
            child = node.children.get(child_key(tokens, depth, size, extras))
            if child is None:
                break
            limit = min(child.blocks, runs.end_after(depth) - depth)
            common = common_blocks(child.tokens, 0, tokens, depth * size, limit, size)
            found += [[level for level in LEVELS if child.place(at, level) != NOWHERE] for at in range(common)]
            if common < child.blocks:
                break
            node = child
    return found + [[] for _ in range(total - len(found))]

"""What the records of blocks in the index say of themselves: made from the tree when a record is written or checked."""

from __future__ import annotations

from kvpool.blocks.identity import KEY_BYTES, BlockKey
from kvpool.blocks.record import Head
from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.node import Node


def pinned_heads(index: PrefixIndex, pin: Pin, first: int, count: int, *, payload_bytes: int) -> list[Head]:
    """The heads of `count` pinned blocks from `first` on, as they are under codec `none`, without a checksum."""
    found: list[Head] = []
    with index.lock:
        for node in index.path(pin):
            begin, end = max(first, node.start), min(first + count, node.end)
            if begin < end:
                found += edge_heads(node, begin - node.start, end - node.start, payload_bytes=payload_bytes)
    return found


def pinned_keys(index: PrefixIndex, pin: Pin, first: int) -> list[BlockKey]:
    """The key of the block before `first`, then those of the pinned blocks from `first` on."""
    with index.lock:
        keys = [pin.tree.chain.root]
        for node in index.path(pin):
            until = (min(node.end, pin.depth) - node.start) * KEY_BYTES
            keys += [BlockKey(node.keys[at : at + KEY_BYTES]) for at in range(0, until, KEY_BYTES)]
    return keys[first:]


def edge_heads(node: Node, begin: int, end: int, *, payload_bytes: int) -> list[Head]:
    """The heads of the blocks `begin` to before `end` of one edge. Call with the index's lock held."""
    tree, tokens, keys = node.tree, node.tokens, node.keys
    fingerprint, tenant, epoch = tree.id
    size = tree.token_bytes
    parent = tree.key_before(node, node.start + begin)
    found: list[Head] = []
    for at in range(begin, end):
        key = BlockKey(keys[at * KEY_BYTES : (at + 1) * KEY_BYTES])
        found.append(
            Head(
                key=key,
                parent=parent,
                fingerprint=fingerprint,
                tenant=tenant,
                epoch=epoch,
                depth=node.start + at,
                tokens=tokens[at * size : (at + 1) * size],
                extra=node.extra if at == 0 else b"",
                payload_bytes=payload_bytes,
                raw_bytes=payload_bytes,
            )
        )
        parent = key
    return found

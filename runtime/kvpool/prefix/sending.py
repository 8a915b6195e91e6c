"""Which blocks go to the tiers that are shared with other processes: the index's half of sending.

A *parcel* names blocks of one prompt that are in memory here and may not be there. The index does not know what shared
tiers hold; a node's `sent` says in which round it was offered to them last. Rounds follow each other a few times within
a TTL, so that what is used here again and again is not forgotten there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey, Fingerprint, TreeId
from kvpool.prefix.heads import edge_heads
from kvpool.prefix.index import BATCH_BLOCKS, Pin, PrefixIndex, path_to
from kvpool.prefix.node import GPU, NOWHERE, RAM, Node
from kvpool.prefix.saving import Run


class Parcel(NamedTuple):
    """Blocks `first` to before `until` of the prompt that ends in `node`, or ended there before it was split."""

    node: Node
    first: int
    until: int
    is_new: bool
    """They were stored just now; else they were sent in an earlier round, and what went there since is sent again."""


def new_parcel(index: PrefixIndex, pin: Pin, first: int, round_: int) -> Parcel | None:
    """The pinned blocks from `first` on, which were stored in this round; None where they were erased."""
    with index.lock:
        node = index._settled(pin)
        if pin.tree.erased or node.parent is None:
            return None
        if pin.depth == node.end:
            node.sent = round_
        return Parcel(node, first, pin.depth, is_new=True)


def prompt_parcel(index: PrefixIndex, pin: Pin) -> Parcel | None:
    """All pinned blocks; None where they were erased. Nothing is noted: it is not to be sent."""
    with index.lock:
        node = index._settled(pin)
        return None if pin.tree.erased or node.parent is None else Parcel(node, 0, pin.depth, is_new=False)


def used_parcel(index: PrefixIndex, pin: Pin, round_: int | None) -> Parcel | None:
    """The pinned blocks, to be sent again in this round; None where that was done, or they were erased.

    All of the edge in which the pin ends, so that its next use has nothing left to send. `round_` None: whatever was
    done in this round.
    """
    with index.lock:
        node = index._settled(pin)
        if pin.tree.erased or node.parent is None or (round_ is not None and node.sent == round_):
            return None
        if round_ is not None:
            node.sent = round_
        return Parcel(node, 0, node.end, is_new=False)


def not_sent(index: PrefixIndex, unsent: Parcel) -> None:
    """The parcel was dropped: its blocks are to be sent when they are used again."""
    with index.lock:
        unsent.node.sent = 0


def chain(index: PrefixIndex, sending: Parcel) -> tuple[TreeId, list[BlockKey]] | None:
    """The tree, and the keys of the prompt from its first block to the parcel's last one; None where all that is gone.

    Fewer where the tail has left the index since.
    """
    with index.lock:
        node = _standing(sending.node)
        if node is None:
            return None
        keys: list[BlockKey] = []
        for part in path_to(node):
            until = (min(part.end, sending.until) - part.start) * KEY_BYTES
            keys += [BlockKey(part.keys[at : at + KEY_BYTES]) for at in range(0, until, KEY_BYTES)]
        return node.tree.id, keys


def tokens(index: PrefixIndex, sending: Parcel) -> bytes:
    """The token ids of the prompt from its first block to the parcel's last one; none where all that is gone."""
    with index.lock:
        node = _standing(sending.node)
        if node is None:
            return b""
        size = node.tree.token_bytes
        parts = path_to(node)
        return b"".join(part.tokens[: (min(part.end, sending.until) - part.start) * size] for part in parts)


def begin(
    index: PrefixIndex,
    sending: Parcel,
    first: int,
    until: int,
    *,
    payload_bytes_of: Callable[[Fingerprint], int | None],
    most_bytes: int,
) -> Run | None:
    """Lease the next blocks from `first` on that are in memory, at most 32 and about `most_bytes`; None without any.

    They lie side by side in one edge. To be ended with `saving.end`.
    """
    with index.lock:
        node = _standing(sending.node)
        if node is None:
            return None
        while node.start > first and node.parent is not None:
            node = node.parent
        tree, at = node.tree, first - node.start
        payload_bytes = payload_bytes_of(tree.id.fingerprint)
        if payload_bytes is None or not 0 <= at < node.blocks:
            return None
        most = min(BATCH_BLOCKS, max(1, most_bytes // tree.record_bytes), min(node.end, until) - first)
        level = RAM if node.place(at, RAM) != NOWHERE else GPU
        places = node.run_at(level, at, most)
        if not places:
            return None
        pin = Pin(tree, node, first + len(places))
        index._count_lease(node, pin.depth)
        heads = edge_heads(node, at, at + len(places), payload_bytes=payload_bytes)
        return Run(node, pin, node, first, places, heads, level)


def _standing(node: Node) -> Node | None:
    """The node, or what is left of its prompt above it; None where the tree is gone."""
    if node.tree.erased or node.tree.gone:
        return None
    at: Node | None = node
    while at is not None and not at.blocks:
        at = at.parent
    return None if at is None or at.parent is None else at

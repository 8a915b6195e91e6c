"""What lies in an SSD segment that is to be freed: the index's half of reclaiming.

A record goes when nothing deeper in its tree lies on SSD, and its block is either in a faster tier as well or nothing
deeper is anywhere: so trees lose their leaves, and never a block that others hang on. What is left has to be written
again elsewhere before the segment is freed, and so has what is guaranteed to its model. A leased block forbids both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey
from kvpool.prefix.accounts import Account
from kvpool.prefix.history import Loss
from kvpool.prefix.index import BATCH_BLOCKS, Gone, PrefixIndex
from kvpool.prefix.node import LEVELS, NOWHERE, SSD, Node


class Living(NamedTuple):
    """A record that has to be written again, and the node that it is found in."""

    node: Node
    place: int
    key: BlockKey


def residents(index: PrefixIndex, segment: int) -> list[Node]:
    """The nodes with blocks in the segment, deepest first."""
    with index.lock:
        nodes = list(index.residents[SSD].get(segment, ()))
    return sorted(nodes, key=lambda node: -node.start)


def is_leased(index: PrefixIndex, segment: int) -> bool:
    """Whether a block in the segment is leased."""
    for node in residents(index, segment):
        with index.lock:
            leased = node.leased_to() - node.start
            if leased > 0 and any(at < leased for at in index.inside(node, SSD, segment)):
                return True
    return False


def last_use(index: PrefixIndex, segment: int) -> float:
    """When the segment's blocks were used, on average over its nodes, on the index's clock."""
    ages = [node.last_use for node in residents(index, segment)]
    return sum(ages) / len(ages) if ages else 0.0


def vacate_leaves(index: PrefixIndex, node: Node, segment: int) -> list[Gone]:
    """Remove up to 32 unleased records from the end of an edge that lie in the segment and that nothing hangs on."""
    region_of = index.region_of[SSD]
    with index.lock:
        if _child_on_ssd(node) is not None:
            return []
        return _remove_from_end(index, node, lambda at, place: region_of(place) == segment)


def evict_own(index: PrefixIndex, account: Account, level: int, wanted_bytes: int) -> list[Gone]:
    """Remove up to 32 of a model's copies, for it is at its limit at `level`: the policy's choice first.

    On SSD, records of blocks that are in RAM too can go as well, when no others are left: the policy does not offer
    those, for deeper blocks in RAM hang on them. Then those used longest ago go, the ends of chains first. Empty when
    nothing may go.
    """
    gone = index.evict_own(account, level, wanted_bytes)
    if gone or level != SSD:
        return gone
    with index.lock:
        regions = list(index.residents[SSD])
    nodes = [node for region in regions for node in residents(index, region) if node.tree.account is account]
    for node in sorted(nodes, key=lambda node: (node.last_use, -node.start)):
        with index.lock:
            if _child_on_ssd(node) is None:
                most = min(BATCH_BLOCKS - len(gone), -(-wanted_bytes // node.tree.record_bytes))
                gone += _remove_from_end(index, node, lambda at, place: True, most=most, loss=Loss.OVER_QUOTA)
        freed = sum(copy.record_bytes for copy in gone)
        if freed >= wanted_bytes or len(gone) >= BATCH_BLOCKS:
            break
    return gone


def drop_cold(index: PrefixIndex, node: Node, segment: int, cutoff: float) -> list[Gone]:
    """Remove up to 32 records of a chain that was not used since `cutoff`, the deepest first.

    It is the chain that goes through the node's first record in the segment: what hangs on a block was never used later
    than the block itself, so all of it is as cold. Copies in faster tiers stay. Empty when the block is not cold, or
    when a lease, or a copy elsewhere that hangs on what lies on SSD alone, forbids it.
    """
    with index.lock:
        inside = index.inside(node, SSD, segment)
        if not inside or node.used_at(inside[0]) > cutoff:
            return []
        leaf = node
        while (child := _child_on_ssd(leaf)) is not None:
            leaf = child
        first = inside[0] if leaf is node else 0
        return _remove_from_end(index, leaf, lambda at, place: at >= first)


def living(index: PrefixIndex, node: Node, segment: int) -> list[Living] | None:
    """The first 32 of the node's records that lie in the segment; None when one of them is leased."""
    with index.lock:
        inside = index.inside(node, SSD, segment)[:BATCH_BLOCKS]
        if inside and node.start + inside[0] < node.leased_to():
            return None
        places = node.places[SSD] or ()
        return [Living(node, places[at], BlockKey(node.keys[at * KEY_BYTES : (at + 1) * KEY_BYTES])) for at in inside]


def remove_corrupt(index: PrefixIndex, node: Node, place: int) -> list[Gone]:
    """Remove the record at `place`, which turned out to be bad, if the node still has it there."""
    gone: list[Gone] = []
    with index.lock:
        places = node.places[SSD]
        if places is not None and place in places:
            at = places.index(place)
            index._remove(node, at, at + 1, SSD, Loss.CORRUPT, gone)
    return gone


def remove_below(index: PrefixIndex, node: Node, segment: int) -> list[Gone]:
    """Remove up to 32 unleased blocks of the subtree that begins with the node's first block in the segment.

    The deepest go first. Empty when all that is left of it is leased, or nothing is left.
    """
    with index.lock:
        inside = index.inside(node, SSD, segment)
        if not inside:
            return []
        leaf = node
        while leaf.children:
            leaf = next(iter(leaf.children.values()))
        first = inside[0] if leaf is node else 0
        held, leased = leaf.held_to(), leaf.leased_to() - leaf.start
        gone: list[Gone] = []
        if held > max(leased, first) and not _guards(leaf):
            last = max(leased, first, held - BATCH_BLOCKS)
            if leaf.tree.account.quotas[SSD].guaranteed:
                last = held - 1  # one at a time, so that no more goes than is above the guarantee
            index._remove_blocks(leaf, last, Loss.SEGMENT_FREED, gone)
        return gone


def _child_on_ssd(node: Node) -> Node | None:
    """A child with records on SSD: what is there has its parent there, so one look at each child tells."""
    return next((child for child in node.children.values() if child.places[SSD]), None)


def _guards(node: Node) -> bool:
    """Whether removing the edge's blocks would take from its model what is guaranteed to it, at any level."""
    account = node.tree.account
    return any(node.places[level] and 0 < account.bytes[level] <= account.quotas[level].guaranteed for level in LEVELS)


def is_guaranteed(node: Node) -> bool:
    """Whether all that the node's model holds on SSD is guaranteed to it."""
    account = node.tree.account
    return 0 < account.bytes[SSD] <= account.quotas[SSD].guaranteed


def _remove_from_end(
    index: PrefixIndex,
    node: Node,
    wanted: Callable[[int, int], bool],
    *,
    most: int = BATCH_BLOCKS,
    loss: Loss = Loss.SEGMENT_FREED,
) -> list[Gone]:
    """Remove up to `most` wanted records (index in the edge, place), last first, that can go: see the module."""
    gone: list[Gone] = []
    while len(gone) < most and (places := node.places[SSD]) is not None:
        last = len(places) - 1
        if node.start + last < node.leased_to() or not wanted(last, places[last]):
            break
        if is_guaranteed(node) and loss is not Loss.OVER_QUOTA:
            break
        is_last_copy = not any(node.place(last, level) != NOWHERE for level in LEVELS[:SSD])
        if is_last_copy and (node.children or last + 1 < node.held_to()):
            break
        index._remove(node, last, last + 1, SSD, loss, gone)
    return gone

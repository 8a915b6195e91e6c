"""Moves a block to another place of its tier: the index's half of making room in memory.

The block is leased while its bytes are copied, so that it is neither evicted nor its place given to another one; it
moves only if nobody else has leased it by the end of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.node import NOWHERE, Node


class Held(NamedTuple):
    """A block that is about to move."""

    pin: Pin
    level: int
    place: int


def hold(index: PrefixIndex, level: int, place: int, near: Node | None = None) -> Held | None:
    """Lease the block that lies at `place`; None when no block does, or when it is leased already.

    `near`: it lies there in this edge, or in what splits have made of it.
    """
    with index.lock:
        if near is None:
            nodes: Iterable[Node] = index.residents[level].get(index.region_of[level](place), ())
        else:
            nodes = _upwards(near)
        for node in nodes:
            at = _index_of(node, level, place)
            if at != NOWHERE:
                if node.start + at < node.leased_to():
                    return None
                pin = Pin(node.tree, node, node.start + at + 1)
                index._count_lease(node, pin.depth)
                return Held(pin, level, place)
    return None


def settle(index: PrefixIndex, held: Held, place: int, *, charged: int = 0) -> bool:
    """End the lease and point the block to `place`; False, and it stays, where somebody else has leased it.

    `charged` are the bytes that `place` was charged with before; they are not any more, whatever comes of it.
    """
    with index.lock:
        index.ledger.discharge(held.pin.tree.account, held.level, charged)
        node = index._settled(held.pin)
        at = held.pin.depth - 1 - node.start
        index._let_go(node, held.pin.depth)
        if node.place(at, held.level) != held.place or node.start + at < node.leased_to():
            return False
        index._repoint(node, held.level, at, place)
        return True


def release(index: PrefixIndex, held: Held) -> None:
    """End the lease; the block stays where it is."""
    index.unpin(held.pin)


def _upwards(node: Node) -> Iterator[Node]:
    at: Node | None = node
    while at is not None:
        yield at
        at = at.parent


def _index_of(node: Node, level: int, place: int) -> int:
    places = node.places[level]
    return places.index(place) if places is not None and place in places else NOWHERE

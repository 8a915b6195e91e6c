"""Moves blocks between device memory and RAM: the index's half of demotion and promotion.

Blocks are leased while their bytes are copied, so that they are neither evicted nor moved. The copy that they leave
behind goes only where nobody else has leased it by the end of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvpool.prefix.accounts import Account
from kvpool.prefix.history import Loss
from kvpool.prefix.index import BATCH_BLOCKS, Gone, Pin, PrefixIndex
from kvpool.prefix.node import GPU, NOWHERE, RAM, SSD, Node
from kvpool.prefix.relocating import hold


class Span(NamedTuple):
    """Blocks side by side in one edge, leased until one of the functions below takes it back."""

    pin: Pin
    first: int
    """Depth of the first block; the last is the pin's."""
    places: list[int]
    """Where they lie now."""
    is_below: list[bool]
    """Which of them have a copy in RAM too."""
    last_use: int


def coldest(
    index: PrefixIndex,
    wanted_bytes: int,
    *,
    requester: Account | None = None,
    own: Account | None = None,
    older_than: int | None = None,
) -> Span | None:
    """Lease the blocks that should leave device memory next, about `wanted_bytes` and at most 32; None where none may.

    Nobody's guaranteed bytes are touched, but the `requester`'s. `own`: only blocks of this one. `older_than`: only
    what was used before that, on the index's clock of ages.
    """
    with index.lock:
        node = own.candidates[GPU].take() if own is not None else index._take_victim(GPU, requester)
        if node is None:
            return None
        account = node.tree.account
        if own is None and account is not requester and account.quotas[GPU].guaranteed:
            wanted_bytes = min(wanted_bytes, account.excess(GPU))
        span = _tail_span(index, node, wanted_bytes, older_than)
        account.candidates[GPU].offer(node)
        return span


def held_at(index: PrefixIndex, place: int) -> Span | None:
    """Lease the block that lies at this place of device memory; None when none does, or it is leased already."""
    held = hold(index, GPU, place)
    if held is None:
        return None
    with index.lock:
        node = index._settled(held.pin)
        at = held.pin.depth - 1 - node.start
        return Span(held.pin, held.pin.depth - 1, [place], [node.place(at, RAM) != NOWHERE], node.used_at(at))


def next_below(index: PrefixIndex, node: Node, first: int, depth: int, most: int) -> Span | None:
    """Lease the next blocks of the prefix that ends in `node` that are in RAM and not in device memory.

    From depth `first` on and before `depth`, at most `most` and 32.
    """
    with index.lock:
        if node.tree.erased:
            return None
        for part in _path(node):
            for at in range(max(first, part.start) - part.start, min(depth, part.end) - part.start):
                if part.place(at, RAM) != NOWHERE and part.place(at, GPU) == NOWHERE:
                    until = min(depth - part.start, part.blocks, at + min(most, BATCH_BLOCKS))
                    return _span(index, part, at, _end_of_run(part, at, until), RAM)
    return None


def leave_device(index: PrefixIndex, span: Span) -> list[Gone]:
    """End the lease; the copies in device memory that have another copy by now go, from the last on.

    They stay where somebody has leased them meanwhile, or something deeper has come.
    """
    with index.lock:
        node = _let_go(index, span)
        gone: list[Gone] = []
        last = node.tail(GPU)
        if last != NOWHERE and node.start + last == span.pin.depth - 1 and not node.tree.erased:
            lowest = max(span.first - node.start, node.leased_to() - node.start, 0)
            first = last + 1
            while first > lowest and node.place(first - 1, GPU) != NOWHERE and _is_below(node, first - 1):
                first -= 1
            if first <= last:
                index._remove(node, first, last + 1, GPU, Loss.EVICTED, gone)
                node.tree.account.candidates[GPU].offer(node)
        return gone


def give_up_place(index: PrefixIndex, span: Span) -> list[Gone]:
    """End the lease of a `held_at`; its copy in device memory goes, whether or not there is another."""
    with index.lock:
        node = _let_go(index, span)
        at = span.first - node.start
        gone: list[Gone] = []
        if at >= 0 and node.start + at >= node.leased_to() and node.place(at, GPU) == span.places[0]:
            index._remove(node, at, at + 1, GPU, Loss.EVICTED, gone)
        return gone


def leave_ram(index: PrefixIndex, span: Span) -> list[Gone]:
    """End the lease; copies in RAM of these blocks go that lie in device memory too and are not encoded.

    Else they would be held in RAM for as long as something deeper is in device memory. An encoded copy stays: what was
    made of it for the device must not be encoded again.
    """
    with index.lock:
        parts = index.path(span.pin)
        _let_go(index, span)
        gone: list[Gone] = []
        for node in reversed(parts):
            bytes_of = index._record_bytes_of(node.tree, RAM)
            first, end = max(span.first, node.start, node.leased_to()), min(node.end, span.pin.depth)
            for at in range(end - node.start - 1, first - node.start - 1, -1):
                place = node.place(at, RAM)
                if place != NOWHERE and node.place(at, GPU) != NOWHERE and bytes_of(place) == node.tree.record_bytes:
                    index._remove(node, at, at + 1, RAM, Loss.EVICTED, gone)
        return gone


def forget_regions(index: PrefixIndex, is_lost: Callable[[int], bool]) -> list[Gone]:
    """Forget up to 32 copies in regions of device memory that are lost, leased or not; none when there are no more.

    What lies below a block that was nowhere else stays, and can be matched again once that block is stored again.
    """
    with index.lock:
        gone: list[Gone] = []
        for region in [region for region in index.residents[GPU] if is_lost(region)]:
            for node in list(index.residents[GPU].get(region, ())):
                for at in reversed(index.inside(node, GPU, region)):
                    index._remove(node, at, at + 1, GPU, Loss.TIER_OUT, gone)
                    if len(gone) >= BATCH_BLOCKS:
                        return gone
        return gone


def _tail_span(index: PrefixIndex, node: Node, wanted_bytes: int, older_than: int | None) -> Span | None:
    last = node.tail(GPU)
    if last == NOWHERE or (older_than is not None and node.used_at(last) >= older_than):
        return None
    most = max(1, min(BATCH_BLOCKS, -(-wanted_bytes // node.tree.record_bytes)))
    first = max(last + 1 - most, node.same_age_from(last), node.leased_to() - node.start)
    begin = last
    while begin > first and node.place(begin - 1, GPU) != NOWHERE:
        begin -= 1
    return _span(index, node, begin, last + 1, GPU)


def _span(index: PrefixIndex, node: Node, first: int, until: int, level: int) -> Span:
    last_use = node.used_at(until - 1)
    pin = Pin(node.tree, node, node.start + until)
    index._count_lease(node, pin.depth)
    places = [node.place(at, level) for at in range(first, until)]
    is_below = [node.place(at, RAM) != NOWHERE for at in range(first, until)]
    return Span(pin, node.start + first, places, is_below, last_use)


def _let_go(index: PrefixIndex, span: Span) -> Node:
    node = index._settled(span.pin)
    index._let_go(node, span.pin.depth)
    return node


def _is_below(node: Node, at: int) -> bool:
    return node.place(at, RAM) != NOWHERE or node.place(at, SSD) != NOWHERE


def _end_of_run(node: Node, first: int, until: int) -> int:
    at = first
    while at < until and node.place(at, RAM) != NOWHERE and node.place(at, GPU) == NOWHERE:
        at += 1
    return at


def _path(node: Node) -> list[Node]:
    nodes: list[Node] = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        nodes.append(at)
        at = at.parent
    return nodes[::-1]

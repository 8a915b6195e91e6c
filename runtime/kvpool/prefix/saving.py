"""Which blocks are to be written to SSD next: the index's half of write-behind.

A node says with `save_to` up to which depth it is wanted on SSD. `begin` picks the next run of blocks for a node,
parents before children: where an ancestor is not wholly on SSD, that one comes first. The run is leased and its node
marked busy until `finish`, so that it is neither evicted nor written twice. What can no longer be saved, because a
block before it has left memory, is not wanted any more, and neither is what lies below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.record import Head
from kvpool.prefix.heads import edge_heads
from kvpool.prefix.index import BATCH_BLOCKS, Pin, PrefixIndex
from kvpool.prefix.node import GPU, NOWHERE, RAM, SSD, Node
from kvpool.prefix.tree import PrefixTree


class Idle(Enum):
    """Why a node has nothing to write now."""

    DONE = auto()
    """Nothing of it is wanted, or can be had, any more."""
    BUSY = auto()
    """Another writer is at it, or at one of its ancestors: ask again when that one has finished."""


class Run(NamedTuple):
    """Blocks side by side in one edge, in RAM or in device memory, and not yet on SSD. Leased until `finish`."""

    wanted: Node
    """The queued node that this is for, to go on with."""
    pin: Pin
    node: Node
    """The edge in which they lie: the wanted node's own, or an ancestor's."""
    first: int
    """Depth of the first block."""
    places: list[int]
    """Where they lie at `level`."""
    heads: list[Head]
    level: int
    """RAM; GPU where they are not in RAM."""


def want(index: PrefixIndex, pin: Pin, depth: int) -> Node | None:
    """Ask for the pinned blocks before `depth` on SSD. Returns the node to queue; None when it needs no queueing."""
    with index.lock:
        if pin.tree.erased:
            return None
        node = index._settled(pin)
        while node.start >= depth and node.parent is not None:
            node = node.parent
        if node.parent is None:
            return None
        node.save_to = max(node.save_to, depth)
        if node.queued or (_saved(node) >= depth - node.start and _topmost_unsaved(node) is node):
            return None
        node.queued = True
        return node


def is_between_saved(index: PrefixIndex, pin: Pin, first: int) -> bool:
    """Whether pinned blocks from `first` on are missing on SSD before others that are there: a gap to be closed."""
    with index.lock:
        for node in reversed(index.path(pin)):
            if node.end <= first:
                break
            places, saved = node.places[SSD], _saved(node)
            if places is not None and saved < len(places):
                return True
            if saved < node.blocks and any(child.places[SSD] for child in node.children.values()):
                return True
    return False


def want_everything(index: PrefixIndex, tree: PrefixTree) -> list[Node]:
    """Ask for all that the tree has in memory; the nodes to queue, parents before children."""
    with index.lock:
        found: list[Node] = []
        for node in tree.nodes():
            held = max(len(node.places[RAM] or ()), len(node.places[GPU] or ()))
            if held > _saved(node):
                node.save_to = max(node.save_to, node.start + held)
                if not node.queued:
                    node.queued = True
                    found.append(node)
        return found


def forget(index: PrefixIndex, node: Node) -> int:
    """Take a node out of the queue unwritten; how many wanted blocks that gives up."""
    with index.lock:
        return _give_up(node)


def begin(
    index: PrefixIndex, node: Node, *, payload_bytes_of: Callable[[Fingerprint], int | None], most_bytes: int
) -> Run | Idle:
    """Pick and lease the next blocks to write for a queued node: at most 32, and about `most_bytes`."""
    with index.lock:
        node = _standing(node)
        tree = node.tree
        payload_bytes = payload_bytes_of(tree.id.fingerprint)
        if tree.erased or not node.blocks or payload_bytes is None:
            _give_up(node)
            return Idle.DONE
        target = _topmost_unsaved(node)
        if target.busy is not None:
            return Idle.BUSY
        first = _saved(target)
        until = target.blocks if target is not node else node.save_to - node.start
        most = min(BATCH_BLOCKS, max(1, most_bytes // tree.record_bytes), until - first)
        level = RAM if target.place(first, RAM) != NOWHERE else GPU
        places = target.run_at(level, first, most)
        if not places:
            _give_up(node)
            return Idle.DONE
        pin = Pin(tree, target, target.start + first + len(places))
        index._count_lease(target, pin.depth)
        target.busy = pin
        heads = edge_heads(target, first, first + len(places), payload_bytes=payload_bytes)
        return Run(node, pin, target, target.start + first, places, heads, level)


def finish(index: PrefixIndex, run: Run, written: Sequence[int | None], *, charged: int = 0) -> list[int]:
    """Enter what was written (None where nothing was); the places that are not needed after all.

    `charged` as in `PrefixIndex.attach`.
    """
    places = [NOWHERE if place is None else place for place in written]
    refused = index.fill(run.pin, run.first, SSD, places, charged=charged)
    with index.lock:
        part: Node | None = run.node
        while part is not None:  # splits may have made several parts of it
            if part.busy is run.pin:
                part.busy = None
            part = part.parent
    return refused


def end(index: PrefixIndex, run: Run) -> None:
    """Give the run's lease up, after `finish`."""
    index.unpin(run.pin)


def _standing(node: Node) -> Node:
    """The node, or what a split has left of it above, if its own blocks have left the tree; queued in its place."""
    while not node.blocks and node.parent is not None and node.parent.parent is not None:
        node.queued = False
        node = node.parent
        node.queued = True
    return node


def _topmost_unsaved(node: Node) -> Node:
    target, above = node, node.parent
    while above is not None and above.parent is not None:
        if _saved(above) < above.blocks:
            target = above
        above = above.parent
    return target


def _saved(node: Node) -> int:
    """How many leading blocks of the edge lie on SSD."""
    places = node.places[SSD]
    if places is None:
        return 0
    return places.index(NOWHERE) if NOWHERE in places else len(places)


def _give_up(node: Node) -> int:
    saved = node.start + _saved(node)
    lost = max(0, node.save_to - saved)
    node.save_to = min(node.save_to, saved)
    node.queued = False
    return lost

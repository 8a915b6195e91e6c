"""The prefix index: every tree, who reads them, what may go, and how many bytes all that takes.

It is authoritative for the local tiers (gpu, ram, ssd) and holds no payload: a place is an integer that its tier
understands. One short lock guards everything; no call holds it for more than 32 blocks' work, `check_integrity` and
`restore` excepted. A place that leaves the index is returned to the caller, who gives it back to the tier; between the two
nobody else can find it.

A `Pin` is the index's half of a lease: it keeps the blocks before `depth` from being evicted, moved or changed.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey
from kvpool.prefix.candidates import EvictionPolicy
from kvpool.prefix.history import Fate, History, Loss
from kvpool.prefix.node import GPU, LEVELS, NO_CHILDREN, NOWHERE, RAM, SSD, Node
from kvpool.prefix.tree import Extras, PrefixTree, TreeId, child_key, common_blocks, count_solid, run_end, stripped

LEVEL_NAMES = ("gpu", "ram", "ssd")
BATCH_BLOCKS = 32
"""The most blocks that are worked on under one hold of the lock."""
NODE_BYTES = 720
"""What a node takes beside its blocks: object, lists, arrays' heads, entry in its parent (measured, see the tests)."""
BLOCK_OVERHEAD_BYTES = 40
"""What a block takes beside its token ids: its key, and a place in two tiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingRules:
    """Which prefixes count as shared, and how far they are protected from the policy."""

    auto_detect: bool = True
    protect: bool = True
    min_prefix_tokens: int = 64
    max_shared_bytes: int = 8 << 30


class Pin:
    """The right to read the blocks before `depth`. Made and ended by the index only."""

    __slots__ = ("depth", "node", "tree")

    def __init__(self, tree: PrefixTree, node: Node, depth: int) -> None:
        self.tree = tree
        self.node = node
        self.depth = depth


class Gone(NamedTuple):
    """A copy that left the index: the caller gives `place` back to the tier at `level`."""

    level: int
    place: int
    record_bytes: int
    last: bool
    """Whether it was the block's last copy."""


class PrefixIndex:
    """All prefix trees of a pool."""

    def __init__(
        self,
        *,
        limit_bytes: int,
        make_policy: Callable[[], EvictionPolicy],
        sharing: SharingRules | None = None,
        history: History | None = None,
        segment_of: Callable[[int], int] = lambda place: place,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lock = threading.Lock()
        self.trees: dict[TreeId, PrefixTree] = {}
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.blocks = 0
        self.sharing = sharing or SharingRules()
        self.history = history or History(16_384)
        self.copies = [0, 0, 0]
        """Per level: how many blocks have a copy there."""
        self.copy_bytes = [0, 0, 0]
        self.shared_bytes = [0, 0, 0]
        self.on_ssd: dict[int, set[Node]] = {}
        """Segment -> the nodes some of whose blocks may lie in it."""
        self.erased: list[list[Node]] = []
        """Per tree that nobody can match any more: the nodes that are left, parents before children."""
        self._clock = clock
        self._segment_of = segment_of
        self._uses = 0
        self._policies = [make_policy() for _ in LEVELS]
        self._protected = [make_policy() for _ in LEVELS]
        self._parked: list[list[Node]] = [[], [], []]
        """Candidates that were leased when they were taken; offered again when leases have been closed."""
        self._closes = 0
        self._closes_when_parked = [0, 0, 0]

    # -- trees ---------------------------------------------------------------------------------------------------------

    def tree(self, tree_id: TreeId) -> PrefixTree | None:
        """Return the tree of this identity, if any block of it is known."""
        return self.trees.get(tree_id)

    def add_tree(self, tree: PrefixTree) -> PrefixTree:
        """Enter an empty tree, or return the one that another thread has entered meanwhile."""
        with self.lock:
            return self.trees.setdefault(tree.id, tree)

    def erase(self, tree: PrefixTree) -> None:
        """From now on nothing of this tree is found or entered. `bury` gives its copies back."""
        with self.lock:
            if not tree.gone:
                tree.gone = True
                self.trees.pop(tree.id, None)
                self.erased.append(list(tree.nodes()))

    def bury(self) -> list[Gone]:
        """Give back up to 32 blocks' copies of erased trees; none when only leased ones are left."""
        with self.lock:
            gone: list[Gone] = []
            for nodes in self.erased:
                leased = []
                while nodes and len(gone) < BATCH_BLOCKS:
                    if nodes[-1].leased_to() > nodes[-1].start:
                        leased.append(nodes.pop())
                    elif not self._bury_last_block(nodes[-1], gone):
                        nodes.pop()
                nodes.extend(reversed(leased))
            self.erased = [nodes for nodes in self.erased if nodes]
            return gone

    # -- leases --------------------------------------------------------------------------------------------------------

    def match(
        self, tree: PrefixTree, tokens: bytes, extras: Extras | None = None, most_blocks: int | None = None
    ) -> Pin:
        """Pin the longest prefix of `tokens` all of whose blocks have a copy; at most `most_blocks` of them."""
        with self.lock:
            node, depth = tree.find(tokens) if not extras else tree.find_with_extras(tokens, extras)
            if tree.gone:
                node, depth = tree.root, 0
            if most_blocks is not None and depth > most_blocks:
                depth = most_blocks
                while node.start >= depth and node.parent is not None:
                    node = node.parent
            self._hold(node, depth)
            return Pin(tree, node, depth)

    def unpin(self, pin: Pin) -> None:
        """End a pin. Not to be called twice."""
        with self.lock:
            self._let_go(pin.node, pin.depth)

    def shorten(self, pin: Pin, depth: int) -> None:
        """Let go of the blocks from `depth` on."""
        with self.lock:
            node = self._settled(pin)
            target = node
            while target.start >= depth and target.parent is not None:
                target = target.parent
            self._hold(target, depth)
            self._let_go(node, pin.depth)
            pin.node, pin.depth = target, depth

    def advance(self, pin: Pin, tokens: bytes, extras: Extras | None = None) -> int:
        """Lengthen the pin over blocks of `tokens` that have copies; return how many it gained."""
        with self.lock:
            tree = pin.tree
            if tree.gone:
                return 0
            node, depth = tree.find(tokens) if not extras else tree.find_with_extras(tokens, extras)
            gained = depth - pin.depth
            if gained <= 0:
                return 0
            self._move(pin, node, depth)
            return gained

    def places(self, pin: Pin, level: int) -> list[int]:
        """Where each pinned block lies at `level`, in order; -1 for nowhere."""
        with self.lock:
            found: list[list[int]] = []
            node: Node | None = self._settled(pin)
            until = pin.depth
            while node is not None and node.parent is not None:
                places = node.places[level]
                known = list(places[: until - node.start]) if places is not None else []
                found.append(known + [NOWHERE] * (until - node.start - len(known)))
                until = node.start
                node = node.parent
            return [place for places in reversed(found) for place in places]

    def path(self, pin: Pin) -> list[Node]:
        """The nodes of the pinned prefix, from the first on. Call with the lock held."""
        nodes = []
        node = self._settled(pin)
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    # -- copies --------------------------------------------------------------------------------------------------------

    def attach(
        self, pin: Pin, tokens: bytes, level: int, places: Sequence[int], extras: Extras | None = None
    ) -> list[int]:
        """Enter copies of the blocks of `tokens` that follow the pin, and lengthen the pin over them.

        Returns the places that were not taken, for the caller to give back: those of blocks that have a copy at `level`
        already, or all when the tree was erased meanwhile. At most 32 blocks a call.
        """
        with self.lock:
            if pin.tree.gone:
                return list(places)
            size, first = pin.tree.token_bytes, pin.depth
            run = tokens[first * size : (first + len(places)) * size]
            node, refused = self._enter(self._settled(pin), first, run, level, places, extras)
            self._move(pin, node, first + len(places))
            return refused

    def fill(self, pin: Pin, first: int, level: int, places: Sequence[int]) -> list[int]:
        """Enter further copies of pinned blocks, from block `first` on; -1 skips one. Returns those not taken."""
        with self.lock:
            if pin.tree.gone:
                return [place for place in places if place != NOWHERE]
            refused: list[int] = []
            for node in self.path(pin):
                for depth in range(max(first, node.start), min(first + len(places), node.end)):
                    place = places[depth - first]
                    if place != NOWHERE:
                        refused += self._set_copies(node, depth - node.start, level, [place])
            return refused

    def lose(self, pin: Pin, depth: int, level: int, place: int, reason: Loss) -> list[Gone]:
        """Drop one copy that turned out to be bad, of pinned block `depth`, if it still lies at `place`."""
        with self.lock:
            for node in self.path(pin):
                if node.start <= depth < node.end and node.place(depth - node.start, level) == place:
                    return [self._remove_copy(node, depth - node.start, level, reason)]
            return []

    def evict(self, level: int, wanted_bytes: int, *, loss: Loss = Loss.EVICTED) -> list[Gone]:
        """Take blocks out of `level`, the policy's choice first, until `wanted_bytes` are free or 32 blocks have gone.

        Fewer when nothing else may go. A block whose last copy goes takes along what lies below it.
        """
        with self.lock:
            gone: list[Gone] = []
            freed = 0
            while freed < wanted_bytes and len(gone) < BATCH_BLOCKS:
                node = self._take_candidate(level)
                if node is None:
                    break
                freed += self._evict_tail(node, level, wanted_bytes - freed, loss, gone)
                self._offer(node, level)
            return gone

    def vacate(self, node: Node, segment: int, *, keep_leased: bool = True) -> tuple[list[Gone], bool]:
        """Remove a node's copies that lie in an SSD segment, last block first; False when a lease forbade some."""
        with self.lock:
            gone: list[Gone] = []
            for index in reversed(range(len(node.places[SSD] or ()))):
                if self._segment_of(node.place(index, SSD)) != segment or node.place(index, SSD) == NOWHERE:
                    continue
                if keep_leased and node.start + index < node.leased_to():
                    return gone, False
                gone.append(self._remove_copy(node, index, SSD, Loss.SEGMENT_FREED))
                if len(gone) >= BATCH_BLOCKS:
                    break
            return gone, True

    def move_on_ssd(self, node: Node, old: int, new: int) -> bool:
        """Point the block that lies at `old` to `new`; False when nothing in this node lies there any more."""
        with self.lock:
            for at in (node, *self._ancestors(node)):
                places = at.places[SSD]
                if places is not None and old in places:
                    places[places.index(old)] = new
                    self.on_ssd.setdefault(self._segment_of(new), set()).add(at)
                    return True
            return False

    def mark_shared(self, pin: Pin) -> None:
        """Declare the pinned prefix shared, whether or not requests have diverged after it."""
        with self.lock:
            self._mark_shared(self._settled(pin))

    @property
    def over_limit(self) -> bool:
        """Whether the index itself takes more than it may."""
        return self.bytes > self.limit_bytes

    # -- inside, with the lock held ------------------------------------------------------------------------------------

    def _hold(self, node: Node, depth: int) -> None:
        self._uses = now = self._uses + 1
        ends = node.ends
        if ends is None:
            node.ends = {depth: 1}
        else:
            ends[depth] = ends.get(depth, 0) + 1
        if depth == node.end:
            node.last_use = now
        else:
            node.head_use = now
            if depth > node.head_end:
                node.head_end = depth
        above = node.parent
        while above is not None:
            above.refs += 1
            above.last_use = now
            above = above.parent

    def _let_go(self, node: Node, depth: int) -> None:
        while node.start >= depth and node.parent is not None:
            node = node.parent
        ends = node.ends
        assert ends is not None
        if ends[depth] == 1:
            del ends[depth]
            if not ends:
                node.ends = None
        else:
            ends[depth] -= 1
        above = node.parent
        while above is not None:
            above.refs -= 1
            above = above.parent
        self._closes += 1
        if not node.whole or node.parent is None:
            self._prune(node)

    def _settled(self, pin: Pin) -> Node:
        """The node in which the pin ends now: a split may have moved it up."""
        node = pin.node
        while node.start >= pin.depth and node.parent is not None:
            node = node.parent
        pin.node = node
        return node

    def _move(self, pin: Pin, node: Node, depth: int) -> None:
        self._hold(node, depth)
        self._let_go(self._settled(pin), pin.depth)
        pin.node, pin.depth = node, depth

    def _enter(
        self, node: Node, depth: int, run: bytes, level: int, places: Sequence[int], extras: Extras | None
    ) -> tuple[Node, list[int]]:
        """Walk from `depth` in `node` along `run`, making what is missing, and set the copies on the way."""
        tree, size = node.tree, node.tree.token_bytes
        refused: list[int] = []
        first, until = depth, depth + len(places)
        while depth < until:
            at = (depth - first) * size
            stop = run_end(depth, until, extras)
            if depth < node.end:
                limit = min(node.end, stop) - depth
                inside = depth > node.start
                blocked = inside and extras is not None and depth in extras
                common = 0 if blocked else common_blocks(node.tokens, (depth - node.start) * size, run, at, limit, size)
                if not common:
                    node = self._split(node, depth - node.start)
                    continue
                refused += self._set_copies(
                    node, depth - node.start, level, places[depth - first : depth - first + common]
                )
                depth += common
                continue
            key = child_key(
                run, depth - first, size, {depth - first: extras[depth]} if extras and depth in extras else {}
            )
            child = node.children.get(key)
            if child is None:
                extra = extras.get(depth, b"") if extras else b""
                child = self._grow(node, run[at : (stop - first) * size], extra)
            node = child
        return node, refused

    def _grow(self, node: Node, run: bytes, extra: bytes) -> Node:
        """Make room for the blocks of `run` after `node`: in its own edge if it is a leaf, else in a new child."""
        blocks = len(run) // node.tree.token_bytes
        self.blocks += blocks
        if node.parent is not None and node.children is NO_CHILDREN and not extra:
            self.bytes += self._cost(node, node.blocks + blocks) - self._cost(node, node.blocks)
            node.tokens += run
            node.end += blocks
            node.whole = False
            return node
        diverges = bool(node.children) and node.parent is not None
        child = node.tree.add_child(node, run, extra)
        child.last_use = self._uses
        self.bytes += self._cost(child, blocks)
        if diverges and self.sharing.auto_detect:
            self._mark_shared(node)
        return child

    def _split(self, node: Node, at: int) -> Node:
        blocks = node.blocks
        upper = node.tree.split(node, at)
        self.bytes += self._cost(upper, at) + self._cost(node, blocks - at) - self._cost(node, blocks)
        for place in upper.places[SSD] or ():
            if place != NOWHERE:
                self.on_ssd.setdefault(self._segment_of(place), set()).add(upper)
        for level in (GPU, RAM):
            self._offer(upper, level)
        self._prune(node)
        return upper

    def _set_copies(self, node: Node, index: int, level: int, places: Sequence[int]) -> list[int]:
        held = [node.holds(at) for at in LEVELS]
        known = node.places[level]
        if known is None:
            known = node.places[level] = array("q")
        refused: list[int] = []
        for place in places:
            if index < len(known):
                if known[index] != NOWHERE:
                    refused.append(place)
                    index += 1
                    continue
                known[index] = place
            else:
                known.extend([NOWHERE] * (index - len(known)))
                known.append(place)
            index += 1
            self._count(node, level, 1)
            if level == SSD:
                self.on_ssd.setdefault(self._segment_of(place), set()).add(node)
        if not node.whole:
            node.solid = count_solid(node, node.solid)
            node.whole = node.solid == node.blocks
        self._propagate(node, held)
        self._offer(node, level)
        return refused

    def _remove_copy(self, node: Node, index: int, level: int, loss: Loss) -> Gone:
        held = [node.holds(at) for at in LEVELS]
        places = node.places[level]
        assert places is not None
        place = places[index]
        places[index] = NOWHERE
        node.places[level] = stripped(places)
        self._count(node, level, -1)
        last = not node.has_copy(index)
        if last:
            self._note_loss(node, index, level, loss)
            node.solid = min(node.solid, index)
            node.whole = False
        self._propagate(node, held)
        for slower in range(level + 1, len(LEVELS)):
            self._offer(node, slower)
        if last:
            self._prune(node)
        return Gone(level, place, node.tree.record_bytes, last)

    def _remove_block(self, node: Node, index: int, loss: Loss) -> list[Gone]:
        """Remove every copy of one block, without looking at leases."""
        gone = []
        for level in LEVELS:
            if node.place(index, level) != NOWHERE:
                gone.append(self._remove_copy(node, index, level, loss))
        return gone

    def _bury_last_block(self, node: Node, gone: list[Gone]) -> bool:
        last = node.blocks - 1
        if last < 0:
            return False
        gone += self._remove_block(node, last, Loss.EVICTED)
        if node.blocks == last + 1:
            self._cut(node, last)
        return True

    def _evict_tail(self, node: Node, level: int, wanted_bytes: int, loss: Loss, gone: list[Gone]) -> int:
        """Evict blocks from the end of one edge while they are of one age; return the bytes freed at `level`."""
        freed = 0
        record_bytes = node.tree.record_bytes
        while freed < wanted_bytes and len(gone) < BATCH_BLOCKS and (index := node.tail(level)) != NOWHERE:
            if node.head_end and node.start + index < node.head_end:
                node.last_use, node.head_use, node.head_end = node.head_use, 0, 0
                break
            only_copy = all(node.place(index, at) == NOWHERE for at in LEVELS if at != level)
            if only_copy:
                self._drop_below(node, index, gone)
            gone.append(self._remove_copy(node, index, level, loss))
            freed += record_bytes
        return freed

    def _drop_below(self, node: Node, index: int, gone: list[Gone]) -> None:
        """Remove every copy that lies deeper than block `index`: without it nothing there can be reached."""
        below = [node]
        for at in below:
            below.extend(at.children.values())
        for at in reversed(below):
            first = index + 1 if at is node else 0
            for block in reversed(range(first, at.blocks)):
                gone += self._remove_block(at, block, Loss.ORPHANED)

    def _propagate(self, node: Node, held: list[bool]) -> None:
        """Carry upwards, per level, that `node` has begun or ceased to hold copies there or faster."""
        for level in LEVELS:
            if (now := node.holds(level)) != held[level]:
                self._propagate_level(node, level, 1 if now else -1)

    def _propagate_level(self, node: Node, level: int, change: int) -> None:
        parent = node.parent
        while parent is not None:
            held = parent.holds(level)
            assert isinstance(parent.below, list)
            parent.below[level] += change
            if not parent.below[level]:
                self._offer(parent, level)
            if parent.holds(level) == held:
                return
            parent = parent.parent

    def _offer(self, node: Node, level: int) -> None:
        """Let the policy have the node if its last block at `level` is a leaf there."""
        bit = 1 << level
        if level != SSD and not node.offered & bit and node.places[level] and not node.below[level] and node.parent:
            node.offered |= bit
            self._policies[level].offer(node)

    def _take_candidate(self, level: int) -> Node | None:
        bit = 1 << level
        self._offer_parked(level)
        protected = self._protects(level)
        if not protected and (unprotected := self._protected[level].take()):
            self._policies[level].offer(unprotected)
        while True:
            taken = self._policies[level].take()
            from_protected = taken is None
            if taken is None and (taken := self._protected[level].take()) is None:
                return None
            node = taken
            assert isinstance(node, Node)
            last = len(node.places[level] or ()) - 1
            if node.parent is not None and last >= 0 and not node.below[level] and node.start + last < node.leased_to():
                self._parked[level].append(node)
            elif node.parent is None or node.tail(level) == NOWHERE:
                node.offered &= ~bit
            elif protected and not from_protected and self._is_protected(node):
                self._protected[level].offer(node)
            else:
                node.offered &= ~bit
                return node

    def _offer_parked(self, level: int) -> None:
        if self._parked[level] and self._closes != self._closes_when_parked[level]:
            parked, self._parked[level] = self._parked[level], []
            for node in parked:
                self._policies[level].offer(node)
        self._closes_when_parked[level] = self._closes

    def _protects(self, level: int) -> bool:
        return self.sharing.protect and self.shared_bytes[level] <= self.sharing.max_shared_bytes

    def _is_protected(self, node: Node) -> bool:
        block_tokens = node.tree.token_bytes // 4
        return node.shared and node.end * block_tokens >= self.sharing.min_prefix_tokens

    def _mark_shared(self, node: Node) -> None:
        while node.parent is not None and not node.shared:
            node.shared = True
            for level in LEVELS:
                held = sum(place != NOWHERE for place in node.places[level] or ())
                self.shared_bytes[level] += held * node.tree.record_bytes
            node = node.parent

    def _count(self, node: Node, level: int, change: int) -> None:
        self.copies[level] += change
        self.copy_bytes[level] += change * node.tree.record_bytes
        if node.shared:
            self.shared_bytes[level] += change * node.tree.record_bytes

    def _note_loss(self, node: Node, index: int, level: int, loss: Loss) -> None:
        if not node.tree.gone:
            keys = node.tree.keys_of(node)
            key = BlockKey(keys[index * KEY_BYTES : (index + 1) * KEY_BYTES])
            self.history.note(key, Fate(loss, LEVEL_NAMES[level], self._clock()))

    def _prune(self, node: Node) -> None:
        """Cut blocks without copies off the end of a leaf, and remove edges, and trees, in which nothing is left."""
        while node.parent is not None and node.children is NO_CHILDREN:
            used = max(len(places) if places else 0 for places in node.places)
            kept = max(used, node.leased_to() - node.start)
            if kept and node.blocks - kept < max(8, node.blocks // 4):
                return
            if kept:
                self._cut(node, kept)
                return
            parent = node.parent
            self._cut(node, 0)
            node = parent
        tree = node.tree
        if node.parent is None and node.children is NO_CHILDREN and not node.ends and not tree.gone:
            tree.gone = True
            self.trees.pop(tree.id, None)

    def _cut(self, node: Node, kept: int) -> None:
        """Forget the blocks of a leaf from `kept` on; with none kept, the leaf."""
        if node.parent is None:
            return
        blocks, size = node.blocks, node.tree.token_bytes
        self.blocks -= blocks - kept
        self.bytes -= self._cost(node, blocks) - self._cost(node, kept)
        if not kept:
            node.tree.remove_child(node)
            return
        node.tokens = node.tokens[: kept * size]
        node.end = node.start + kept
        node.keys = node.keys[: kept * KEY_BYTES] if node.keys else None
        node.solid = min(node.solid, kept)
        node.whole = node.solid == kept
        node.head_end = min(node.head_end, node.end)
        node.save_to = min(node.save_to, node.end)

    @staticmethod
    def _cost(node: Node, blocks: int) -> int:
        """Bytes of memory that an edge of so many blocks takes."""
        if not blocks:
            return 0
        token_bytes = node.tree.token_bytes
        key_bytes = token_bytes if blocks > 1 else 0
        return NODE_BYTES + key_bytes + blocks * (token_bytes + BLOCK_OVERHEAD_BYTES)

    @staticmethod
    def _ancestors(node: Node) -> list[Node]:
        above = []
        while (parent := node.parent) is not None:
            above.append(parent)
            node = parent
        return above

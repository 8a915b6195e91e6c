"""The prefix index: every tree, who reads them, what may go, and how many bytes all that takes.

It is authoritative for the local tiers (gpu, ram, ssd) and holds no payload: a place is an integer that its tier
understands. One short lock guards everything; no call holds it for more than 32 blocks' work, `check_integrity` and
`restore` excepted. A place that leaves the index is returned to the caller, who gives it back to the tier; between the
two nobody else can find it.

A `Pin` is the index's half of a lease: it keeps the blocks before `depth` from being evicted, moved or changed.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Final, NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey, TreeId
from kvpool.prefix.accounts import Account, Grant, Ledger, Quotas
from kvpool.prefix.candidates import EvictionPolicy
from kvpool.prefix.history import Fate, History, Loss
from kvpool.prefix.learning import Learner, note_lost, note_request, note_return
from kvpool.prefix.node import LEVELS, NO_CHILDREN, NOWHERE, SSD, Node
from kvpool.prefix.tree import Extras, PrefixTree, Runs, common_blocks, count_solid, stripped

LEVEL_NAMES: Final = ("gpu", "ram", "ssd")
BATCH_BLOCKS: Final = 32
"""The most blocks that are worked on under one hold of the lock."""
MAX_EDGE_BYTES: Final = 256 << 10
"""An edge is not lengthened beyond so many bytes of token ids, for lengthening and splitting copy them."""
TREE_BYTES: Final = 2048
"""What a tree takes before it has a block."""
NODE_BYTES: Final = 376
"""What a node takes beside its blocks and copies: object, lists, entry in its parent (measured, as all of these)."""
LEVEL_BYTES: Final = 340
"""What a node takes for having copies in a tier, beside their places: array, entries in the policy and `residents`."""
KEY_IN_PARENT_BYTES: Final = 33
"""What the copy of the first block's token ids takes, beside them, that is the node's key in its parent."""
BLOCK_OVERHEAD_BYTES: Final = KEY_BYTES
"""What a block takes beside its token ids: its key."""
PLACE_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingRules:
    """Which prefixes count as shared, and how far they are protected from the policy."""

    auto_detect: bool = True
    protect: bool = True
    min_prefix_tokens: int = 64
    max_shared_bytes: int = 8 << 30
    """Above so many shared bytes in a tier, shared blocks there are candidates like all others."""


class Pin:
    """The right to read the blocks before `depth`. Made and ended by the index only; used by one thread at a time."""

    __slots__ = ("depth", "key", "node", "tree")

    def __init__(self, tree: PrefixTree, node: Node, depth: int) -> None:
        self.tree = tree
        self.node = node
        """Where the pin ended when it was made or moved; splits since then may have moved its end upwards."""
        self.depth = depth
        self.key: BlockKey | None = None
        """Key of the last pinned block, once something has asked for it."""


class Gone(NamedTuple):
    """A copy that left the index: the caller gives `place` back to the tier at `level`."""

    level: int
    place: int
    record_bytes: int
    last: bool
    """Whether it was the block's last copy."""


_gone: Callable[[tuple[int, int, int, bool]], Gone] = partial(tuple.__new__, Gone)
"""`Gone` from a tuple, in a third of the time."""


class _Grave:
    """What is left of an erased tree: nodes not yet visited, and those on which a lease was found."""

    __slots__ = ("leased", "tree", "unvisited")

    def __init__(self, tree: PrefixTree) -> None:
        self.tree = tree
        self.unvisited = list(tree.root.children.values())
        self.leased: list[Node] = []


class PrefixIndex:
    """All prefix trees of a pool."""

    def __init__(
        self,
        *,
        limit_bytes: int,
        make_policy: Callable[..., EvictionPolicy],
        make_learner: Callable[[Sequence[int]], Learner] | None = None,
        sharing: SharingRules | None = None,
        history: History | None = None,
        region_of: Mapping[int, Callable[[int], int]] | None = None,
        bytes_of: Mapping[int, Callable[[int], int]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lock = threading.Lock()
        self._acquired, self._release = iter(self.lock.acquire, False), self.lock.release
        """For the two hottest calls: a step of the first takes the lock, in half the time of `with`, and as safely.

        After a plain `acquire()` a signal's exception could come before the `try`, and the lock would be held for ever.
        """
        self.trees: dict[TreeId, PrefixTree] = {}
        self.limit_bytes = limit_bytes
        self.bytes = 0
        """What the index takes of this process's memory, as estimated; 0 when it holds nothing."""
        self.blocks = 0
        self.sharing = sharing or SharingRules()
        self.history = History(16_384) if history is None else history
        self.copies = [0, 0, 0]
        """Per level: how many blocks have a copy there."""
        self.copy_bytes = [0, 0, 0]
        self.shared_bytes = [0, 0, 0]
        self.region_of: dict[int, Callable[[int], int]] = dict(region_of or {SSD: _itself})
        """Per level that is freed region by region (SSD segments, RAM extents): the region of a place."""
        self.residents: dict[int, dict[int, set[Node]]] = {level: {} for level in self.region_of}
        """Per such level: region -> the nodes some of whose blocks lie in it. Copy the set before working on it."""
        self._bytes_of = dict(bytes_of or {})
        """Per level where copies may be encoded: the bytes of the record at a place."""
        self.on_removed: Callable[[int, Sequence[BlockKey], Loss], None] | None = None
        """Told of copies that leave: level, keys (last block first), and why. Called with the lock held, so that nobody
        can enter them again before it knows; it must not wait, nor call the index. It costs a slice per block."""
        self.on_overdue: Callable[[], None] | None = None
        """Told that it is high time for `learn`. Called with the lock held; it must not wait, nor call the index."""
        self.matches = 0
        """Requests: calls of `match` that count."""
        self.asked_blocks = 0
        self.matched_blocks = 0
        self.shared_hits = 0
        """Matched blocks that belong to a shared prefix."""
        self.unsaved_blocks = 0
        """Blocks that were wanted on SSD and were lost before they were written there."""
        self._graves: list[_Grave] = []
        self._clock = clock
        self.uses = 0
        """The clock of ages: how many leases were opened or lengthened."""
        self.ledger = Ledger(
            make_policy,
            make_learner=make_learner,
            protects=self._protects,
            is_protected=self._is_protected,
            leased=self.leased,
        )
        """What each model holds and may hold, and what of it may be evicted."""

    @property
    def has_graves(self) -> bool:
        """Whether something of an erased tree is left to `bury`."""
        return bool(self._graves)

    @property
    def over_limit(self) -> bool:
        """Whether the index itself takes more than it may."""
        return self.bytes > self.limit_bytes

    # -- trees ---------------------------------------------------------------------------------------------------------

    def tree(self, tree_id: TreeId) -> PrefixTree | None:
        """Return the tree of this identity, if any block of it is known."""
        return self.trees.get(tree_id)

    def add_tree(self, tree: PrefixTree) -> PrefixTree:
        """Enter an empty tree, or return the one that another thread has entered meanwhile."""
        with self.lock:
            return self._entered(tree)

    def erase(self, tree: PrefixTree, loss: Loss = Loss.ERASED) -> None:
        """From now on nothing of this tree is found or entered. `bury` gives its copies back; `loss` is why."""
        with self.lock:
            for victim in (tree, self.trees.get(tree.id)):
                if victim is not None and not victim.erased:
                    self._give_up(victim)
                    victim.erased, victim.loss = True, loss
                    self._graves.append(_Grave(victim))

    def bury(self) -> list[Gone]:
        """Give back up to 32 blocks' copies of erased trees; none when only leased ones are left."""
        with self.lock:
            gone: list[Gone] = []
            for grave in self._graves:
                self._bury(grave, gone)
                if not grave.unvisited:
                    self._bury_leased(grave, gone)
            self._graves = [grave for grave in self._graves if grave.unvisited or grave.leased]
            return gone

    def buried_trees(self) -> list[PrefixTree]:
        """The erased trees of which something is left. Call with the lock held."""
        return [grave.tree for grave in self._graves]

    # -- leases --------------------------------------------------------------------------------------------------------

    def match(
        self,
        tree: PrefixTree,
        tokens: bytes,
        extras: Extras | None = None,
        most_blocks: int | None = None,
        *,
        asked: int = 0,
    ) -> Pin:
        """Pin the longest prefix of `tokens` all of whose blocks have a copy; at most `most_blocks` of them.

        A tree that was given up because it was empty is entered again; or another that has taken its place is used.
        `asked`: the blocks of a request, to be counted among the statistics; 0 for a look-up that is none.
        """
        for _ in self._acquired:
            try:
                if tree.gone:
                    tree = self._entered(tree)
                if tree.erased:
                    node, depth = tree.root, 0
                else:
                    node, depth = tree.find_with_extras(tokens, extras) if extras else tree.find(tokens)
                if most_blocks is not None and depth > most_blocks:
                    depth = most_blocks
                    while node.start >= depth and node.parent is not None:
                        node = node.parent
                if asked and (learner := tree.account.learner) is not None:
                    overdue = note_request(learner, node, depth, self.uses + 1)
                    if overdue and self.on_overdue is not None:
                        self.on_overdue()
                if self.ledger.guards:
                    node, depth = self._hold_guarded(node, depth)
                else:
                    self._hold(node, depth)
                if asked:
                    self._count_match(node, depth, asked)
                return Pin(tree, node, depth)
            finally:
                self._release()
        raise AssertionError("the lock is always had in the end")

    def unpin(self, pin: Pin) -> None:
        """End a pin. Not to be called twice."""
        node, depth = pin.node, pin.depth
        for _ in self._acquired:
            try:
                while node.start >= depth and node.parent is not None:
                    node = node.parent
                return self._let_go(node, depth)
            finally:
                self._release()
        return None

    def shorten(self, pin: Pin, depth: int, *, uncount: bool = False) -> None:
        """Let go of the blocks from `depth` on. No use: ages stay as they are.

        `uncount`: the request that pinned them is not served by them, so take them out of the statistics.
        """
        with self.lock:
            if depth >= pin.depth:
                return
            if uncount:
                self.matched_blocks -= pin.depth - depth
                pin.tree.account.matched_blocks -= pin.depth - depth
                self.shared_hits -= max(0, self._shared_depth(pin) - depth)
            node = target = self._settled(pin)
            while target.start >= depth and target.parent is not None:
                target = target.parent
            self._count_lease(target, depth)
            self._let_go(node, pin.depth)
            pin.node, pin.depth, pin.key = target, depth, None

    def charge(self, account: Account, level: int, sizes: Sequence[int]) -> tuple[int, Grant]:
        """Charge records of these sizes that are about to be allocated: how many of them, and why not all."""
        with self.lock:
            return self.ledger.charge(account, level, sizes)

    def discharge(self, account: Account, level: int, nbytes: int) -> None:
        """Bytes that were charged were not allocated, or given back without having been entered."""
        with self.lock:
            self.ledger.discharge(account, level, nbytes)

    def bytes_at(self, level: int, place: int) -> int | None:
        """The length of the record at a place; None where all records of a tree are of one length."""
        return self._bytes_of[level](place) if level in self._bytes_of else None

    def expect_encoded(self, tree: PrefixTree) -> None:
        """From now on copies of this tree may be encoded: to be called before the first such copy is entered."""
        if not tree.encoded:
            with self.lock:
                tree.encoded = True

    def learn(self, account: Account) -> None:
        """Have the model's learner work out what follows from its requests, if that is due. Not with the lock held."""
        learner = account.learner
        if learner is not None and learner.due:
            learner.learn(self.lock)

    def close_accounts(self, is_known: Callable[[str], bool]) -> None:
        """Close the accounts of models that are not known any more, once nothing is charged to them."""
        with self.lock:
            leaving = [account for account in self.ledger.accounts.values() if not is_known(account.name)]
            if leaving:
                used = {tree.account for tree in (*self.trees.values(), *self.buried_trees())}
                for account in leaving:
                    if account not in used:
                        self.ledger.close(account)

    def adopt(self, tree: PrefixTree, model: str) -> None:
        """Charge a tree whose model was not known to that model's account. Holds the lock for the whole tree."""
        with self.lock:
            old, tree.model = tree.account, model
            new = tree.account = self.ledger.account(model)
            blocks = sum(node.has_copy(at) for node in tree.nodes() for at in range(node.blocks))
            for learner, came in ((old.learner, -blocks), (new.learner, blocks)):
                if learner is not None:
                    learner.adopted(came)
            for node in tree.nodes():
                for level, (before, after) in enumerate(zip(old.candidates, new.candidates, strict=True)):
                    before.withdraw(node)
                    after.offer(node)
                    nbytes = self.size(node, level)
                    copies = sum(place != NOWHERE for place in node.places[level] or ())
                    for account, sign in ((old, -1), (new, 1)):
                        account.bytes[level] += sign * nbytes
                        account.copies[level] += sign * copies
            self._note_all_leases()

    def set_quotas(self, quotas: Quotas, capacities: Sequence[int]) -> None:
        """Replace all quotas; what is above a limit then is for the caller to `evict`.

        Where this is the first guarantee, all leases are noted, under one hold of the lock.
        """
        with self.lock:
            guarded = self.ledger.guards
            self.ledger.capacities = list(capacities)
            self.ledger.set_quotas(quotas)
            if self.ledger.guards != guarded:
                self._note_all_leases()

    def advance(self, pin: Pin, tokens: bytes, extras: Extras | None = None, *, counted: bool = True) -> int:
        """Lengthen the pin over blocks of `tokens` that have copies; return how many it gained.

        No further than leases may go beside what is guaranteed to others. They count as matched, unless no request's
        pin is lengthened: see `counted`.
        """
        with self.lock:
            tree = pin.tree
            if tree.erased:
                return 0
            node, depth = tree.find_with_extras(tokens, extras) if extras else tree.find(tokens)
            if depth <= pin.depth:
                return 0
            if self.ledger.guards:
                node, depth = self._hold_guarded(node, depth)
            else:
                self._hold(node, depth)
            self._let_go(self._settled(pin), pin.depth)
            gained = depth - pin.depth
            pin.node, pin.depth, pin.key = node, depth, None
            if counted:
                self.matched_blocks += gained
                tree.account.matched_blocks += gained
            return gained

    def places(self, pin: Pin, level: int) -> list[int]:
        """Where each pinned block lies at `level`, in order; -1 for nowhere."""
        with self.lock:
            found: list[int] = []
            for node in self.path(pin):
                wanted = min(node.end, pin.depth) - node.start
                known = node.places[level]
                run = known[:wanted].tolist() if known is not None else []
                found += run
                found += [NOWHERE] * (wanted - len(run))
            return found

    def last_key(self, pin: Pin) -> BlockKey:
        """The key of the last pinned block; the chain's root where none is. Not with the lock held."""
        if pin.key is None:
            with self.lock:
                pin.key = pin.tree.key_before(self._settled(pin), pin.depth)
        return pin.key

    def path(self, pin: Pin) -> list[Node]:
        """The nodes of the pinned prefix, from the first on. Call with the lock held."""
        return path_to(self._settled(pin))

    def shared_blocks(self, pin: Pin) -> int:
        """How many of the pinned blocks are a shared prefix."""
        with self.lock:
            return self._shared_depth(pin)

    # -- copies --------------------------------------------------------------------------------------------------------

    def attach(
        self,
        pin: Pin,
        tokens: bytes,
        level: int,
        places: Sequence[int],
        extras: Extras | None = None,
        *,
        charged: int = 0,
    ) -> list[int]:
        """Enter copies of the blocks of `tokens` that follow the pin, and lengthen the pin over them.

        Returns the places that were not taken, for the caller to give back: those of blocks that have a copy at `level`
        already, or all when the tree was erased meanwhile. At most 32 blocks a call. `charged` are the bytes for which
        `charge` was asked before; what was not taken of them is discharged too.
        """
        tree, first = pin.tree, pin.depth
        size = tree.token_bytes
        run = tokens[first * size : (first + len(places)) * size]
        if len(places) > BATCH_BLOCKS or len(run) != len(places) * size:
            raise ValueError(
                f"attach takes at most {BATCH_BLOCKS} blocks of tokens and as many places, not {len(places)}"
            )
        if not places:
            return []
        keys = tree.keys_after(self.last_key(pin), first, run, extras)
        with self.lock:
            self.ledger.discharge(tree.account, level, charged)
            if tree.erased:
                return list(places)
            node, refused = self._enter(self._settled(pin), first, run, keys, level, places, extras)
            self._move(pin, node, first + len(places))
            pin.key = BlockKey(keys[-KEY_BYTES:])
            return refused

    def fill(self, pin: Pin, first: int, level: int, places: Sequence[int], *, charged: int = 0) -> list[int]:
        """Enter further copies of pinned blocks, from block `first` on; -1 skips one. Returns those not taken.

        `charged` as in `attach`.
        """
        with self.lock:
            self.ledger.discharge(pin.tree.account, level, charged)
            if pin.tree.erased:
                return [place for place in places if place != NOWHERE]
            refused: list[int] = []
            for node in self.path(pin):
                depth = max(first, node.start)
                until = min(first + len(places), node.end, pin.depth)
                while depth < until:
                    run = _run_of_places(places, depth - first, until - first)
                    if run:
                        refused += self._set_copies(node, depth - node.start, level, run)
                    depth += len(run) or 1
            return refused

    def lose(self, pin: Pin, depth: int, level: int, place: int, reason: Loss) -> list[Gone]:
        """Drop one copy that turned out to be bad, of pinned block `depth`, if it still lies at `place`."""
        with self.lock:
            gone: list[Gone] = []
            for node in self.path(pin):
                if node.start <= depth < node.end and node.place(depth - node.start, level) == place != NOWHERE:
                    self._remove(node, depth - node.start, depth - node.start + 1, level, reason, gone)
            return gone

    def evict(self, level: int, wanted_bytes: int, requester: Account | None = None) -> list[Gone]:
        """Take blocks out of `level`, the policy's choice first, until `wanted_bytes` are free or 32 blocks have gone.

        Nobody loses what is guaranteed to it, but to the `requester` itself. Empty when nothing may go. A block whose
        last copy goes takes along what lies below it, and that goes first: so a call may return copies of other levels
        only.
        """
        with self.lock:
            gone: list[Gone] = []
            spared: list[Node] = []
            freed = 0
            while freed < wanted_bytes and len(gone) < BATCH_BLOCKS:
                node = self._take_victim(level, requester)
                if node is None:
                    break
                account = node.tree.account
                wanted = wanted_bytes - freed
                if account is not requester and account.quotas[level].guaranteed:
                    wanted = min(wanted, account.excess(level))
                if account is not requester and self._would_take_guaranteed(node, level):
                    spared.append(node)
                    continue
                freed += self._evict_tail(node, level, wanted, Loss.EVICTED, gone)
                account.candidates[level].offer(node)
            for node in spared:
                node.tree.account.candidates[level].offer(node)
            return gone

    def evict_own(self, account: Account, level: int, wanted_bytes: int) -> list[Gone]:
        """As `evict`, but from one model's blocks alone, for it is at its limit."""
        with self.lock:
            gone: list[Gone] = []
            freed = 0
            while freed < wanted_bytes and len(gone) < BATCH_BLOCKS:
                node = account.candidates[level].take()
                if node is None:
                    break
                freed += self._evict_tail(node, level, wanted_bytes - freed, Loss.OVER_QUOTA, gone)
                account.candidates[level].offer(node)
            return gone

    def shrink(self) -> list[Gone]:
        """Forget up to 32 blocks, with all their copies, while the index is over its limit; least recently used first.

        Leaves on SSD go first, for most of the index is there; then those of faster tiers. Empty when nothing may go.
        """
        with self.lock:
            gone: list[Gone] = []
            while self.over_limit and len(gone) < BATCH_BLOCKS:
                taken = self._take_slowest()
                if taken is None:
                    break
                node, level = taken
                last, leased = node.tail(level), node.leased_to() - node.start
                first = max(last + 1 - BATCH_BLOCKS + len(gone), node.same_age_from(last), leased)
                self._remove_blocks(node, first, Loss.INDEX_FULL, gone)
                node.tree.account.candidates[level].offer(node)
            return gone

    def vacate(self, node: Node, segment: int, *, keep_leased: bool = True) -> tuple[list[Gone], bool]:
        """Remove a node's copies that lie in an SSD segment, last block first; False when a lease forbade some.

        At most 32 a call: to be called again until it removes none.
        """
        with self.lock:
            gone: list[Gone] = []
            kept = node.leased_to() - node.start if keep_leased else 0
            for index in reversed(self.inside(node, SSD, segment)):
                if index < kept:
                    return gone, False
                if len(gone) >= BATCH_BLOCKS:
                    break
                self._remove(node, index, index + 1, SSD, Loss.SEGMENT_FREED, gone)
            return gone, True

    def inside(self, node: Node, level: int, region: int) -> list[int]:
        """Which blocks of the edge lie in this region of `level`. Call with the lock held."""
        region_of = self.region_of[level]
        places = node.places[level] or ()
        return [at for at, place in enumerate(places) if place != NOWHERE and region_of(place) == region]

    def move(self, node: Node, level: int, old: int, new: int) -> bool:
        """Point the block that lies at `old` to `new`.

        False, and nothing changed, when no block of this node, or of one that was split off it, lies there any more,
        or when that block is leased: somebody may be reading it at `old`.
        """
        with self.lock:
            at: Node | None = node
            while at is not None:
                places = at.places[level]
                if places is not None and old in places:
                    index = places.index(old)
                    if at.start + index < at.leased_to():
                        return False
                    self._repoint(at, level, index, new)
                    return True
                at = at.parent
            return False

    def note_lost(self, keys: Sequence[BlockKey], loss: Loss, level: int) -> None:
        """Remember why blocks that are not in the index are not: for `explain`."""
        with self.lock:
            self.history.note_all(keys, Fate(loss, LEVEL_NAMES[level], self._clock()))

    def mark_shared(self, pin: Pin) -> None:
        """Declare the pinned prefix shared, whether or not requests have diverged after it."""
        with self.lock:
            if pin.tree.erased:
                return
            node = self._settled(pin)
            if not node.shared and node.start < pin.depth < node.end:
                node = self._split(node, pin.depth - node.start)
            self._mark_shared(node)

    # -- inside, with the lock held: leases ----------------------------------------------------------------------------

    def _count_match(self, node: Node, depth: int, asked: int) -> None:
        account = node.tree.account
        self.matches += 1
        self.asked_blocks += asked
        account.asked_blocks += asked
        if depth:
            self.matched_blocks += depth
            account.matched_blocks += depth
            while not node.shared and node.parent is not None:
                node = node.parent
            self.shared_hits += min(node.end, depth)
            node.hits += 1

    def _hold_guarded(self, node: Node, depth: int) -> tuple[Node, int]:
        """`_hold`, of fewer blocks where more would hold fast what is guaranteed to others."""
        self._hold(node, depth)
        if not self.ledger.may_be_overdrawn(node.tree.account):
            return node, depth
        self._let_go(node, depth)
        fits = self._leasable_depth(node, depth)
        while node.start >= fits and node.parent is not None:
            node = node.parent
        self._hold(node, fits)
        if node.tree.gone and not node.tree.erased:  # it was given up as empty between the two leases
            self._entered(node.tree)
        return node, fits

    def _leasable_depth(self, node: Node, depth: int) -> int:
        """How many of the blocks before `depth` may be leased beside what is leased now."""
        account = node.tree.account
        room = {level: self.ledger.headroom(account, level) for level in self.ledger.guarded_levels}
        for part in path_to(node):
            leased, until = max(0, part.leased_to() - part.start), min(part.end, depth) - part.start
            for at in range(leased, until):
                for level in room:
                    place = part.place(at, level)
                    if place != NOWHERE:
                        room[level] -= self._record_bytes_of(part.tree, level)(place)
                        if room[level] < 0:
                            return part.start + at
        return depth

    def leased(self, account: Account, level: int) -> int:
        """Bytes of a model's copies at `level` that some lease holds, while something is guaranteed to somebody.

        Call with the lock held. Takes time in proportion to the edges that are leased.
        """
        seen: set[Node] = set()
        nbytes = 0
        for end in account.lease_ends:
            node: Node | None = end
            while node is not None and node not in seen:
                seen.add(node)
                nbytes += self.size(node, level, node.leased_to() - node.start)
                node = node.parent
        return nbytes

    def _note_all_leases(self) -> None:
        self.ledger.forget_leases()
        if self.ledger.guards:
            for tree in (*self.trees.values(), *self.buried_trees()):
                for node in (tree.root, *tree.nodes()):
                    for depth, leases in (node.ends or {}).items():
                        self.ledger.note_lease(node, depth, leases)

    def _hold(self, node: Node, depth: int) -> None:
        """Count a lease that ends at `depth` in `node`, and date all that it covers."""
        if self.ledger.guards:
            self.ledger.note_lease(node, depth)
        self.uses = now = self.uses + 1
        if depth == node.end:
            node.last_use = now
        else:
            node.use_head(depth, now)
        ends = node.ends
        if ends is None:
            node.ends = {depth: 1}
        else:
            ends[depth] = ends.get(depth, 0) + 1
        above = node.parent
        while above is not None:
            above.refs += 1
            above.last_use = now
            above = above.parent

    def _count_lease(self, node: Node, depth: int) -> None:
        if self.ledger.guards:
            self.ledger.note_lease(node, depth)
        if node.ends is None:
            node.ends = {}
        node.ends[depth] = node.ends.get(depth, 0) + 1
        above = node.parent
        while above is not None:
            above.refs += 1
            above = above.parent

    def _let_go(self, node: Node, depth: int) -> None:
        ends = node.ends
        assert ends is not None
        leases = ends[depth]
        if leases > 1:
            ends[depth] = leases - 1
        elif len(ends) > 1:
            del ends[depth]
        else:
            node.ends = None
        if self.ledger.guards:
            self.ledger.note_release(node, depth)
        if node.parked:
            self._offer_parked(node)
        above = node.parent
        while above is not None:
            above.refs = refs = above.refs - 1
            if not refs and above.parked:
                self._offer_parked(above)
            above = above.parent
        if not node.whole or node.parent is None:
            self._prune(node)

    @staticmethod
    def _settled(pin: Pin) -> Node:
        """The node in which the pin ends now: a split may have moved it up."""
        node = pin.node
        while node.start >= pin.depth and node.parent is not None:
            node = node.parent
        pin.node = node
        return node

    def _shared_depth(self, pin: Pin) -> int:
        node = self._settled(pin)
        while node.parent is not None and not node.shared:
            node = node.parent
        return min(node.end, pin.depth)

    def _move(self, pin: Pin, node: Node, depth: int) -> None:
        """Lengthen the pin: the longer lease is counted before the shorter one ends."""
        self._hold(node, depth)
        self._let_go(self._settled(pin), pin.depth)
        pin.node, pin.depth = node, depth

    @staticmethod
    def _offer_parked(node: Node) -> None:
        for candidates in node.tree.account.candidates:
            candidates.release(node)

    # -- inside, with the lock held: entering --------------------------------------------------------------------------

    def _enter(
        self,
        node: Node,
        depth: int,
        run: bytes,
        keys: bytes,
        level: int,
        places: Sequence[int],
        extras: Extras | None,
    ) -> tuple[Node, list[int]]:
        """Walk from `depth` in `node` along `run`, making what is missing, and set the copies on the way."""
        size = node.tree.token_bytes
        refused: list[int] = []
        first, until = depth, depth + len(places)
        runs = Runs(extras, until) if extras else None
        while depth < until:
            at, stop = depth - first, until if runs is None else runs.end_after(depth)
            extra = extras.get(depth, b"") if extras else b""
            if depth == node.end:
                block = run[at * size : (at + 1) * size]
                child = node.children.get((block, extra) if extra else block)
                if child is None:
                    end = stop - first
                    node = self._grow(node, run[at * size : end * size], keys[at * KEY_BYTES : end * KEY_BYTES], extra)
                    self._set_copies(node, depth - node.start, level, places[at:end])
                    depth = stop
                    continue
                node = child
            inside = depth - node.start
            common = 0
            if not (inside and extra):
                common = common_blocks(node.tokens, inside * size, run, at * size, min(node.end, stop) - depth, size)
            if common:
                if inside + common > node.solid and (learner := node.tree.account.learner) is not None:
                    note_return(learner, node, max(inside, node.solid), inside + common, self.uses)
                refused += self._set_copies(node, inside, level, places[at : at + common])
                depth += common
            else:
                node = self._split(node, inside)
        return node, refused

    def _grow(self, node: Node, run: bytes, keys: bytes, extra: bytes) -> Node:
        """Make room for the blocks of `run` after `node`: in its edge if that may grow, else in a new child."""
        blocks = len(keys) // KEY_BYTES
        self.blocks += blocks
        tree = node.tree
        learner = tree.account.learner
        traits = b"" if learner is None else learner.entered(keys, node.end, self.uses)
        leaf = node.children is NO_CHILDREN and node.parent is not None
        if leaf and not extra and not node.shared and len(node.tokens) + len(run) <= MAX_EDGE_BYTES:
            self.bytes += edge_bytes(node, node.blocks + blocks) - edge_bytes(node, node.blocks)
            tree.append(node, run, keys)
            if learner is not None:
                node.traits = learner.extended(node.traits) + traits
            return node
        child = tree.add_child(node, run, keys, extra)
        child.traits = traits
        self.bytes += edge_bytes(child, blocks)
        if self.sharing.auto_detect and not node.shared and len(node.children) > 1:
            self._mark_shared(node)
        return child

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge in two and return the upper node; the lower one goes if it has neither copies nor leases."""
        before = node_bytes(node)
        upper = node.tree.split(node, at)
        if self.ledger.guards:
            self.ledger.note_split(upper, node)
        self.bytes += node_bytes(upper) + node_bytes(node) - before
        for level in self.region_of:
            moved = upper.places[level]
            if moved is not None:
                self._enter_regions(upper, level, moved)
                self._leave_regions(node, level, moved)
        for candidates in node.tree.account.candidates:
            if not node.places[candidates.level]:
                candidates.withdraw(node)
            candidates.release(node)
            candidates.offer(upper)
        self._prune(node)
        return upper

    def _set_copies(self, node: Node, index: int, level: int, places: Sequence[int]) -> list[int]:
        """Enter copies at `level` of the blocks from `index` on; return the places of those that have one there."""
        known = node.places[level]
        begun: Sequence[int] = ()
        if known is None:
            begun = [at for at in LEVELS[level:] if not node.holds(at)]
            self.bytes += LEVEL_BYTES
            known = node.places[level] = array("q")
        refused: list[int] = []
        end = index + len(places)
        if len(known) <= index:
            if len(known) < index:
                known.extend(repeat(NOWHERE, index - len(known)))
            known.extend(places)
            taken = places
        else:
            taken, refused = _fill_gaps(known, index, places)
        self._count(node, level, taken)
        if taken and level in self.region_of:
            self._enter_regions(node, level, taken)
        if not node.whole and index <= node.solid < end:
            node.solid = count_solid(node, end)
            node.whole = node.solid == node.blocks
        for at in begun:
            self._carry_begun(node, at)
        candidates = node.tree.account.candidates[level]
        if node.heads is None:
            candidates.offer(node)
        else:
            candidates.offer_deeper(node)
        return refused

    def _mark_shared(self, node: Node) -> None:
        while node.parent is not None and not node.shared:
            node.shared = True
            for level in LEVELS:
                places = node.places[level]
                if places is not None:
                    self.shared_bytes[level] += self._size(node.tree, level, places)
            node = node.parent

    # -- inside, with the lock held: removing --------------------------------------------------------------------------

    def _remove(self, node: Node, first: int, until: int, level: int, loss: Loss, gone: list[Gone]) -> None:
        """Remove the copies at `level` of the blocks from `first` to before `until`, last first, leased or not."""
        places = node.places[level]
        if places is None or first >= len(places):
            return
        taken = places[first:until]
        if until >= len(places):
            del places[first:]
            node.places[level] = stripped(places)
        else:
            places[first:until] = array("q", [NOWHERE]) * len(taken)
        bytes_of = self._record_bytes_of(node.tree, level)
        if NOWHERE not in taken and node.held_to() <= first and self.on_removed is None:
            lost: Sequence[int] = range(first, first + len(taken))
            leaving = taken[::-1]
            gone += map(_gone, zip(repeat(level), leaving, map(bytes_of, leaving), repeat(True)))
        else:
            here = [(at, place) for at, place in enumerate(taken, first) if place != NOWHERE]
            lost = [at for at, _ in here if not node.has_copy(at)]
            lasts = set(lost)
            gone += [Gone(level, place, bytes_of(place), at in lasts) for at, place in reversed(here)]
            if self.on_removed is not None and here:
                self.on_removed(level, [_key_at(node, at) for at, _ in reversed(here)], loss)
        self._count(node, level, taken, -1)
        if level in self.region_of:
            self._leave_regions(node, level, taken)
        if level == SSD:
            node.save_to = min(node.save_to, node.start + first)  # to be asked for again when it is used again
            if len(node.places[SSD] or ()) > first or any(child.places[SSD] for child in node.children.values()):
                node.tree.gapped = True
        if node.places[level] is None:
            self.bytes -= LEVEL_BYTES
            for at in LEVELS[level:]:
                if not node.holds(at):
                    self._carry_ceased(node, at)
        for slower in LEVELS[level + 1 :]:
            node.tree.account.candidates[slower].offer(node)
        if lost:
            self._note_loss(node, lost, level, loss)
            node.solid = min(node.solid, lost[0])
            node.whole = False
            self._prune(node)

    def _remove_blocks(self, node: Node, first: int, loss: Loss, gone: list[Gone]) -> None:
        """Remove every copy of the blocks from `first` on, without looking at leases."""
        until = node.held_to()
        for level in LEVELS:
            self._remove(node, first, until, level, loss, gone)

    def _take_victim(self, level: int, requester: Account | None) -> Node | None:
        """Who goes next: protected blocks after all others, whosever they are."""
        node = self.ledger.victim(level, requester, spare_protected=True)
        return self.ledger.victim(level, requester, spare_protected=False) if node is None else node

    def _take_slowest(self) -> tuple[Node, int] | None:
        """Of the slowest level where something may go; what is guaranteed to somebody goes after all else."""
        for level in reversed(LEVELS):
            if (node := self._take_victim(level, None)) is not None:
                return node, level
        for level in reversed(LEVELS):
            for account in self.ledger.accounts.values():
                if (node := account.candidates[level].take()) is not None:
                    return node, level
        return None

    def _would_take_guaranteed(self, node: Node, level: int) -> bool:
        """Whether evicting the edge's tail would take along, at another level, what is guaranteed to its model."""
        if not self.ledger.guards:
            return False
        last = node.tail(level)
        if _has_other_copy(node, last, level) or not (node.children or node.held_to() > last + 1):
            return False
        leaf = _deepest(node)
        return any(
            leaf.places[other] and leaf.tree.account.excess(other) <= 0
            for other in self.ledger.guarded_levels
            if other != level
        )

    def _evict_tail(self, node: Node, level: int, wanted_bytes: int, loss: Loss, gone: list[Gone]) -> int:
        """Evict blocks of one age from the end of one edge; return the bytes freed at `level`."""
        last = node.tail(level)
        room = BATCH_BLOCKS - len(gone)
        if not _has_other_copy(node, last, level) and (node.children or node.held_to() > last + 1):
            self._remove_deepest(node, last, room, gone)
            return 0
        places = node.places[level]
        assert places is not None
        excess = self.shared_bytes[level] - self.sharing.max_shared_bytes
        if self.sharing.protect and excess > 0 and self._is_protected(node):
            wanted_bytes = min(wanted_bytes, excess)
        most = min(room, self._blocks_for(node, level, last, wanted_bytes, room))
        first = self._first_of_tail(node, last, level, most)
        before = len(gone)
        self._remove(node, first, last + 1, level, loss, gone)
        return sum(copy.record_bytes for copy in gone[before:])

    def _blocks_for(self, node: Node, level: int, last: int, wanted_bytes: int, most: int) -> int:
        """How many blocks of an edge, from `last` upwards, take so many bytes; about `most`, where they do not."""
        if not node.tree.encoded:
            return -(-wanted_bytes // node.tree.record_bytes)
        bytes_of, blocks = self._record_bytes_of(node.tree, level), 0
        while wanted_bytes > 0 and blocks < most and blocks <= last:
            place = node.place(last - blocks, level)
            wanted_bytes -= bytes_of(place) if place != NOWHERE else 0
            blocks += 1
        return max(1, blocks)

    @staticmethod
    def _first_of_tail(node: Node, last: int, level: int, most: int) -> int:
        """Where the run of blocks begins that may leave `level` together with `last`: `last` is the tail there."""
        run = node.tree.account.candidates[level].run_from(node, last)
        first = max(last + 1 - most, run, node.same_age_from(last), node.leased_to() - node.start)
        for faster in range(level):
            first = max(first, len(node.places[faster] or ()) - 1)
        places = node.places[level]
        assert places is not None
        others = [other for other in node.places if other is not None and other is not places and len(other) > first]
        if not others and NOWHERE not in places[first : last + 1]:
            return first
        kept_elsewhere = _has_other_copy(node, last, level)
        index = last
        while (
            index > first and places[index - 1] != NOWHERE and _has_other_copy(node, index - 1, level) == kept_elsewhere
        ):
            index -= 1
        return index

    def _remove_deepest(self, node: Node, index: int, most: int, gone: list[Gone]) -> None:
        """Remove up to `most` blocks that lie deepest below block `index`: without it nothing there can be reached."""
        leaf = _deepest(node)
        first = leaf.held_to() - most
        self._remove_blocks(leaf, max(first, index + 1 if leaf is node else 0), Loss.ORPHANED, gone)

    def _bury(self, grave: _Grave, gone: list[Gone]) -> None:
        """Top-down, since nobody can match any of it; nodes leave the tree with the last of their descendants."""
        while grave.unvisited and len(gone) < BATCH_BLOCKS:
            node = grave.unvisited[-1]
            if not self._bury_blocks(node, gone):
                grave.unvisited.pop()
                grave.unvisited.extend(node.children.values())
                if node.leased_to() > node.start:
                    grave.leased.append(node)

    def _bury_leased(self, grave: _Grave, gone: list[Gone]) -> None:
        still: list[Node] = []
        while grave.leased and len(gone) < BATCH_BLOCKS:
            if not self._bury_blocks(grave.leased[-1], gone):
                node = grave.leased.pop()
                if node.leased_to() > node.start:
                    still.append(node)
        grave.leased += still

    def _bury_blocks(self, node: Node, gone: list[Gone]) -> bool:
        """Remove unleased blocks from the end of an edge; False when there are none."""
        leased, held = node.leased_to() - node.start, node.held_to()
        if held <= leased:
            return False
        self._remove_blocks(node, max(leased, held - BATCH_BLOCKS + len(gone)), Loss.EVICTED, gone)
        return True

    def _prune(self, node: Node) -> None:
        """Cut blocks without copies off the end of a leaf, and remove edges, and trees, in which nothing is left."""
        while node.parent is not None and node.children is NO_CHILDREN and node.blocks:
            kept = max(node.held_to(), node.leased_to() - node.start)
            if kept:
                if node.blocks - kept >= max(8, node.blocks // 4):
                    self._forget_blocks(node, kept)
                    node.tree.cut(node, kept)
                return
            self._forget_blocks(node, 0)
            for candidates in node.tree.account.candidates:
                candidates.withdraw(node)
            node.tree.remove_child(node)
            node = node.parent
        root = node.tree.root
        if node is root and root.children is NO_CHILDREN and not root.ends:
            self._give_up(node.tree)

    def _forget_blocks(self, node: Node, kept: int) -> None:
        self.blocks -= node.blocks - kept
        self.bytes -= edge_bytes(node, node.blocks) - edge_bytes(node, kept)

    # -- inside, with the lock held: trees, counts, candidates ---------------------------------------------------------

    def _entered(self, tree: PrefixTree) -> PrefixTree:
        if tree.erased:
            return tree
        known = self.trees.get(tree.id)
        if known is not None:
            return known
        self.trees[tree.id] = tree
        tree.account = self.ledger.account(tree.model)
        tree.gone = False
        self.bytes += TREE_BYTES
        return tree

    def _give_up(self, tree: PrefixTree) -> None:
        tree.gone = True
        if self.trees.get(tree.id) is tree:
            del self.trees[tree.id]
            self.bytes -= TREE_BYTES

    def _record_bytes_of(self, tree: PrefixTree, level: int) -> Callable[[int], int]:
        """What tells how long the records of a tree at a level are, by their places."""
        if tree.encoded and level in self._bytes_of:
            return self._bytes_of[level]
        record_bytes = tree.record_bytes
        return lambda place: record_bytes

    def _size(self, tree: PrefixTree, level: int, places: Sequence[int]) -> int:
        """Bytes of the records at these places."""
        if tree.encoded and level in self._bytes_of:
            bytes_of = self._bytes_of[level]
            return sum(bytes_of(place) for place in places if place != NOWHERE)
        return (len(places) - places.count(NOWHERE)) * tree.record_bytes

    def size(self, node: Node, level: int, blocks: int | None = None) -> int:
        """Bytes of the copies at `level` of an edge's first blocks, or of all. Call with the lock held."""
        return self._size(node.tree, level, (node.places[level] or ())[:blocks])

    def _repoint(self, node: Node, level: int, index: int, place: int) -> None:
        """Let an unleased block lie at another place of its level, maybe in another length."""
        places = node.places[level]
        assert places is not None
        old, new = places[index : index + 1], array("q", [place])
        places[index] = place
        if node.tree.encoded:
            self._count(node, level, new)
            self._count(node, level, old, -1)
        self._enter_regions(node, level, new)
        self._leave_regions(node, level, old)

    @staticmethod
    def _carry_begun(node: Node, level: int) -> None:
        """Carry upwards that `node` has begun to hold copies at `level` or faster."""
        parent = node.parent
        while parent is not None:
            held = parent.holds(level)
            assert isinstance(parent.below, list)
            parent.below[level] += 1
            if held:
                return
            parent = parent.parent

    def _carry_ceased(self, node: Node, level: int) -> None:
        """Carry upwards that `node` has ceased to hold copies at `level` or faster."""
        parent = node.parent
        while parent is not None:
            assert isinstance(parent.below, list)
            parent.below[level] -= 1
            if parent.below[level]:
                return
            parent.tree.account.candidates[level].offer(parent)
            if parent.holds(level):
                return
            parent = parent.parent

    def _count(self, node: Node, level: int, places: Sequence[int], sign: int = 1) -> None:
        """Copies at these places came, or went."""
        account = node.tree.account
        copies = sign * (len(places) - places.count(NOWHERE))
        nbytes = sign * self._size(node.tree, level, places)
        self.bytes += copies * PLACE_BYTES
        self.copies[level] += copies
        self.copy_bytes[level] += nbytes
        account.copies[level] += copies
        account.bytes[level] += nbytes
        if node.shared:
            self.shared_bytes[level] += nbytes

    def _enter_regions(self, node: Node, level: int, places: Sequence[int]) -> None:
        region_of, residents = self.region_of[level], self.residents[level]
        for region in {region_of(place) for place in places if place != NOWHERE}:
            nodes = residents.get(region)
            if nodes is None:
                residents[region] = {node}
            else:
                nodes.add(node)

    def _leave_regions(self, node: Node, level: int, places: Sequence[int]) -> None:
        """Some blocks of the node lay at `places`: take it out of the regions in which none of them lies any more."""
        region_of, residents = self.region_of[level], self.residents[level]
        left = {region_of(place) for place in places if place != NOWHERE}
        for place in reversed(node.places[level] or ()):
            if place != NOWHERE:
                left.discard(region_of(place))
                if not left:
                    return
        for region in left:
            nodes = residents.get(region)
            if nodes is not None:
                nodes.discard(node)
                if not nodes:
                    del residents[region]

    def _protects(self, level: int) -> bool:
        return self.sharing.protect and self.shared_bytes[level] <= self.sharing.max_shared_bytes

    def _is_protected(self, node: Node) -> bool:
        return node.shared and node.end * node.tree.token_bytes >= 4 * self.sharing.min_prefix_tokens

    def _note_loss(self, node: Node, lost: Sequence[int], level: int, loss: Loss) -> None:
        wanted = node.save_to - node.start
        if wanted > lost[0] and not node.tree.erased:
            self.unsaved_blocks += sum(at < wanted for at in lost)
        lost_keys = [_key_at(node, at) for at in lost]
        account = node.tree.account
        if account.learner is not None:
            note_lost(account.learner, node, lost, lost_keys)
        reason = node.tree.loss if node.tree.erased else loss
        self.history.note_all(lost_keys, Fate(reason, LEVEL_NAMES[level], self._clock()))


def path_to(node: Node) -> list[Node]:
    """The nodes from the first below the root to this one."""
    nodes = []
    at: Node | None = node
    while at is not None and at.parent is not None:
        nodes.append(at)
        at = at.parent
    return nodes[::-1]


def _itself(place: int) -> int:
    return place


def node_bytes(node: Node) -> int:
    """Bytes of memory that a node takes, without the places of its copies."""
    return edge_bytes(node, node.blocks) + LEVEL_BYTES * (len(LEVELS) - node.places.count(None))


def edge_bytes(node: Node, blocks: int) -> int:
    """Bytes of memory that an edge of so many blocks takes, without copies."""
    if not blocks:
        return 0
    token_bytes = node.tree.token_bytes
    key_in_parent = token_bytes + KEY_IN_PARENT_BYTES if blocks > 1 else 0
    return NODE_BYTES + key_in_parent + blocks * (token_bytes + BLOCK_OVERHEAD_BYTES)


def _key_at(node: Node, index: int) -> BlockKey:
    return BlockKey(node.keys[index * KEY_BYTES : (index + 1) * KEY_BYTES])


def _fill_gaps(known: array[int], index: int, places: Sequence[int]) -> tuple[list[int], list[int]]:
    """Put places from `index` on into the gaps of `known`; return those put and those for which there was no gap."""
    taken, refused = [], []
    for at, place in enumerate(places, index):
        if at >= len(known):
            known.append(place)
            taken.append(place)
        elif known[at] == NOWHERE:
            known[at] = place
            taken.append(place)
        else:
            refused.append(place)
    return taken, refused


def _run_of_places(places: Sequence[int], first: int, until: int) -> list[int]:
    """The places from `first` on, up to the first that is nowhere."""
    run = list(places[first:until])
    return run[: run.index(NOWHERE)] if NOWHERE in run else run


def _has_other_copy(node: Node, index: int, level: int) -> bool:
    return any(node.place(index, at) != NOWHERE for at in LEVELS if at != level)


def _deepest(node: Node) -> Node:
    """A leaf below the edge, or the edge itself."""
    while node.children:
        node = _last_child(node)
    return node


def _last_child(node: Node) -> Node:
    """The child entered last; `popitem` finds it at once, where an iterator would step over those deleted before."""
    key, child = node.children.popitem()
    node.children[key] = child
    return child

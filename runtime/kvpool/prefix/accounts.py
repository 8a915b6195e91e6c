"""What each model holds of each local tier, and what it may hold: quotas, in encoded bytes, exactly.

One account per model name, so that the revisions of a model share one. It is charged for what is entered in the index
(`bytes`) and for what was allocated and is not entered yet (`in_flight`). What is leased cannot be evicted, so it could
take what is guaranteed to others. Therefore what models have leased or in flight beyond their own guarantees, all of
them together, stays within what is guaranteed to nobody. (A bound for each model alone would not do: two could take it
together.)

What is leased is a sum over leases first (`pinned`), which counts blocks that several leases share several times: a
match pays two additions for it, and only while something is guaranteed to somebody. Where that sum might be too much,
what is leased is counted exactly, from the edges in which leases end.

Guarded by the index's lock; only `kvpool.prefix` writes the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

from kvpool.prefix.candidates import Candidates, EvictionPolicy
from kvpool.prefix.learning import Learner
from kvpool.prefix.node import LEVELS, Node

UNLIMITED = 1 << 62


class Quota(NamedTuple):
    """A model's share of one tier, in bytes."""

    guaranteed: int = 0
    limit: int = UNLIMITED


Quotas = Mapping[str, Mapping[int, Quota]]
"""By the model's name, then by level."""


class Account:
    """One model's. `candidates` are what of it may be evicted, per level."""

    __slots__ = (
        "asked_blocks",
        "bytes",
        "candidates",
        "copies",
        "in_flight",
        "learner",
        "lease_ends",
        "matched_blocks",
        "name",
        "pinned",
        "quotas",
    )

    def __init__(
        self, name: str, candidates: list[Candidates], copies: list[int], learner: Learner | None = None
    ) -> None:
        self.name = name
        self.candidates = candidates
        self.learner = learner
        """What the policies of all levels know of this model's requests, if they learn."""
        self.quotas = [Quota() for _ in LEVELS]
        self.bytes = [0, 0, 0]
        self.copies = copies
        """How many blocks have a copy at each level."""
        self.in_flight = [0, 0, 0]
        self.pinned = 0
        """Bytes of the blocks of all leases, each as often as it is leased; 0 while the ledger does not guard."""
        self.lease_ends: set[Node] = set()
        """The edges in which they end."""
        self.asked_blocks = 0
        self.matched_blocks = 0

    def excess(self, level: int) -> int:
        """Bytes above what is guaranteed; negative below."""
        return self.bytes[level] - self.quotas[level].guaranteed

    def room(self, level: int) -> int:
        """Bytes left to its limit; negative above it."""
        return self.quotas[level].limit - self.bytes[level] - self.in_flight[level]


class Grant(Enum):
    """Whether a model may have as many bytes of a tier as it wants."""

    GIVEN = auto()
    OVER_LIMIT = auto()
    """Something of its own has to go first."""
    OTHERS_GUARANTEE = auto()
    """So much of it is leased that others could not have what is guaranteed to them."""


class Ledger:
    """All accounts of an index. `capacities` are the bytes of each level, as far as guarantees need them."""

    def __init__(
        self,
        make_policy: Callable[..., EvictionPolicy],
        *,
        make_learner: Callable[[Sequence[int]], Learner] | None = None,
        protects: Callable[[int], bool],
        is_protected: Callable[[Node], bool],
        leased: Callable[[Account, int], int],
    ) -> None:
        self.accounts: dict[str, Account] = {}
        self.capacities = [UNLIMITED, UNLIMITED, UNLIMITED]
        self.guards = False
        """Whether anything is guaranteed to anybody, so that leases are noted."""
        self.guarded_levels: tuple[int, ...] = ()
        self._pinned = 0
        self._in_flight = [0, 0, 0]
        self._leased = leased
        """Counts an account's leased bytes at a level, exactly."""
        self._quotas: Quotas = {}
        self._guaranteed = [0, 0, 0]
        self._make_policy = make_policy
        """Given the learner and the level, where something learns."""
        self._make_learner = make_learner
        self._protects = protects
        self._is_protected = is_protected

    def account(self, name: str) -> Account:
        """The account of this model, opened if need be."""
        known = self.accounts.get(name)
        if known is None:
            known = self.accounts[name] = self._opened(name)
            self._apply(known)
        return known

    def set_quotas(self, quotas: Quotas) -> None:
        """Replace all quotas. What a model holds beyond is for the caller to evict."""
        self._quotas = quotas
        for account in self.accounts.values():
            self._apply(account)
        for level in LEVELS:
            self._guaranteed[level] = sum(by_level.get(level, Quota()).guaranteed for by_level in quotas.values())
        self.guarded_levels = tuple(level for level in LEVELS if self._guaranteed[level])
        self.guards = bool(self.guarded_levels)

    def note_lease(self, node: Node, depth: int, leases: int = 1) -> None:
        """Leases were counted that end at `depth` in `node`."""
        tree = node.tree
        nbytes = leases * depth * tree.record_bytes
        tree.account.pinned += nbytes
        tree.account.lease_ends.add(node)
        self._pinned += nbytes

    def note_release(self, node: Node, depth: int) -> None:
        """A lease was given up that ended at `depth` in `node`."""
        tree = node.tree
        nbytes = depth * tree.record_bytes
        tree.account.pinned -= nbytes
        if node.ends is None:
            tree.account.lease_ends.discard(node)
        self._pinned -= nbytes

    def note_split(self, upper: Node, lower: Node) -> None:
        """Leases that end in the upper part went there."""
        ends = upper.tree.account.lease_ends
        if upper.ends:
            ends.add(upper)
        if not lower.ends:
            ends.discard(lower)

    def forget_leases(self) -> None:
        """Forget what was noted of all leases."""
        self._pinned = 0
        for account in self.accounts.values():
            account.pinned = 0
            account.lease_ends = set()

    def may_be_overdrawn(self, account: Account) -> bool:
        """Whether this model may hold fast what is guaranteed to others: never False where it does."""
        for level in self.guarded_levels:
            if self._pinned + self._in_flight[level] > self.capacities[level] - self._guaranteed[level]:
                held = account.pinned + account.in_flight[level]
                if held > account.quotas[level].guaranteed and self.headroom(account, level) < 0:
                    return True
        return False

    def headroom(self, account: Account, level: int) -> int:
        """How many bytes more the account may hold fast, leased or in flight; negative where it holds too much."""
        free = self.capacities[level] - self._guaranteed[level]
        for other in self.accounts.values():
            held = self._leased(other, level) + other.in_flight[level] - other.quotas[level].guaranteed
            free -= held if other is account else max(0, held)
        return free

    def charge(self, account: Account, level: int, sizes: Sequence[int]) -> tuple[int, Grant]:
        """Charge records of these sizes that are about to be allocated: how many of them, and why not all."""
        room, why = account.room(level), Grant.OVER_LIMIT
        if self._may_lack(account, level, sum(sizes)) and (headroom := self.headroom(account, level)) < room:
            room, why = headroom, Grant.OTHERS_GUARANTEE
        charged = granted = 0
        for nbytes in sizes:
            if charged + nbytes > room:
                break
            charged += nbytes
            granted += 1
        account.in_flight[level] += charged
        self._in_flight[level] += charged
        return granted, Grant.GIVEN if granted == len(sizes) else why

    def discharge(self, account: Account, level: int, nbytes: int) -> None:
        """Bytes that were charged were entered, or given back."""
        account.in_flight[level] -= nbytes
        self._in_flight[level] -= nbytes

    def _may_lack(self, account: Account, level: int, nbytes: int) -> bool:
        """Whether `nbytes` more in flight may be too much; never False where they are."""
        if level not in self.guarded_levels:
            return False
        common = self.capacities[level] - self._guaranteed[level]
        own = account.pinned + account.in_flight[level] + nbytes
        return own > account.quotas[level].guaranteed and self._pinned + self._in_flight[level] + nbytes > common

    def victim(self, level: int, requester: Account | None, *, spare_protected: bool) -> Node | None:
        """Take the node that should lose its last block at `level`, no longer on offer; None when none may.

        Where something is guaranteed at this level, one of a model as far as possible above its guarantee, never of one
        within it, but of the requester: it may always give up its own. Else the one used longest ago.
        """
        accounts = [account for account in self.accounts.values() if account.bytes[level]]
        if not self._guaranteed[level]:
            return _earliest([account.candidates[level] for account in accounts], spare_protected=spare_protected)
        able = [account for account in accounts if account.excess(level) > 0 or account is requester]
        for account in sorted(able, key=lambda account: (account.excess(level) <= 0, -account.excess(level))):
            node = account.candidates[level].take(spare_protected=spare_protected)
            if node is not None:
                return node
        return None

    def over_limit(self, level: int) -> list[tuple[Account, int]]:
        """Who holds more than its limit, and by how many bytes."""
        return [(account, -account.room(level)) for account in list(self.accounts.values()) if account.room(level) < 0]

    def close(self, account: Account) -> None:
        """Close an account if it holds nothing. Not to be called while a tree is charged to it."""
        if not any((*account.copies, *account.in_flight, account.pinned)):
            del self.accounts[account.name]

    def _apply(self, account: Account) -> None:
        by_level = self._quotas.get(account.name, {})
        account.quotas = [by_level.get(level, Quota()) for level in LEVELS]

    def _opened(self, name: str) -> Account:
        copies = [0 for _ in LEVELS]
        if self._make_learner is None:
            return Account(name, [self._candidates(level, self._make_policy) for level in LEVELS], copies)
        learner = self._make_learner(copies)
        candidates = [self._candidates(level, partial(self._make_policy, learner, level)) for level in LEVELS]
        return Account(name, candidates, copies, learner)

    def _candidates(self, level: int, make_policy: Callable[[], EvictionPolicy]) -> Candidates:
        return Candidates(level, make_policy, protects=self._protects, is_protected=self._is_protected)


def _earliest(models: Sequence[Candidates], *, spare_protected: bool) -> Node | None:
    """Take the node with the earliest date of those that the models' policies would choose.

    The dates that policies tell are never later than the true ones. So what turns out to have a later one than another
    may have is offered again, as it is, and the other one looked at.
    """
    if len(models) == 1:
        return models[0].take(spare_protected=spare_protected)
    while True:
        dates = [
            (date, at)
            for at, one in enumerate(models)
            if (date := one.next_date(spare_protected=spare_protected)) is not None
        ]
        if not dates:
            return None
        chosen = models[min(dates)[1]]
        node = chosen.take(spare_protected=spare_protected)
        if node is None:
            continue
        date = chosen.date(node)
        if all(date <= other for other, at in dates if models[at] is not chosen):
            return node
        chosen.offer(node)

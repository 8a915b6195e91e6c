"""What each model holds of each local tier, and what it may hold: quotas, in encoded bytes, exactly.

One account per model name, so that the revisions of a model share one. It is charged for what is entered in the index
(`bytes`) and for what was allocated and is not entered yet (`in_flight`). What is leased cannot be evicted, so it could
take what is guaranteed to others. Therefore what models have leased or in flight beyond their own guarantees, all of
them together, stays within what is guaranteed to nobody. (A bound for each model alone would not do: two could take it
together.) Leases are counted only while something is guaranteed to somebody, since a match pays for it.

Guarded by the index's lock; only `kvpool.prefix` writes the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from kvpool.prefix.candidates import Candidates, EvictionPolicy
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
        "leased",
        "matched_blocks",
        "name",
        "quotas",
    )

    def __init__(self, name: str, candidates: list[Candidates]) -> None:
        self.name = name
        self.candidates = candidates
        self.quotas = [Quota() for _ in LEVELS]
        self.bytes = [0, 0, 0]
        self.copies = [0, 0, 0]
        """How many blocks have a copy at each level."""
        self.in_flight = [0, 0, 0]
        self.leased = [0, 0, 0]
        """Bytes of copies that a lease holds; 0 while the ledger does not guard."""
        self.asked_blocks = 0
        self.matched_blocks = 0

    def excess(self, level: int) -> int:
        """Bytes above what is guaranteed; negative below."""
        return self.bytes[level] - self.quotas[level].guaranteed

    def surplus(self, level: int) -> int:
        """Bytes that it holds fast above what is guaranteed to it; negative below."""
        return self.leased[level] + self.in_flight[level] - self.quotas[level].guaranteed

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
        make_policy: Callable[[], EvictionPolicy],
        *,
        protects: Callable[[int], bool],
        is_protected: Callable[[Node], bool],
    ) -> None:
        self.accounts: dict[str, Account] = {}
        self.capacities = [UNLIMITED, UNLIMITED, UNLIMITED]
        self.guards = False
        """Whether anything is guaranteed to anybody, so that leased bytes are counted."""
        self._quotas: Quotas = {}
        self._guaranteed = [0, 0, 0]
        self._make_policy = make_policy
        self._protects = protects
        self._is_protected = is_protected

    def account(self, name: str) -> Account:
        """The account of this model, opened if need be."""
        known = self.accounts.get(name)
        if known is None:
            known = self.accounts[name] = Account(name, [self._candidates(level) for level in LEVELS])
            self._apply(known)
        return known

    def set_quotas(self, quotas: Quotas) -> None:
        """Replace all quotas. What a model holds beyond is for the caller to evict."""
        self._quotas = quotas
        for account in self.accounts.values():
            self._apply(account)
        for level in LEVELS:
            self._guaranteed[level] = sum(by_level.get(level, Quota()).guaranteed for by_level in quotas.values())
        self.guards = any(self._guaranteed)

    def overdraft(self, account: Account, level: int) -> int:
        """How many bytes the account holds fast of what is guaranteed to others."""
        return min(max(0, account.surplus(level)), max(0, -self.headroom(account, level)))

    def headroom(self, account: Account, level: int) -> int:
        """How many bytes more the account may hold fast: leased, or in flight."""
        others = sum(max(0, other.surplus(level)) for other in self.accounts.values() if other is not account)
        return self.capacities[level] - self._guaranteed[level] - others - account.surplus(level)

    def charge(self, account: Account, level: int, sizes: Sequence[int]) -> tuple[int, Grant]:
        """Charge records of these sizes that are about to be allocated: how many of them, and why not all."""
        room, why = account.room(level), Grant.OVER_LIMIT
        if self.guards and (headroom := self.headroom(account, level)) < room:
            room, why = headroom, Grant.OTHERS_GUARANTEE
        charged = granted = 0
        for nbytes in sizes:
            if charged + nbytes > room:
                break
            charged += nbytes
            granted += 1
        account.in_flight[level] += charged
        return granted, Grant.GIVEN if granted == len(sizes) else why

    def victim(self, level: int, requester: Account | None, *, spare_protected: bool) -> Node | None:
        """Take the node that should lose its last block at `level`, no longer on offer; None when none may.

        Where something is guaranteed at this level, one of a model as far as possible above its guarantee, never of one
        within it, but of the requester: it may always give up its own. Else the one used longest ago.
        """
        accounts = [account for account in self.accounts.values() if account.bytes[level]]
        if not self._guaranteed[level]:
            return _oldest([account.candidates[level] for account in accounts], spare_protected=spare_protected)
        able = [account for account in accounts if account.excess(level) > 0 or account is requester]
        for account in sorted(able, key=lambda account: (account.excess(level) <= 0, -account.excess(level))):
            node = account.candidates[level].take(spare_protected=spare_protected)
            if node is not None:
                return node
        return None

    def over_limit(self, level: int) -> list[tuple[Account, int]]:
        """Who holds more than its limit, and by how many bytes."""
        return [(account, -account.room(level)) for account in self.accounts.values() if account.room(level) < 0]

    def close(self, name: str) -> None:
        """Close an account that holds nothing."""
        account = self.accounts.get(name)
        if account is not None and not any((*account.copies, *account.in_flight)):
            del self.accounts[name]

    def _apply(self, account: Account) -> None:
        by_level = self._quotas.get(account.name, {})
        account.quotas = [by_level.get(level, Quota()) for level in LEVELS]

    def _candidates(self, level: int) -> Candidates:
        return Candidates(level, self._make_policy, protects=self._protects, is_protected=self._is_protected)


def _oldest(models: Sequence[Candidates], *, spare_protected: bool) -> Node | None:
    """Take the node used longest ago of those that the models' policies would choose.

    The ages that policies tell are never later than the true ones. So what turns out to be younger than another may be
    is offered again, at its true age, and the other one looked at.
    """
    if len(models) == 1:
        return models[0].take(spare_protected=spare_protected)
    while True:
        ages = [
            (age, at)
            for at, one in enumerate(models)
            if (age := one.next_age(spare_protected=spare_protected)) is not None
        ]
        if not ages:
            return None
        chosen = models[min(ages)[1]]
        node = chosen.take(spare_protected=spare_protected)
        if node is None:
            continue
        age = node.used_at(len(node.places[chosen.level] or ()) - 1)
        if all(age <= other for other, at in ages if models[at] is not chosen):
            return node
        chosen.offer(node)

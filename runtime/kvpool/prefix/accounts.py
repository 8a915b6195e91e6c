"""What each model holds of each local tier, and what it may hold: quotas, in encoded bytes, exactly.

One account per model name, so that the revisions of a model share one. It is charged for what is entered in the index
(`bytes`) and for what was allocated and is not entered yet (`in_flight`). What is leased cannot be evicted, so it could
take what is guaranteed to others. Therefore what models have leased or in flight beyond their own guarantees, all of
them together, stays within what is guaranteed to nobody. (A bound for each model alone would not do: two could take it
together.) Leases are counted only while something is guaranteed to somebody, since a match pays for it.

Guarded by the index's lock; only `kvpool.prefix` writes the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    __slots__ = ("bytes", "candidates", "copies", "in_flight", "leased", "name", "quotas")

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

    def excess(self, level: int) -> int:
        """Bytes above what is guaranteed; negative below."""
        return self.bytes[level] - self.quotas[level].guaranteed

    def surplus(self, level: int, nbytes: int = 0) -> int:
        """Bytes that it holds fast, with `nbytes` more, above what is guaranteed to it; negative below."""
        return self.leased[level] + self.in_flight[level] + nbytes - self.quotas[level].guaranteed

    def room(self, level: int) -> int:
        """Bytes left to its limit; negative above it."""
        return self.quotas[level].limit - self.bytes[level] - self.in_flight[level]


class Grant(Enum):
    """Whether a model may have more bytes of a tier."""

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

    def overdraft(self, account: Account, level: int, nbytes: int = 0) -> int:
        """By how many bytes the account, with `nbytes` more, would hold fast what is guaranteed to others."""
        own = account.surplus(level, nbytes)
        if own <= 0:
            return 0
        others = sum(max(0, other.surplus(level)) for other in self.accounts.values() if other is not account)
        return min(own, max(0, own + others + self._guaranteed[level] - self.capacities[level]))

    def grant(self, account: Account, level: int, nbytes: int) -> Grant:
        """Charge `nbytes` that are about to be allocated, if the account may have them."""
        if account.room(level) < nbytes:
            return Grant.OVER_LIMIT
        if self.guards and self.overdraft(account, level, nbytes):
            return Grant.OTHERS_GUARANTEE
        account.in_flight[level] += nbytes
        return Grant.GIVEN

    def victims(self, level: int, requester: Account | None) -> list[Account]:
        """Whose blocks may go, in the order in which they should.

        Where something is guaranteed at this level, those furthest above their guarantee first, and those within it not
        at all, but the requester: it may always give up its own. Else whose next victim is the oldest.
        """
        accounts = [account for account in self.accounts.values() if account.bytes[level]]
        if self._guaranteed[level]:
            able = [account for account in accounts if account.excess(level) > 0 or account is requester]
            return sorted(able, key=lambda account: (account.excess(level) <= 0, -account.excess(level)))
        if len(accounts) > 1:
            accounts.sort(key=lambda account: _age(account.candidates[level]))
        return accounts

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


def _age(candidates: Candidates) -> tuple[bool, int]:
    """Of the victim that the policy would choose next; a model without one comes last."""
    age = candidates.next_age()
    return (age is None, age or 0)

"""Keeps models within their limits in a tier that has none of its own: what this process has put there, by model.

The server evicts by its own rules, across all models; so each process keeps to the limits for what it writes itself,
and removes a model's oldest records before it writes more. What it has written is remembered for as long as it is kept
there: in memory, so after a restart it begins with nothing, and what it wrote before goes with its TTL.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.record import Buffer
from kvpool.tiers.tier import Found, Inquiry, KeyedTier, Moved, Sealed, TierName, Usage

MAX_RECORDS = 200_000
"""That are remembered for one model; beyond it the oldest go from the tier too."""


class Limit(NamedTuple):
    """What the models of one name may have in a tier, together."""

    name: str
    nbytes: int


class _Kept(NamedTuple):
    found: Found
    tree: TreeId
    until_s: float


class _Held:
    """What one model has, least recently written or used first."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.records: OrderedDict[tuple[BlockKey, int], _Kept] = OrderedDict()

    def note(self, kept: _Kept) -> None:
        known = (kept.found.key, kept.found.codec)
        self.forget(known)
        self.records[known] = kept
        self.nbytes += kept.found.record_bytes

    def forget(self, known: tuple[BlockKey, int]) -> None:
        gone = self.records.pop(known, None)
        if gone is not None:
            self.nbytes -= gone.found.record_bytes

    def oldest(self) -> _Kept:
        return next(iter(self.records.values()))


class LimitedTier:
    """A `KeyedTier` over another, which is written within limits. `ttl_s` is how long that keeps what it is given."""

    def __init__(
        self, tier: KeyedTier, *, ttl_s: Callable[[], float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name: TierName = tier.name
        self._tier = tier
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._limits: Mapping[Fingerprint, Limit] = {}
        self._held: defaultdict[str, _Held] = defaultdict(_Held)

    def set_limits(self, limits: Mapping[Fingerprint, Limit]) -> None:
        """Replace all limits. A lower one is brought about by the next records of that model."""
        with self._lock:
            self._limits = limits
            names = {limit.name for limit in limits.values()}
            for name in [name for name in self._held if name not in names]:
                del self._held[name]

    def used_bytes(self, name: str) -> int:
        """What is remembered of a model that has a limit."""
        with self._lock:
            return self._held[name].nbytes if name in self._held else 0

    def find(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[Found | None]:
        """As `KeyedTier` says."""
        return self._tier.find(tree, keys, codecs)

    def inquire(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> Inquiry:
        """As `KeyedTier` says."""
        return self._tier.inquire(tree, keys, codecs)

    def get(self, tree: TreeId, wanted: Sequence[Found], into: Sequence[Buffer]) -> Moved:
        """As `KeyedTier` says."""
        moved = self._tier.get(tree, wanted, into)
        self._keep_longer(
            tree, [(found.key, found.codec) for found, done in zip(wanted, moved.done, strict=True) if done]
        )
        return moved

    def put(self, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey]) -> Moved:
        """As `KeyedTier` says. From the first record on that is above the model's limit alone, none is taken."""
        limit = self._limits.get(tree.fingerprint)
        if limit is None:
            return self._tier.put(tree, records, ancestors)
        fitting = list(records)
        while fitting and sum(len(record.record) for record in fitting) > limit.nbytes:
            fitting.pop()
        leaving = self._make_room(limit, {(record.key, record.codec) for record in fitting}, fitting)
        for kept in leaving:
            self._tier.drop(kept.tree, [kept.found])
        moved = self._tier.put(tree, fitting, ancestors)
        self._note(limit, tree, fitting, moved.done, ancestors)
        return Moved(moved.done + [False] * (len(records) - len(fitting)), moved.fault)

    def touch(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        """As `KeyedTier` says."""
        self._tier.touch(tree, keys, codecs)
        self._keep_longer(tree, [(key, codec) for key in keys for codec in codecs])

    def drop(self, tree: TreeId, found: Sequence[Found]) -> None:
        """As `KeyedTier` says."""
        self._tier.drop(tree, found)
        limit = self._limits.get(tree.fingerprint)
        if limit is not None:
            with self._lock:
                for one in found:
                    self._held[limit.name].forget((one.key, one.codec))

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """As `KeyedTier` says."""
        removed = self._tier.erase(tenant, before_epoch)
        with self._lock:
            for held in self._held.values():
                gone = [
                    known
                    for known, kept in held.records.items()
                    if kept.tree.tenant == tenant and kept.tree.epoch < before_epoch
                ]
                for known in gone:
                    held.forget(known)
        return removed

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """As `KeyedTier` says."""
        removed = self._tier.forget_model(fingerprint)
        with self._lock:
            for held in self._held.values():
                for known in [known for known, kept in held.records.items() if kept.tree.fingerprint == fingerprint]:
                    held.forget(known)
        return removed

    def usage(self) -> Usage:
        """As `KeyedTier` says."""
        return self._tier.usage()

    def close(self) -> None:
        """As `KeyedTier` says."""
        self._tier.close()

    def _make_room(self, limit: Limit, coming: set[tuple[BlockKey, int]], records: Sequence[Sealed]) -> list[_Kept]:
        """Forget what has to go, oldest first, before so much comes; what of it is in the tier still."""
        needed = sum(len(record.record) for record in records)
        now = self._clock()
        leaving: list[_Kept] = []
        with self._lock:
            held = self._held[limit.name]
            for known in coming:
                held.forget(known)
            while held.records:
                oldest = held.oldest()
                is_over = oldest.until_s <= now
                fits = held.nbytes + needed <= limit.nbytes and len(held.records) + len(records) <= MAX_RECORDS
                if fits and not is_over:
                    break
                held.forget((oldest.found.key, oldest.found.codec))
                if not is_over:
                    leaving.append(oldest)
        return leaving

    def _note(
        self, limit: Limit, tree: TreeId, records: Sequence[Sealed], done: Sequence[bool], ancestors: Sequence[BlockKey]
    ) -> None:
        """Remember what was taken: children before parents, so that parents go later."""
        until_s = self._clock() + self._ttl_s()
        with self._lock:
            held = self._held[limit.name]
            for record, was_taken in reversed(list(zip(records, done, strict=True))):
                if was_taken:
                    held.note(_Kept(Found(record.key, record.codec, len(record.record)), tree, until_s))
            self._renew(held, [(key, record.codec) for record in records[:1] for key in ancestors], until_s)

    def _keep_longer(self, tree: TreeId, known: Sequence[tuple[BlockKey, int]]) -> None:
        limit = self._limits.get(tree.fingerprint)
        if limit is not None:
            with self._lock:
                self._renew(self._held[limit.name], known, self._clock() + self._ttl_s())

    @staticmethod
    def _renew(held: _Held, known: Sequence[tuple[BlockKey, int]], until_s: float) -> None:
        """These consecutive blocks, first to last, are kept as if written now; the last of them is the oldest."""
        for one in reversed(known):
            kept = held.records.get(one)
            if kept is not None:
                held.note(kept._replace(until_s=until_s))

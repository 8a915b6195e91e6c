"""Removes from shared tiers what was erased: records of a tenant's earlier epochs, or of a model.

They cannot be matched from the moment the epoch was raised; this is about the bytes. A tier that is out is cleared when
it is back. Each is cleared a second time after a while, for a process that had not heard of the erasure may have been
writing still. What is pending is not kept over a restart: then records of Dragonfly go with their TTL, and those in the
database when they are the oldest, or when the tenant is erased again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvpool.blocks.identity import Fingerprint, TenantDigest
from kvpool.pool.remote.store import RemoteStore
from kvpool.tiers.tier import KeyedTier, TierName

AGAIN_S = 10.0
"""Later than any process follows the authority, and finishes a write that it had begun."""
MAX_PENDING = 10_000
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Erasure:
    """One thing that is to go, and from where still."""

    remove: Callable[[KeyedTier], int]
    first: set[TierName]
    """Tiers that were not cleared at all yet."""
    again: dict[TierName, float]
    """Tiers that are to be cleared once more, and when."""
    removed: dict[TierName, int] = field(default_factory=dict)
    cleared: threading.Event = field(default_factory=threading.Event)
    """Set when each tier was cleared once."""


class Eraser:
    """The erasures of one pool. `step` is a chore; everything else may be called from any thread."""

    def __init__(self, stores: Sequence[RemoteStore], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stores = stores
        self._clock = clock
        self._pending: list[Erasure] = []
        self._lock = threading.Lock()
        self.wake: Callable[[], None] = lambda: None
        """Has `step` run soon."""

    @property
    def pending(self) -> int:
        """Erasures that have not been carried out everywhere, twice."""
        return len(self._pending)

    def erase_tenant(self, tenant: TenantDigest, before_epoch: int) -> Erasure:
        """Remove a tenant's records of earlier epochs."""
        return self._begin(lambda tier: tier.erase(tenant, before_epoch))

    def forget_model(self, fingerprint: Fingerprint) -> Erasure:
        """Remove a model's records."""
        return self._begin(lambda tier: tier.forget_model(fingerprint))

    def step(self) -> None:
        """Carry out what can be carried out now."""
        with self._lock:
            pending = list(self._pending)
        for erasure in pending:
            for store in self._stores:
                self._clear(erasure, store)
            if not erasure.first:
                erasure.cleared.set()
        with self._lock:
            self._pending = [erasure for erasure in self._pending if erasure.first or erasure.again]

    def _begin(self, remove: Callable[[KeyedTier], int]) -> Erasure:
        erasure = Erasure(remove, {store.name for store in self._stores}, {})
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                _log.warning("too many erasures are pending: the oldest one's records go with their time only")
                self._pending.pop(0)
            self._pending.append(erasure)
        self.wake()
        return erasure

    def _clear(self, erasure: Erasure, store: RemoteStore) -> None:
        name, now = store.name, self._clock()
        if name not in erasure.first and erasure.again.get(name, float("inf")) > now:
            return
        removed = store.remove(erasure.remove)
        if removed is None:
            return
        erasure.removed[name] = erasure.removed.get(name, 0) + removed
        if name in erasure.first:
            erasure.first.discard(name)
            erasure.again[name] = now + AGAIN_S
        else:
            del erasure.again[name]

"""Keeps the epochs of this node in step with those of all others.

PostgreSQL is the authority, where the configuration has one: what it knows is taken over, what only this node knows is
told to it, and the heartbeat says how far this node is. Until it has answered once since the pool was opened, nobody
can know what was erased meanwhile: nothing older is matched, and nothing is written outside of this process. Dragonfly
keeps hints, for pools without an authority and for the moments in which it is away: a higher one is believed, none
says nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING
from uuid import UUID

from kvpool.blocks.identity import ALL_TENANTS, TenantDigest
from kvpool.pool.epochs import Epochs
from kvpool.tiers.tier import TierUnavailableError

if TYPE_CHECKING:
    from kvpool.catalog.authority import Authority
    from kvpool.tiers.dragonfly.tier import DragonflyTier

HEARTBEAT_EVERY_S = 10.0
"""How often a node says that it lives; that it knows of a change, at once."""
HINT_EVERY_S = 5.0
HINTS_AT_ONCE = 256
"""That are looked at in one go of a chore: a round trip each."""
MAX_HINTED = 10_000
"""Tenants whose hint was looked at lately; beyond it they are looked at again."""
_log = logging.getLogger(__name__)


class EpochSync:
    """One for a pool. `adopted` is called when epochs were raised from outside, before that is durable."""

    def __init__(
        self,
        epochs: Epochs,
        node: UUID,
        name: str,
        *,
        adopted: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.authority: Authority | None = None
        """None: the configuration has none. Set before the pool is open."""
        self.hints: DragonflyTier | None = None
        """None: there is no dragonfly tier, or not now."""
        self.reached = False
        """Whether the authority has answered since the pool was opened."""
        self._epochs = epochs
        self._node = node
        self._name = name
        self._adopted = adopted
        self._clock = clock
        self._lock = threading.Lock()
        self._sequence = 0
        self._confirmed = -1
        self._heartbeat_due_s = 0.0
        self._told: dict[TenantDigest, int] = {}
        """What the authority is known to know."""
        self._hinted: dict[TenantDigest, float] = {}
        self._unnoted: dict[TenantDigest, int] = {}
        """Hints that could not be noted, as far as there is room for them."""

    @property
    def trusted(self) -> bool:
        """Whether what older blocks there are may be matched, and new ones written outside of this process."""
        return self.authority is None or self.reached

    def step(self) -> None:
        """Take over what changed, tell what is not known there, and say that this node lives.

        Raises `TierUnavailableError`, and `OSError` where what was taken over cannot be made durable: then it is not
        confirmed.
        """
        authority = self.authority
        if authority is None:
            return
        with self._lock:
            epochs, sequence = authority.changes_since(self._sequence)
            self._told.update(epochs)
            self._adopt(dict(epochs))
            self.reached = True
            for tenant, epoch in self._untold().items():
                self._told[tenant] = authority.raise_epoch(tenant, epoch).epoch
            self._sequence = sequence
            now = self._clock()
            if sequence != self._confirmed or now >= self._heartbeat_due_s:
                authority.heartbeat(self._node, self._name, sequence)
                self._confirmed, self._heartbeat_due_s = sequence, now + HEARTBEAT_EVERY_S

    def tell(self, tenant: TenantDigest, epoch: int) -> int | None:
        """Raise an epoch everywhere; the number of the change, None where the authority could not be told now.

        It is told as soon as it can be. Its epoch may turn out to be higher, which is taken over.
        """
        self._hint(tenant, epoch)
        authority = self.authority
        if authority is None:
            return None
        try:
            raised = authority.raise_epoch(tenant, epoch)
        except TierUnavailableError as error:
            _log.warning("the epoch of an erased tenant could not be told to the catalog yet: %s", error.reason)
            return None
        with self._lock:
            self._told[tenant] = raised.epoch
        self._adopt({tenant: raised.epoch})
        return raised.sequence

    def unconfirmed(self, sequence: int) -> list[str]:
        """The other nodes that have not said that they know of a change, by name. Raises `TierUnavailableError`."""
        authority = self.authority
        nodes = [] if authority is None else authority.unconfirmed(sequence)
        return [
            f"{node.name}{' (silent)' if node.silent else ''}" for node in nodes if node.node != self._node
        ]  # fmt: skip

    def look_at_hint(self, tenant: TenantDigest) -> None:
        """Take a tenant's hint over if it is higher than what is known here; looks no more often than is of use.

        Raises `TierUnavailableError`.
        """
        hints = self.hints
        now = self._clock()
        if hints is None or now < self._hinted.get(tenant, float("-inf")) + HINT_EVERY_S:
            return
        if len(self._hinted) >= MAX_HINTED:
            self._hinted = {}
        self._hinted[tenant] = now
        hint = hints.epoch_hint(tenant)
        if hint is None:
            return
        try:
            self._adopt({tenant: hint})
        except OSError as error:  # it counts from now on all the same, and is made durable with the next one
            _log.warning("the epoch of an erased tenant cannot be kept: %s", error)

    def follow_hints(self, tenants: Iterable[TenantDigest]) -> None:
        """Without an authority, look at what is noted of these tenants, as far as it is time. For a chore.

        Raises `TierUnavailableError`.
        """
        if self.authority is not None:
            return
        now = self._clock()
        due = (tenant for tenant in tenants if now >= self._hinted.get(tenant, float("-inf")) + HINT_EVERY_S)
        for tenant in islice(due, HINTS_AT_ONCE):
            self.look_at_hint(tenant)

    def note_hints(self) -> None:
        """Note in dragonfly what could not be noted before. Raises `TierUnavailableError`."""
        hints = self.hints
        if hints is None:
            return
        for tenant in list(self._unnoted):
            epoch = self._unnoted.pop(tenant)
            try:
                hints.note_epoch(tenant, epoch)
            except TierUnavailableError:
                self._unnoted.setdefault(tenant, epoch)  # unless a higher one came meanwhile
                raise

    def _hint(self, tenant: TenantDigest, epoch: int) -> None:
        try:
            if self.hints is not None:
                self.hints.note_epoch(tenant, epoch)
                return
        except TierUnavailableError as error:
            _log.warning("the epoch of an erased tenant could not be noted in dragonfly yet: %s", error.reason)
        if len(self._unnoted) < MAX_HINTED:
            self._unnoted[tenant] = epoch

    def _adopt(self, epochs: Mapping[TenantDigest, int]) -> None:
        """Take higher epochs over: at once, so that nothing older is matched, and durably.

        Raises `OSError` where that cannot be; then it is tried again with the next ones.
        """
        raised = [
            self._epochs.floor_at_least(epoch) if tenant == ALL_TENANTS else self._epochs.at_least(tenant, epoch)
            for tenant, epoch in epochs.items()
        ]
        if any(raised):
            self._adopted()
        if self._epochs.trusted:  # else they are replaced as a whole soon, by one that is above all of these
            self._epochs.save()

    def _untold(self) -> dict[TenantDigest, int]:
        """The epochs that are higher here than they are there."""
        floor, own = self._epochs.known()
        told_floor = self._told.get(ALL_TENANTS, 0)
        untold = {tenant: epoch for tenant, epoch in own.items() if epoch > max(self._told.get(tenant, 0), told_floor)}
        if floor > told_floor:
            untold[ALL_TENANTS] = floor
        return untold

"""The ssd tier as the engine uses it: it may be absent, stall or fail, and none of that reaches a caller.

Reads and writes have a breaker each, for a full disk can still be read. A tier that could not be opened is tried again
by `reopen`. Counters are of the whole life of the pool.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kvpool.blocks.record import Buffer
from kvpool.pool.costs import TierCosts
from kvpool.resilience import BreakerState, CircuitBreaker
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

_log = logging.getLogger(__name__)


class SsdStore:
    """Guards one `SsdTier`. `open_tier` None: the configuration has no ssd tier."""

    def __init__(
        self,
        open_tier: Callable[[], SsdTier] | None,
        *,
        reads: CircuitBreaker,
        writes: CircuitBreaker,
        costs: TierCosts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier: SsdTier | None = None
        self.reads = reads
        self.writes = writes
        self.costs = costs
        self.corrupt: Counter[str] = Counter()
        """Records that were not what was asked for, by reason."""
        self.last_progress = 0.0
        """When a read ended last, on `clock`."""
        self.last_error = ""
        self.clock = clock
        self._open_tier = open_tier
        self._lock = threading.Lock()
        self._refused_no_room = 0

    @property
    def configured(self) -> bool:
        """Whether the pool is to have an ssd tier at all."""
        return self._open_tier is not None

    @property
    def degraded(self) -> bool:
        """Whether it is to have one, and cannot use it fully now."""
        return self.configured and (self.tier is None or not (_closed(self.reads) and _closed(self.writes)))

    @property
    def writable(self) -> bool:
        """Whether writing is worth a try."""
        return self.tier is not None and self.writes.state is not BreakerState.OPEN

    def reopen(self) -> SsdTier | None:
        """Open the tier if it is not; None when it cannot be. Raises `IncompatibleDataError`, `DirectoryInUseError`."""
        if self._open_tier is None or self.tier is not None:
            return self.tier
        try:
            self.tier = self._open_tier()
        except TierUnavailableError as error:
            self._failed(self.writes, error.reason, at_once=True)
            return None
        self.writes.succeeded()
        return self.tier

    def read(self, places: Sequence[int], buffers: Sequence[Buffer]) -> list[bool]:
        """Read records; False for each that is not to be had, for whatever reason. Blocks: for reader threads only."""
        tier = self.tier
        if tier is None:
            return [False] * len(places)
        started = self.clock()
        try:
            arrived = tier.get(places, buffers)
        except TierUnavailableError as error:
            self._failed(self.reads, error.reason, at_once=True)
            return [False] * len(places)
        now = self.last_progress = self.clock()
        if any(arrived):
            self.reads.succeeded()
            came = sum(len(buffer) for buffer, ok in zip(buffers, arrived, strict=True) if ok)
            self.costs.observe(came, now - started)
        else:
            self._failed(self.reads, "read error")
        return arrived

    def write(self, records: Sequence[Buffer], *, reclaim: bool = False) -> list[int | None]:
        """Write sealed records; None for each that was not written. Blocks: for background threads only."""
        tier = self.tier
        if tier is None:
            return [None] * len(records)
        try:
            places = tier.put(records, reclaim=reclaim)
        except TierUnavailableError as error:
            self._failed(self.writes, error.reason, at_once=True)
            return [None] * len(records)
        self.writes.succeeded()
        return places

    def ran_out_of_room(self) -> bool:
        """Whether a write was refused for want of room, not of daily budget, since this was asked last."""
        if self.tier is None:
            return False
        refused = self.tier.stats().refused_no_room
        with self._lock:
            before, self._refused_no_room = self._refused_no_room, refused
        return refused > before

    def drop(self, places: Sequence[int]) -> None:
        """Forget records."""
        if self.tier is not None and places:
            self.tier.drop(places)

    def count_corrupt(self, reason: str, place: int) -> None:
        """Count a record that was not what was asked for, and say so."""
        with self._lock:
            self.corrupt[reason] += 1
        _log.warning("ssd tier: the record at %#x is dropped: %s", place, reason)

    def stalled(self, budget_s: float) -> None:
        """No read has made progress for `budget_s`: ask no more until a probe succeeds."""
        self._failed(self.reads, f"no progress for {budget_s * 1000:.0f} ms", at_once=True)

    def _failed(self, breaker: CircuitBreaker, reason: str, *, at_once: bool = False) -> None:
        self.last_error = reason
        was_closed = breaker.state is BreakerState.CLOSED
        if at_once:
            breaker.trip(reason)
        else:
            breaker.failed(reason)
        if was_closed and breaker.state is BreakerState.OPEN:
            _log.warning("ssd tier: %s; not used until a probe succeeds", reason)


def _closed(breaker: CircuitBreaker) -> bool:
    return breaker.state is BreakerState.CLOSED

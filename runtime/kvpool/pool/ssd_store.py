"""The ssd tier as the engine uses it: it may be absent, stall or fail, and none of that reaches a caller.

Reads and writes have a breaker each, for a full disk can still be read. A record that cannot be read is a miss and says
nothing of the disk; a disk that cannot be read is `TierOutError`. A tier that could not be opened is tried again with
`open`, and is used by others from `publish` on. Counters are of the whole life of the pool.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kvpool.blocks.record import Buffer
from kvpool.config import SsdConfig
from kvpool.pool.costs import TierCosts
from kvpool.resilience import BreakerState, CircuitBreaker
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

WRITE_BUDGET_S = 10.0
"""A write that takes longer stands for a disk that has stalled."""
REFUSAL_S = 5.0
"""How long nothing is offered to a tier that refused a block since its daily budget is spent."""
_log = logging.getLogger(__name__)


class TierOutError(Exception):
    """The disk as a whole cannot be read now."""


class SsdStore:
    """Guards one `SsdTier`. `config` None: there is to be none."""

    def __init__(
        self,
        open_tier: Callable[[SsdConfig], SsdTier],
        config: SsdConfig | None,
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
        self._config = config
        self._opened: SsdTier | None = None
        self._lock = threading.Lock()
        self._refused_no_room = 0
        self._refusing_until = 0.0
        self._writing_since: dict[int, float] = {}
        """Per thread that writes now: since when."""

    @property
    def configured(self) -> bool:
        """Whether the pool is to have an ssd tier at all."""
        return self._config is not None

    @property
    def readable(self) -> bool:
        """Whether what lies there can be promised."""
        return self.reads.state is BreakerState.CLOSED

    @property
    def refusing(self) -> bool:
        """Whether it has refused a block a moment ago."""
        return self.clock() < self._refusing_until

    @property
    def writable(self) -> bool:
        """Whether writing is worth a try."""
        return self.tier is not None and self.writes.state is not BreakerState.OPEN and not self.refusing

    @property
    def degraded(self) -> bool:
        """Whether there is to be a tier, and it cannot be used fully now."""
        out = self.tier is None or not self.readable or self.writes.state is BreakerState.OPEN
        return self.configured and out

    def open(self) -> SsdTier | None:
        """Open the tier, for nobody else yet; None when it cannot be opened now, or there is to be none.

        Raises `IncompatibleDataError`, `DirectoryInUseError` and `ConfigError`.
        """
        if self._config is None:
            return None
        try:
            self._opened = self._open_tier(self._config)
        except TierUnavailableError as error:
            self._trip(self.writes, error.reason)
            return None
        return self._opened

    def publish(self, tier: SsdTier) -> None:
        """Let everybody use a tier all of whose records are in the index."""
        self.tier = tier
        self.writes.succeeded()

    def resize(self, config: SsdConfig) -> None:
        """Take over capacity and daily budget. Raises `ConfigError` for sizes that cannot work, before any change."""
        tier = self._opened
        if tier is None:
            self._config = config
            return
        try:
            if config.capacity_bytes != tier.capacity_bytes:
                tier.resize(config.capacity_bytes)
            tier.set_daily_write_bytes(config.daily_write_bytes)
        except TierUnavailableError as error:  # it has the new capacity, and gives files up as it can
            self._trip(self.writes, error.reason)
        self._config = config
        self.accept()

    def read(self, places: Sequence[int], buffers: Sequence[Buffer]) -> list[bool]:
        """Read records; False for each that cannot be had. Raises `TierOutError`.

        Blocks: for background threads only.
        """
        tier = self.tier
        if tier is None:
            raise TierOutError("it is not open")
        started = self.clock()
        try:
            arrived = tier.get(places, buffers)
        except TierUnavailableError as error:
            self._trip(self.reads, error.reason)
            raise TierOutError(error.reason) from error
        now = self.last_progress = self.clock()
        self.reads.succeeded()
        came = sum(len(buffer) for buffer, ok in zip(buffers, arrived, strict=True) if ok)
        self.costs.observe(came, now - started)
        return arrived

    def write(self, records: Sequence[Buffer], *, reclaim: bool = False, guaranteed: bool = False) -> list[int | None]:
        """Write sealed records; None for each that was not written. Blocks: for background threads only.

        `reclaim` and `guaranteed` as in `SsdTier.put`.
        """
        tier = self.tier
        if tier is None:
            return [None] * len(records)
        thread = threading.get_ident()
        self._writing_since[thread] = self.clock()
        try:
            places = tier.put(records, reclaim=reclaim, guaranteed=guaranteed)
        except TierUnavailableError as error:
            self._trip(self.writes, error.reason)
            return [None] * len(records)
        finally:
            del self._writing_since[thread]
        self.writes.succeeded()
        return places

    def check_writes(self) -> None:
        """Notice a write that has stalled: a writer that is stuck cannot say so itself."""
        oldest = min(list(self._writing_since.values()), default=None)
        if oldest is not None and self.clock() - oldest > WRITE_BUDGET_S:
            self._trip(self.writes, f"a write has been in flight for more than {WRITE_BUDGET_S:.0f} s")

    def ran_out_of_room(self) -> bool:
        """Whether a write was refused for want of room, not of daily budget, since this was asked last."""
        if self.tier is None:
            return False
        refused = self.tier.stats().refused_no_room
        with self._lock:
            before, self._refused_no_room = self._refused_no_room, refused
        return refused > before

    def refuse(self) -> None:
        """The daily budget is spent: offer nothing for a moment, for each block would be checksummed in vain."""
        self._refusing_until = self.clock() + REFUSAL_S

    def accept(self) -> None:
        """Offer blocks again, whatever was refused."""
        self._refusing_until = 0.0

    def drop(self, places: Sequence[int]) -> None:
        """Forget records; those of a tier that is being restored, too."""
        if self._opened is not None and places:
            self._opened.drop(places)

    def count_corrupt(self, reason: str, place: int) -> None:
        """Count a record that was not what was asked for, and say so."""
        with self._lock:
            self.corrupt[reason] += 1
        _log.warning("ssd tier: the record at %#x is dropped: %s", place, reason)

    def stalled(self, budget_s: float) -> None:
        """No read has made progress for `budget_s`: ask no more until a probe succeeds."""
        self._trip(self.reads, f"no progress for {budget_s * 1000:.0f} ms")

    def _trip(self, breaker: CircuitBreaker, reason: str) -> None:
        self.last_error = reason
        was_closed = breaker.state is BreakerState.CLOSED
        breaker.trip(reason)
        if was_closed:
            _log.warning("ssd tier: %s; not used until a probe succeeds", reason)

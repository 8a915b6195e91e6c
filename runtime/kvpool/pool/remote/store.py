"""One keyed tier as the engine uses it: it may be absent, stall or fail, and none of that reaches a caller.

A tier that fails as a whole is out at once, and costs nobody anything until a probe of the housekeeper's has succeeded.
One that answers, but does not take what it is given (it is full, or read-only), is still read; after a while the next
record is offered to it again. What may be in flight is bounded in bytes. Counters are of the whole life of the pool.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.record import CODEC_NONE, Buffer
from kvpool.pool.costs import TierCosts
from kvpool.resilience import BreakerLimits, BreakerState, Bulkhead, CircuitBreaker
from kvpool.tiers.tier import (
    Found,
    Inquiry,
    KeyedTier,
    Moved,
    Sealed,
    TierBusyError,
    TierName,
    TierUnavailableError,
    Usage,
)

IN_FLIGHT_BYTES = 256 << 20
"""What may be on its way to or from one tier."""
LIMITS = BreakerLimits(failures=1, first_backoff_s=0.5, last_backoff_s=3.0)
"""One failure is enough, for a tier says no more than once a budget that it is out; back within seconds."""
USAGE_EVERY_S = 5.0
DOUBTED_S = 5.0
_NOBODY = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)
_NOTHING = BlockKey(bytes(16))
_log = logging.getLogger(__name__)


class RemoteStore:
    """Guards one `KeyedTier`. Safe from any thread; calls that ask the tier wait for it, at most for its budget."""

    def __init__(
        self,
        name: TierName,
        *,
        breaker: CircuitBreaker | None = None,
        writes: CircuitBreaker | None = None,
        bulkhead: Bulkhead | None = None,
        costs: TierCosts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.breaker = breaker or CircuitBreaker(LIMITS)
        """Of the tier as a whole."""
        self.writes = writes or CircuitBreaker(LIMITS)
        """Of a tier that answers."""
        self.returned = 0
        """How often it began to take blocks, or may do so, that it had not taken for a while."""
        self.bulkhead = bulkhead or Bulkhead(IN_FLIGHT_BYTES)
        self.costs = costs or TierCosts()
        self.last_error = "not connected yet"
        self.corrupt: Counter[str] = Counter()
        """Records that were not what was asked for, by reason."""
        self.busy = 0
        """Calls for which all connections were in use for too long."""
        self.found_blocks = 0
        self.fetched_blocks = 0
        self.fetched_bytes = 0
        self.stored_blocks = 0
        self.stored_bytes = 0
        self.usage = Usage(0, 0)
        """As it was a few seconds ago."""
        self._usage_due_s = 0.0
        self._offered_s = 0.0
        """When a tier that took no changes was to be offered the next one again."""
        self._tier: KeyedTier | None = None
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def tier(self) -> KeyedTier | None:
        """The tier itself; None while there is none to be used."""
        return self._tier

    @property
    def usable(self) -> bool:
        """Whether asking it is worth a try."""
        return self._tier is not None and self.breaker.state is BreakerState.CLOSED

    @property
    def writable(self) -> bool:
        """Whether giving it something is worth a try."""
        return self.usable and self.writes.state is not BreakerState.OPEN

    @property
    def degraded(self) -> bool:
        """Whether it cannot be used fully now.

        One that did not take changes, and is to be offered the next one, is for a while longer: until it has taken it,
        or nobody has had anything for it.
        """
        return not self.writable or (
            self.writes.state is BreakerState.HALF_OPEN and self._clock() < self._offered_s + DOUBTED_S
        )

    def publish(self, tier: KeyedTier) -> None:
        """Let everybody use the tier."""
        self._tier = tier
        self.breaker.succeeded()
        self.last_error = ""
        self.returned += 1

    def withdraw(self, reason: str) -> KeyedTier | None:
        """Let nobody use it any more; returned for the caller to close."""
        tier, self._tier = self._tier, None
        self.last_error = reason
        return tier

    def find(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[Found | None]:
        """Which of these blocks it has, as `KeyedTier.find`; none where it is out."""
        with closing(self.inquire(tree, keys, codecs)) as question:
            return question.answer()

    def inquire(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> Question:
        """Ask what `find` asks; the answer is waited for later, so that several tiers are asked at once."""
        tier = self._tier
        inquiry = None
        if tier is not None and keys and self.breaker.state is BreakerState.CLOSED:
            try:
                inquiry = tier.inquire(tree, keys, codecs)
            except TierUnavailableError as error:
                self.failed(error)
        return Question(self, inquiry, len(keys))

    def count_found(self, blocks: int) -> None:
        """Count blocks that the tier said it has."""
        with self._lock:
            self.found_blocks += blocks

    def get(self, tree: TreeId, wanted: Sequence[Found], into: Sequence[Buffer]) -> list[bool]:
        """Copy records into buffers; False for each that did not come whole. The caller verifies them."""
        nbytes = sum(found.record_bytes for found in wanted)
        if not self.usable or not self.bulkhead.enter(nbytes):
            return [False] * len(wanted)
        started = self._clock()
        try:
            moved = self._moved(lambda tier: tier.get(tree, wanted, into), len(wanted))
        finally:
            self.bulkhead.leave(nbytes)
        if moved.fault:
            self.fell_out(moved.fault)
        came = sum(found.record_bytes for found, done in zip(wanted, moved.done, strict=True) if done)
        if came:
            self.costs.observe(came, self._clock() - started)
        with self._lock:
            self.fetched_blocks += moved.done.count(True)
            self.fetched_bytes += came
        return moved.done

    def put(self, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey]) -> list[bool]:
        """Store records; False for each that was not taken."""
        nbytes = sum(len(sealed.record) for sealed in records)
        if not self.writable or not self.bulkhead.enter(nbytes):
            return [False] * len(records)
        try:
            moved = self._moved(lambda tier: tier.put(tree, records, ancestors), len(records))
        finally:
            self.bulkhead.leave(nbytes)
        if moved.fault:
            self.refused_a_change(moved.fault)
        elif any(moved.done) and self.writes.state is not BreakerState.CLOSED:
            self._takes_changes_again()
        taken = [len(sealed.record) for sealed, done in zip(records, moved.done, strict=True) if done]
        with self._lock:
            self.stored_blocks += len(taken)
            self.stored_bytes += sum(taken)
        return moved.done

    def touch(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        """Keep these blocks as if written now, if the tier takes changes."""
        self.change(lambda tier: tier.touch(tree, keys, codecs))

    def drop(self, tree: TreeId, found: Sequence[Found]) -> None:
        """Remove records, if the tier takes changes."""
        self.change(lambda tier: tier.drop(tree, found))

    def remove(self, remove: Callable[[KeyedTier], int]) -> int | None:
        """Remove many records; how many those were, None where the tier takes no changes."""
        removed: list[int] = []
        self.change(lambda tier: removed.append(remove(tier)))
        return removed[0] if removed else None

    def attempt(self, call: Callable[[KeyedTier], None]) -> None:
        """Ask the tier for something else, if it can be asked. Changes nothing there."""
        tier = self._tier
        if tier is None or self.breaker.state is not BreakerState.CLOSED:
            return
        try:
            call(tier)
        except TierUnavailableError as error:
            self.failed(error)

    def change(self, call: Callable[[KeyedTier], None]) -> None:
        """Change something in the tier, if it takes changes."""
        tier = self._tier
        if tier is None or not self.writable:
            return
        try:
            call(tier)
        except TierBusyError as error:
            self.failed(error)
        except TierUnavailableError as error:
            self.refused_a_change(error.reason)

    def count_corrupt(self, reason: str, key: BlockKey) -> None:
        """Count a record that was not what was asked for, and say so."""
        with self._lock:
            self.corrupt[reason] += 1
        _log.warning("%s tier: the record of block %s is dropped: %s", self.name, key.hex(), reason)

    def failed(self, error: TierUnavailableError) -> None:
        """A question was not answered: the tier is out, unless there were just too many questions."""
        if isinstance(error, TierBusyError):
            with self._lock:
                self.busy += 1
        else:
            self.fell_out(error.reason)

    def fell_out(self, reason: str) -> None:
        """The tier as a whole cannot be used now."""
        self.last_error = reason
        was_closed = self.breaker.state is BreakerState.CLOSED
        self.breaker.trip(reason)
        if was_closed:
            _log.warning("%s tier: %s; not used until a probe succeeds", self.name, reason)

    def refused_a_change(self, reason: str) -> None:
        """It did not do what changes something there. Waits, for at most its budget, to see whether it answers."""
        tier = self._tier
        if tier is None or not self.usable:
            return
        try:
            tier.find(_NOBODY, [_NOTHING], [CODEC_NONE])
        except TierBusyError:
            return
        except TierUnavailableError:
            self.fell_out(reason)
            return
        self.last_error = reason
        was_closed = self.writes.state is BreakerState.CLOSED
        self.writes.trip(reason)
        if was_closed:
            _log.warning("%s tier: %s; read, but not written until it takes something again", self.name, reason)

    def probe(self) -> None:
        """If it is out, and it is time, see whether it answers again. Waits for at most the tier's budget."""
        tier = self._tier
        if tier is None or self.breaker.state is BreakerState.CLOSED or not self.breaker.allows():
            return
        try:
            tier.find(_NOBODY, [_NOTHING], [CODEC_NONE])
        except TierUnavailableError as error:
            self.last_error = error.reason
            self.breaker.failed(error.reason)
        else:
            self.breaker.succeeded()
            self.returned += 1
            _log.info("%s tier: in use again", self.name)

    def let_changes_through(self) -> None:
        """If it has refused changes, and it is time, let the next ones see whether it takes them again."""
        if self.writes.state is BreakerState.OPEN and self.writes.allows():
            self._offered_s = self._clock()
            self.returned += 1

    def note_usage(self) -> None:
        """Ask how full it is, if it can be asked, and not more often than is of use."""
        now = self._clock()
        if now < self._usage_due_s or not self.usable:
            return
        self._usage_due_s = now + USAGE_EVERY_S
        self.attempt(self._take_usage)

    def _take_usage(self, tier: KeyedTier) -> None:
        self.usage = tier.usage()

    def _moved(self, call: Callable[[KeyedTier], Moved], count: int) -> Moved:
        tier = self._tier
        if tier is None:
            return Moved([False] * count)
        try:
            return call(tier)
        except TierBusyError as error:
            self.failed(error)
            return Moved([False] * count)
        except TierUnavailableError as error:
            return Moved([False] * count, error.reason)

    def _takes_changes_again(self) -> None:
        self.writes.succeeded()
        self.last_error = ""
        self.returned += 1
        _log.info("%s tier: written again", self.name)


class Question:
    """What a store was asked. For one thread; ends with `close`."""

    __slots__ = ("_blocks", "_inquiry", "_store")

    def __init__(self, store: RemoteStore, inquiry: Inquiry | None, blocks: int) -> None:
        self._store, self._inquiry, self._blocks = store, inquiry, blocks

    def answer(self) -> list[Found | None]:
        """Wait for the answer, at most for the tier's budget; none where it is out."""
        nothing: list[Found | None] = [None] * self._blocks
        if self._inquiry is None:
            return nothing
        try:
            found = self._inquiry.answer()
        except TierUnavailableError as error:
            self._store.failed(error)
            return nothing
        there = self._blocks - found.count(None)
        if there:
            self._store.count_found(there)
        return found

    def close(self) -> None:
        """Give up what is not answered."""
        if self._inquiry is not None:
            self._inquiry.close()

"""Remembers prompts as they are asked for, and says which past ones a new prompt is like.

`observe` is called by whoever serves a request, and costs nothing there; a thread of the predictor's own encodes and
stores. `similar` waits, at most for its deadline, and so belongs on a background thread. Faults are counted and end
here: while the store is away, prompts are not remembered and nothing is like anything.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding import HashedNgrams, PromptEncoder
from kvpool.catalog.vectors.contract import Hit, Point, PromptVectors, VectorsUnavailableError, point_id
from kvpool.catalog.vectors.followers import FollowerBook
from kvpool.resilience import CircuitBreaker

MAX_QUEUED_BYTES = 64 << 20
MAX_READY_POINTS = 2_048
_STORED_AT_ONCE = 64
_PAUSE_S = 1.0
"""So often points are stored that are too few for a batch, or could not be stored before."""
_PATIENCE_MS = 60_000
"""A prompt that nobody follows for so long is stored without."""
_MOST_ERASED_TENANTS = 10_000

_log = logging.getLogger(__name__)


class PredictorStats(NamedTuple):
    """What became of prompts and questions since the start."""

    observed: int
    stored: int
    dropped: int
    """Prompts that came too fast, or could not be stored for too long: the oldest of them."""
    searches: int
    failed: int
    """Searches that were not answered in time, or not asked while the store was known to be away."""
    waiting: int
    """Prompts that are not stored yet."""


class _Observed(NamedTuple):
    tokens: bytes
    tree: TreeId
    leaf: BlockKey
    blocks: int
    at_ms: int


class SemanticPredictor:
    """Safe from any thread. Owns a thread; `vectors` are the caller's, who closes them afterwards."""

    def __init__(
        self,
        vectors: PromptVectors,
        *,
        encoder: PromptEncoder | None = None,
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.breaker = breaker or CircuitBreaker()
        """Stands before the store, for searches and for what is stored; open: no-qdrant."""
        self._vectors = vectors
        self._encoder = encoder or HashedNgrams()
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[_Observed] = deque()
        self._queued_bytes = 0
        self._flushing = False
        self._closed = False
        self._observed = self._stored = self._dropped = self._searches = self._failed = 0
        self._points = threading.Lock()
        """Held from when an observation is taken from the queue until it is stored, so that an erasure misses none.

        Taken before `_changed`.
        """
        self._book = FollowerBook()
        self._ready: deque[Point] = deque()
        self._held = 0
        self._erased: OrderedDict[TenantDigest, int] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="kvpool-predictor", daemon=True)
        self._thread.start()

    def observe(self, tokens: bytes, tree: TreeId, leaf: BlockKey, blocks: int) -> None:
        """A prompt was asked for: int32 token ids, of which `blocks` whole blocks end with `leaf`. Never waits."""
        observed = _Observed(tokens, tree, leaf, blocks, self._now_ms())
        with self._changed:
            if self._closed:
                return
            self._observed += 1
            self._queue.append(observed)
            self._queued_bytes += len(tokens)
            while self._queued_bytes > MAX_QUEUED_BYTES:
                self._queued_bytes -= len(self._queue.popleft().tokens)
                self._dropped += 1
            self._changed.notify_all()

    def similar(self, tokens: bytes, tree: TreeId, k: int = 10, *, deadline_s: float = 0.05) -> list[Hit]:
        """At most `k` past prompts of this tree that are like this one, best first; none where that is not known."""
        self._searches += 1
        if not self.breaker.allows():
            self._failed += 1
            return []
        began_s = time.monotonic()
        try:
            hits = self._vectors.search(self._encoder.encode(tokens), tree, k, deadline_s=deadline_s)
        except VectorsUnavailableError as error:
            self._failed += 1
            self._report(error)
            return []
        except BaseException:
            self.breaker.failed("the encoder, or the store, raised")  # a probe must be reported
            raise
        self.breaker.succeeded(time.monotonic() - began_s)
        return hits

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """Forget a tenant's prompts of earlier epochs, also those not stored yet, or to come; how many were stored.

        Raises `VectorsUnavailableError`: then it is to be tried again.
        """
        with self._points:
            self._erased[tenant] = max(before_epoch, self._erased.get(tenant, 0))
            self._erased.move_to_end(tenant)
            if len(self._erased) > _MOST_ERASED_TENANTS:
                self._erased.popitem(last=False)
            return self._vectors.erase(tenant, before_epoch)

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """Forget a model's prompts, also those not stored yet; how many were stored. Raises as `erase` does."""
        with self._points:
            with self._changed:
                self._queue = deque(one for one in self._queue if one.tree.fingerprint != fingerprint)
                self._queued_bytes = sum(len(one.tokens) for one in self._queue)
            self._book.forget_model(fingerprint)
            self._ready = deque(point for point in self._ready if point.tree.fingerprint != fingerprint)
            return self._vectors.forget_model(fingerprint)

    def flush(self, deadline_s: float) -> bool:
        """Store what waits, also for followers; whether all of it was stored in time."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or not self._flushing, deadline_s)
            stored, self._flushing = not self._flushing and not self._closed, False
            return stored

    def stats(self) -> PredictorStats:
        """Counters."""
        waiting = len(self._queue) + self._held
        return PredictorStats(self._observed, self._stored, self._dropped, self._searches, self._failed, waiting)

    def close(self, deadline_s: float = 5.0) -> None:
        """Store what waits, if that can be done in time, and end the thread. Safe to call again."""
        self.flush(deadline_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._flushing or self._closed, _PAUSE_S)
                if self._closed:
                    return
            with self._points:
                flushed = self._work()
            with self._changed:
                if flushed:
                    self._flushing = False
                    self._changed.notify_all()
                elif self._flushing and not self._queue:
                    self._changed.wait_for(lambda: self._closed, _PAUSE_S)

    def _work(self) -> bool:
        """Make and store points; whether nothing is left, where that was asked for."""
        with self._changed:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), _STORED_AT_ONCE))]
            self._queued_bytes -= sum(len(observed.tokens) for observed in batch)
            flushing = self._flushing and not self._queue
        try:
            self._make_points(batch, all_of_them=flushing)
            self._store(all_of_them=flushing or not batch)
        except Exception:  # of an encoder that is not ours, say: what it fails on is not tried for ever
            _log.exception("%d prompts could not be remembered", len(batch) + len(self._ready))
            self._dropped += len(batch) + len(self._ready)
            self._ready.clear()
        self._held = len(self._book) + len(self._ready)
        return flushing and not self._ready

    def _make_points(self, batch: Iterable[_Observed], *, all_of_them: bool) -> None:
        for observed in batch:
            self._ready += self._book.add(
                Point(
                    id=point_id(observed.leaf),
                    vector=self._encoder.encode(observed.tokens),
                    tree=observed.tree,
                    leaf=observed.leaf,
                    blocks=observed.blocks,
                    tokens=len(observed.tokens) // 4,
                    at_ms=observed.at_ms,
                )
            )
        now_ms = self._now_ms()
        self._ready += self._book.take(now_ms + 1 if all_of_them else now_ms - _PATIENCE_MS)
        while len(self._ready) > MAX_READY_POINTS:
            self._ready.popleft()
            self._dropped += 1

    def _store(self, *, all_of_them: bool) -> None:
        while self._ready and not self._closed and (all_of_them or len(self._ready) >= _STORED_AT_ONCE):
            batch = [self._ready[at] for at in range(min(len(self._ready), _STORED_AT_ONCE))]
            alive = [point for point in batch if point.tree.epoch >= self._erased.get(point.tree.tenant, 0)]
            if alive:
                if not self.breaker.allows():
                    return
                began_s = time.monotonic()
                try:
                    self._vectors.upsert(alive)
                except VectorsUnavailableError as error:
                    self._report(error)
                    return
                self.breaker.succeeded(time.monotonic() - began_s)
            self._stored += len(alive)
            for _ in batch:
                self._ready.popleft()

    def _report(self, error: VectorsUnavailableError) -> None:
        if error.reason != self.breaker.last_error:
            _log.warning("prompts' vectors cannot be used: %s", error.reason)
        self.breaker.trip(error.reason)

    def _now_ms(self) -> int:
        return int(self._clock() * 1_000)

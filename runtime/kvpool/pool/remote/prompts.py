"""Remembers prompts by their vectors, so that those which are like another are found: Qdrant, and a thread before it.

A store leaves a parcel in a bounded queue and is done; encoding and sending are this thread's. A Qdrant that fails is
left alone until it is time to try again; what is stored meanwhile waits, the latest of it, and the rest is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding.encoder import PromptEncoder
from kvpool.catalog.vectors.contract import BATCH_POINTS, Hit, Point, PromptVectors, VectorsUnavailableError, point_id
from kvpool.prefix import sending
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.sending import Parcel
from kvpool.resilience import BreakerLimits, BreakerState, CircuitBreaker

EVERY_S = 0.5
CONNECT_S = 5.0
"""How long a question waits for the first connection of a pool that was opened just now."""
MAX_QUEUED = 10_000
LIMITS = BreakerLimits(failures=1, first_backoff_s=1.0, last_backoff_s=10.0)
_log = logging.getLogger(__name__)


class PromptMemory:
    """One for a pool with Qdrant. `open_vectors` connects, or starts, what remembers; raises as its calls do."""

    def __init__(
        self,
        index: PrefixIndex,
        encoder: PromptEncoder,
        open_vectors: Callable[[], PromptVectors],
        *,
        is_trusted: Callable[[], bool],
    ) -> None:
        self.breaker = CircuitBreaker(LIMITS)
        self.last_error = "not connected yet"
        self.remembered = 0
        """Prompts that were remembered, and not known before or stored anew."""
        self.dropped = 0
        """Prompts that were not, since Qdrant was away for so long that too many waited."""
        self.encoder = encoder
        self._index = index
        self._open_vectors = open_vectors
        self._is_trusted = is_trusted
        self._vectors: PromptVectors | None = None
        self._queue: deque[Parcel] = deque()
        self._erasures: deque[tuple[TenantDigest, int]] = deque(maxlen=MAX_QUEUED)
        self._tried = threading.Event()
        """Set once it was tried to connect."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpool-prompts", daemon=True)

    @property
    def usable(self) -> bool:
        """Whether it can be asked."""
        return self._vectors is not None and self.breaker.state is BreakerState.CLOSED

    def start(self) -> None:
        """Connect, and begin."""
        self._thread.start()

    def stored(self, parcel: Parcel) -> None:
        """A prompt was stored. Never waits."""
        if len(self._queue) >= MAX_QUEUED:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(parcel)

    def similar(self, tokens: bytes, tree: TreeId, count: int, *, deadline_s: float) -> list[Hit]:
        """The `count` prompts of the same model and tenant that are most like these tokens, best first.

        Raises `VectorsUnavailableError`.
        """
        self._tried.wait(CONNECT_S)
        vectors = self._vectors
        if vectors is None or not self.usable:
            raise VectorsUnavailableError(self.last_error)
        try:
            return vectors.search(self.encoder.encode(tokens), tree, count, deadline_s=deadline_s)
        except VectorsUnavailableError as error:
            self._fell_out(error.reason)
            raise

    def erase(self, tenant: TenantDigest, before_epoch: int) -> None:
        """Forget a tenant's prompts of earlier epochs, as soon as that can be done. Never waits."""
        self._erasures.append((tenant, before_epoch))

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """Forget a model's prompts; how many. Raises `VectorsUnavailableError`."""
        return 0 if self._vectors is None else self._vectors.forget_model(fingerprint)

    def close(self, until_s: float) -> None:
        """Remember what is queued, and end; `until_s` is on `time.monotonic`."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until_s - time.monotonic()))
        vectors, self._vectors = self._vectors, None
        if vectors is not None:
            vectors.close()

    def _run(self) -> None:
        self._turn()
        self._tried.set()
        while not self._closed.wait(EVERY_S):
            self._turn()
        self._turn()

    def _turn(self) -> None:
        try:
            if self._vectors is None:
                self._connect()
            elif self.breaker.state is not BreakerState.CLOSED and self.breaker.allows():
                self._vectors.count()
                self.breaker.succeeded()
                _log.info("qdrant: in use again")
            if self.usable:
                self._erase()
                self._remember()
        except VectorsUnavailableError as error:
            self._fell_out(error.reason)
        except Exception as error:  # the thread's top: the next turn may do better
            _log.exception("remembering prompts")
            self._fell_out(f"{type(error).__name__}: {error}")

    def _connect(self) -> None:
        if self._is_trusted() and self.breaker.allows():
            self._vectors = self._open_vectors()
            self.breaker.succeeded()
            self.last_error = ""

    def _erase(self) -> None:
        assert self._vectors is not None
        while self._erasures:
            tenant, before_epoch = self._erasures[0]
            self._vectors.erase(tenant, before_epoch)
            self._erasures.popleft()

    def _remember(self) -> None:
        assert self._vectors is not None
        while self._queue:
            points = self._points()
            if points:
                self._vectors.upsert(points)
                self.remembered += len(points)

    def _points(self) -> list[Point]:
        """What is queued, a batch of it, encoded; of several parcels of one prompt's the last."""
        found: dict[BlockKey, Point] = {}
        for _ in range(min(len(self._queue), BATCH_POINTS)):
            parcel = self._queue.popleft()
            known = sending.chain(self._index, parcel)
            tokens = sending.tokens(self._index, parcel)
            if known is None or not known[1] or not tokens:
                continue
            tree, keys = known
            found[keys[-1]] = Point(
                id=point_id(keys[-1]),
                vector=self.encoder.encode(tokens),
                tree=tree,
                leaf=keys[-1],
                blocks=len(keys),
                tokens=len(tokens) // 4,
                at_ms=time.time_ns() // 1_000_000,
            )
        return list(found.values())

    def _fell_out(self, reason: str) -> None:
        self.last_error = reason
        was_closed = self.breaker.state is BreakerState.CLOSED
        self.breaker.trip(reason)
        if was_closed:
            _log.warning("qdrant: %s; not used until it answers again", reason)

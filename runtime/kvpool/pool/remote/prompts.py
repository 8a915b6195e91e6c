"""Remembers prompts by their vectors, so that those which are like another are found: Qdrant, and a thread before it.

Who serves a request leaves its prompt in a bounded queue and is done. While Qdrant is away the latest prompts wait, and
the rest is counted. What connects to it, or starts it, is tried again until it succeeds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from kvpool.blocks.identity import BlockKey, TenantDigest, TreeId
from kvpool.catalog.embedding.encoder import PromptEncoder
from kvpool.catalog.vectors.contract import Hit, PromptVectors, VectorsUnavailableError
from kvpool.catalog.vectors.predictor import SemanticPredictor
from kvpool.prefix import sending
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.sending import Parcel
from kvpool.resilience import BreakerLimits, BreakerState, CircuitBreaker

EVERY_S = 0.5
MAX_QUEUED = 10_000
MAX_PLACES = 100_000
CONNECT_S = 5.0
"""How long a question waits for the first connection of a pool that was opened just now."""
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
        self.encoder = encoder
        self._index = index
        self._open_vectors = open_vectors
        self._is_trusted = is_trusted
        self._fault = "not connected yet"
        self._vectors: PromptVectors | None = None
        self._predictor: SemanticPredictor | None = None
        self._queue: deque[Parcel] = deque()
        self._places: OrderedDict[BlockKey, Parcel] = OrderedDict()
        self._dropped = 0
        self._erasures: deque[tuple[TenantDigest, int]] = deque(maxlen=MAX_QUEUED)
        self._tried = threading.Event()
        """Set once it was tried to connect."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpool-prompts", daemon=True)

    @property
    def usable(self) -> bool:
        """Whether it can be asked."""
        return self._predictor is not None and self.breaker.state is BreakerState.CLOSED

    @property
    def last_error(self) -> str:
        """What was the matter last; empty where nothing ever was."""
        return self._fault or self.breaker.last_error or ""

    @property
    def remembered(self) -> int:
        """Prompts that were remembered; one that is asked for again counts again."""
        return 0 if self._predictor is None else self._predictor.stats().stored

    @property
    def dropped(self) -> int:
        """Prompts that were not, since too many waited."""
        return self._dropped + (0 if self._predictor is None else self._predictor.stats().dropped)

    def start(self) -> None:
        """Connect, and begin."""
        self._thread.start()

    def asked(self, parcel: Parcel) -> None:
        """A prompt was asked for. Never waits."""
        if len(self._queue) >= MAX_QUEUED:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(parcel)

    def similar(self, tokens: bytes, tree: TreeId, count: int, *, deadline_s: float) -> list[Hit]:
        """The `count` prompts of the same model and tenant that are most like these tokens, best first.

        Raises `VectorsUnavailableError`.
        """
        self._tried.wait(CONNECT_S)
        vectors = self._vectors
        if vectors is None or self.breaker.state is not BreakerState.CLOSED:
            raise VectorsUnavailableError(self.last_error)
        try:
            return vectors.search(self.encoder.encode(tokens), tree, count, deadline_s=deadline_s)
        except VectorsUnavailableError as error:
            self.breaker.trip(error.reason)
            raise

    def likely(self, tokens: bytes, tree: TreeId, count: int, *, deadline_s: float) -> list[Hit]:
        """As `similar`; none where that cannot be said now."""
        predictor = self._predictor
        return [] if predictor is None else predictor.similar(tokens, tree, count, deadline_s=deadline_s)

    def place_of(self, leaf: BlockKey) -> Parcel | None:
        """Where in the tree the prompt that ends in this block is; None where it was not asked for here lately."""
        return self._places.get(leaf)

    def erase(self, tenant: TenantDigest, before_epoch: int) -> None:
        """Forget a tenant's prompts of earlier epochs, as soon as that can be done. Never waits."""
        self._erasures.append((tenant, before_epoch))

    def flush(self, deadline_s: float) -> bool:
        """Wait until all that was asked for by now is remembered; False at the deadline, and where it cannot be."""
        until_s = time.monotonic() + deadline_s
        self._tried.wait(deadline_s)
        predictor = self._predictor
        if predictor is None:
            return False
        self._hand_over(predictor)
        return predictor.flush(max(0.0, until_s - time.monotonic()))

    def close(self, until_s: float) -> None:
        """Remember what is queued, and end; `until_s` is on `time.monotonic`."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until_s - time.monotonic()))
        predictor, self._predictor = self._predictor, None
        vectors, self._vectors = self._vectors, None
        if predictor is not None:
            self._hand_over(predictor)
            predictor.close(max(0.0, min(2.0, until_s - time.monotonic())))
        if vectors is not None:
            vectors.close()

    def _run(self) -> None:
        self._turn()
        self._tried.set()
        while not self._closed.wait(EVERY_S):
            self._turn()

    def _turn(self) -> None:
        try:
            if self._predictor is None:
                self._connect()
            if self._predictor is not None:
                if self.breaker.state is not BreakerState.CLOSED and self.breaker.allows():
                    self._probe()
                self._erase(self._predictor)
                self._hand_over(self._predictor)
        except VectorsUnavailableError as error:
            self._fell_out(error.reason)
        except Exception as error:  # the thread's top: the next turn may do better
            _log.exception("remembering prompts")
            self._fell_out(f"{type(error).__name__}: {error}")

    def _connect(self) -> None:
        if self._is_trusted() and self.breaker.allows():
            self._vectors = self._open_vectors()
            self.breaker.succeeded()
            self._predictor = SemanticPredictor(self._vectors, encoder=self.encoder, breaker=self.breaker)
            self._fault = ""

    def _probe(self) -> None:
        assert self._vectors is not None
        self._vectors.count()
        self.breaker.succeeded()
        _log.info("qdrant: in use again")

    def _erase(self, predictor: SemanticPredictor) -> None:
        while self._erasures and self.breaker.state is BreakerState.CLOSED:
            predictor.erase(*self._erasures[0])
            self._erasures.popleft()

    def _hand_over(self, predictor: SemanticPredictor) -> None:
        for _ in range(len(self._queue)):
            try:
                parcel = self._queue.popleft()
            except IndexError:  # another thread was quicker
                return
            known, tokens = sending.chain(self._index, parcel), sending.tokens(self._index, parcel)
            if known is not None and known[1] and tokens:
                tree, keys = known
                self._places[keys[-1]] = parcel
                self._places.move_to_end(keys[-1])
                if len(self._places) > MAX_PLACES:
                    self._places.popitem(last=False)
                predictor.observe(tokens, tree, keys[-1], len(keys))

    def _fell_out(self, reason: str) -> None:
        was_closed = self.breaker.state is BreakerState.CLOSED
        if self._predictor is None:
            self._fault = reason
        self.breaker.trip(reason)
        if was_closed:
            _log.warning("qdrant: %s; not used until it answers again", reason)

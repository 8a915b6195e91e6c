"""What happens to blocks, told to whoever wants to know: the shape of vLLM's KV events.

Delivery is on a thread of each listener's own, so that a slow or failing listener holds nobody up. Each has a bounded
queue; when it overflows the oldest events are dropped, and the gap shows in `Event.sequence`.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvpool.blocks.identity import BlockKey, Fingerprint
from kvpool.blocks.record import Head
from kvpool.prefix.history import Loss
from kvpool.prefix.index import LEVEL_NAMES
from kvpool.tiers.tier import TierName

QUEUE_BYTES = 16 << 20
"""What the token ids and keys in one listener's queue may take."""
_EVENT_BYTES = 500
"""About what an event takes beside those."""
_log = logging.getLogger(__name__)


class BlockStored(NamedTuple):
    """Consecutive blocks have a copy on `medium` now. `parent` is the key of the block before the first."""

    keys: tuple[BlockKey, ...]
    parent: BlockKey
    tokens: bytes
    """Token ids of all blocks, int32; empty for a further copy on a slower medium."""
    block_tokens: int
    fingerprint: Fingerprint
    medium: TierName


class BlockRemoved(NamedTuple):
    """These blocks have no copy on `medium` any more."""

    keys: tuple[BlockKey, ...]
    medium: TierName


class Event(NamedTuple):
    """One event. Sequence numbers of one listener go up by one; a jump means that some were dropped."""

    sequence: int
    what: BlockStored | BlockRemoved


Listener = Callable[[Event], None]


class Form(NamedTuple):
    """How a block's record is in a tier."""

    codec: int
    record_bytes: int


Tap = Callable[[Sequence[Head], TierName, Sequence[Form] | None], None]
"""Told of blocks of one prompt that have a copy in a tier now; forms None: as they were stored first."""


class EventBus:
    """Hands events to listeners. Safe from any thread."""

    def __init__(self) -> None:
        self.listened = False
        """Whether anybody listens: events need not be made otherwise."""
        self.tap: Tap | None = None
        """Told at once, in the thread of who publishes; set before the pool is open."""
        self._lock = threading.Lock()
        self._subscriptions: list[_Subscription] = []

    @property
    def active(self) -> bool:
        """Whether copies are to be published: somebody listens, or there is a tap."""
        return self.listened or self.tap is not None

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every event from now on; returns what ends that, once all queued events are told."""
        subscription = _Subscription(listener)
        with self._lock:
            self._subscriptions = [*self._subscriptions, subscription]
            self.listened = True

        def unsubscribe() -> None:
            with self._lock:
                self._subscriptions = [other for other in self._subscriptions if other is not subscription]
                self.listened = bool(self._subscriptions)
            subscription.close()

        return unsubscribe

    def publish(self, what: BlockStored | BlockRemoved) -> None:
        """Queue an event for every listener; never waits."""
        for subscription in self._subscriptions:
            subscription.put(what)

    def publish_stored(self, heads: Sequence[Head], medium: TierName, forms: Sequence[Form] | None = None) -> None:
        """Queue that these blocks of one prompt have a copy on `medium` now: an event for each run without a gap.

        `forms` are those of the copies, in the blocks' order; None: as they were stored first.
        """
        if self.tap is not None:
            self.tap(heads, medium, forms)
        for run in chains(heads) if self._subscriptions else ():
            tokens = b"" if medium is TierName.SSD else b"".join(head.tokens for head in run)
            keys, first = tuple(head.key for head in run), run[0]
            self.publish(BlockStored(keys, first.parent, tokens, len(first.tokens) // 4, first.fingerprint, medium))

    def publish_removed(self, level: int, keys: Sequence[BlockKey], _: Loss) -> None:
        """Queue that these blocks have no copy at `level` any more; the index calls this, its lock held."""
        if self.listened:
            self.publish(BlockRemoved(tuple(keys), TierName(LEVEL_NAMES[level])))

    def close(self) -> None:
        """Deliver what is queued, and end all subscriptions."""
        with self._lock:
            subscriptions, self._subscriptions = self._subscriptions, []
            self.listened = False
        for subscription in subscriptions:
            subscription.close()


class _Subscription:
    CLOSE_SECONDS = 5.0

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._queue: deque[Event] = deque()
        self._queued_bytes = 0
        self._ready = threading.Condition()
        self._sequence = 0
        self._closed = False
        self._thread = threading.Thread(target=self._deliver, name="kvpool-events", daemon=True)
        self._thread.start()

    def put(self, what: BlockStored | BlockRemoved) -> None:
        with self._ready:
            self._queue.append(Event(self._sequence, what))
            self._sequence += 1
            self._queued_bytes += _size(what)
            while self._queued_bytes > QUEUE_BYTES and len(self._queue) > 1:
                self._queued_bytes -= _size(self._queue.popleft().what)
            self._ready.notify()

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._ready.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.CLOSE_SECONDS)

    def _deliver(self) -> None:
        while True:
            with self._ready:
                while not self._queue and not self._closed:
                    self._ready.wait()
                if not self._queue:
                    return
                event = self._queue.popleft()
                self._queued_bytes -= _size(event.what)
            try:
                self._listener(event)
            except Exception:  # a listener's fault is its own
                _log.exception("a listener of pool events failed at event %d", event.sequence)


def chains(heads: Sequence[Head]) -> Iterator[list[Head]]:
    """Cut blocks of one prompt into runs in which each follows the one before."""
    run: list[Head] = []
    for head in heads:
        if run and head.parent != run[-1].key:
            yield run
            run = []
        run.append(head)
    if run:
        yield run


def _size(what: BlockStored | BlockRemoved) -> int:
    tokens = len(what.tokens) if isinstance(what, BlockStored) else 0
    return _EVENT_BYTES + tokens + 2 * sum(map(len, what.keys))

"""Sends blocks to one keyed tier behind the callers' backs, first to last, so that no child is there before its parent.

A queue of parcels, not of bytes: what waits in it stays in memory, and may be evicted from there. It is bounded; beyond
it the oldest parcels are dropped and counted, and sent when their blocks are used again. While the tier is out nothing
is queued; when it is back another round begins, in which all that is used is sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal

from kvpool.blocks.identity import BlockKey, Fingerprint, TreeId
from kvpool.blocks.record import CODEC_NONE, codec_in
from kvpool.pool.encodings import Encodings
from kvpool.pool.events import EventBus, Form
from kvpool.pool.gpu_store import GpuOutError
from kvpool.pool.remote.store import RemoteStore
from kvpool.pool.sealing import Sealer
from kvpool.prefix import saving, sending
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.saving import Run
from kvpool.prefix.sending import Parcel
from kvpool.tiers.extents import Bytes
from kvpool.tiers.tier import Sealed

MAX_QUEUED = 16_384
LINGER_S = 0.002
"""How long a thread that was idle leaves the interpreter to the caller whose store woke it."""
RUN_BYTES = 8 << 20
"""About so much is sent at once."""
_log = logging.getLogger(__name__)

Wanted = Callable[[Fingerprint], bool]
"""Whether the blocks of a model are to be sent at all."""


class Sender:
    """The queue and its threads. `level` is the tier's, for codecs."""

    def __init__(
        self,
        index: PrefixIndex,
        store: RemoteStore,
        sealer: Sealer,
        encodings: Encodings,
        events: EventBus,
        *,
        level: int,
        payload_bytes_of: Callable[[Fingerprint], int | None],
        is_wanted: Wanted,
        sends_again: Callable[[], bool],
        threads: int,
    ) -> None:
        self._index = index
        self.store = store
        self._sealer = sealer
        self._encodings = encodings
        self._events = events
        self._level = level
        self._payload_bytes_of = payload_bytes_of
        self._is_wanted = is_wanted
        self._sends_again = sends_again
        self._queue: deque[Parcel] = deque()
        self._changed = threading.Condition()
        self._active = 0
        self._closed = False
        self.dropped: Counter[str] = Counter()
        """Blocks that were to be sent and were not, by reason."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kvpool-send-{store.name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Parcels that wait."""
        return len(self._queue)

    def send(self, parcel: Parcel) -> None:
        """Send it soon. Never waits."""
        if not self.store.writable:
            self._count_dropped("tier-out", parcel.until - parcel.first)
            return
        overflow = None
        with self._changed:
            if len(self._queue) >= MAX_QUEUED:
                overflow = self._queue.popleft()
            self._queue.append(parcel)
            if len(self._queue) == 1:
                self._changed.notify()
        if overflow is not None:
            sending.not_sent(self._index, overflow)
            self._count_dropped("queue-full", overflow.until - overflow.first)

    def flush(self, deadline_s: float | None) -> bool:
        """Wait until nothing is queued or being sent; False at the deadline."""
        until = None if deadline_s is None else time.monotonic() + deadline_s
        with self._changed:
            while self._queue or self._active:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, until_s: float) -> bool:
        """Give up what is queued and end the threads; False where one has not ended at `until_s`, on `monotonic`."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (parcel := self._pop()) is not None:
            try:
                self._send(parcel)
            except Exception:  # the loop's top: the queue must go on
                _log.exception("sending blocks to %s", self.store.name)
                self._count_dropped("error", parcel.until - parcel.first)
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def _pop(self) -> Parcel | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
                if self._queue and not self._closed:
                    self._changed.wait(LINGER_S)
            if self._closed:
                return None
            self._active += 1
            return self._queue.popleft()

    def _send(self, parcel: Parcel) -> None:
        known = sending.chain(self._index, parcel)
        if known is None:
            return
        tree, keys = known
        if not self._is_wanted(tree.fingerprint):
            return
        runs = [(parcel.first, len(keys))] if parcel.is_new else _side_by_side(self._missing(tree, keys))
        while runs:
            first, until = runs.pop(0)
            while first < until:
                first, reason = self._send_run(parcel, keys, first, until)
                if reason:
                    self._count_dropped(reason, until - first + sum(end - start for start, end in runs))
                    return

    def _missing(self, tree: TreeId, keys: Sequence[BlockKey]) -> list[int]:
        """Which blocks of a prompt that was sent before are not there any more; those that are stay for longer."""
        codecs = self._codecs(tree)
        found = self.store.find(tree, keys, codecs)
        if any(found):
            self.store.touch(tree, keys, codecs)
        if not self.store.usable or not self._sends_again():
            return []
        return [at for at, block in enumerate(found) if block is None]

    def _codecs(self, tree: TreeId) -> tuple[int, ...]:
        own = self._encodings.codec(tree.fingerprint, self._level)
        return (CODEC_NONE,) if own is None else (own.number, CODEC_NONE)

    def _send_run(
        self, parcel: Parcel, keys: Sequence[BlockKey], first: int, until: int
    ) -> tuple[int, Literal["", "evicted", "gpu-unavailable", "refused", "tier-out"]]:
        """Send some blocks from `first` on; the depth reached, and why the rest is not to be sent, if it is not."""
        run = sending.begin(
            self._index, parcel, first, until, payload_bytes_of=self._payload_bytes_of, most_bytes=RUN_BYTES
        )  # fmt: skip
        if run is None:
            return first, "evicted"
        try:
            with self._sealer.sealed(run, self._level) as records:
                taken = self._put(run, records, keys[:first])
                if not records or taken < len(records):
                    return first + taken, "refused" if self.store.writable else "tier-out"
        except GpuOutError:
            return first, "gpu-unavailable"
        finally:
            saving.end(self._index, run)
        return first + taken, ""

    def _put(self, run: Run, records: list[Bytes], ancestors: Sequence[BlockKey]) -> int:
        """Put sealed records; how many leading ones were taken."""
        sealed = [
            Sealed(head.key, codec_in(record)[0], record) for head, record in zip(run.heads, records, strict=False)
        ]
        done = self.store.put(run.pin.tree.id, sealed, ancestors)
        taken = done.index(False) if False in done else len(done)
        if taken and self._events.active:
            forms = [Form(one.codec, len(one.record)) for one in sealed[:taken]]
            self._events.publish_stored(run.heads[:taken], self.store.name, forms)
        return taken

    def _count_dropped(self, reason: str, blocks: int) -> None:
        if blocks:
            with self._changed:
                self.dropped[reason] += blocks


def _side_by_side(missing: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers: the first, and the one after the last."""
    runs: list[tuple[int, int]] = []
    for at in missing:
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs

"""Writes blocks from memory to SSD behind the callers' backs, parents before children.

A queue of tree nodes, not of bytes: what waits in it stays in memory, and may be evicted from there, coldest first. So
writers that fall behind drop the coldest work, and everything that hangs on it; the index counts that. The queue is
served oldest first, which is where eviction is about to strike.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.record import codec_in
from kvpool.pool.charging import charge
from kvpool.pool.copies import Copies
from kvpool.pool.events import EventBus, Form
from kvpool.pool.gpu_store import GpuOutError
from kvpool.pool.memory import Memory
from kvpool.pool.reclaim import Reclaimer
from kvpool.pool.sealing import Sealer
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix import saving
from kvpool.prefix.accounts import Account
from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.node import SSD, Node
from kvpool.prefix.saving import Idle, Run
from kvpool.tiers.extents import Bytes
from kvpool.tiers.tier import TierName

MAX_QUEUED_NODES = 65_536
RUN_BYTES = 4 << 20
"""About so much is written at once: enough for the disk, and little enough not to keep others from the interpreter."""
_log = logging.getLogger(__name__)


class WriteBehind:
    """The queue and its writer threads. `payload_bytes_of` a model is None where the model is unknown."""

    def __init__(
        self,
        index: PrefixIndex,
        memory: Memory,
        store: SsdStore,
        copies: Copies,
        reclaimer: Reclaimer,
        events: EventBus,
        sealer: Sealer,
        *,
        payload_bytes_of: Callable[[Fingerprint], int | None],
        threads: int = 2,
    ) -> None:
        self._index = index
        self._memory = memory
        self._store = store
        self._reclaimer = reclaimer
        self._events = events
        self._sealer = sealer
        self._copies = copies
        self._payload_bytes_of = payload_bytes_of
        self._queue: deque[Node] = deque()
        self._deferred: list[Node] = []
        """Nodes that wait for another writer to finish with an ancestor."""
        self._changed = threading.Condition()
        self._active = 0
        self._closed = False
        self.saved_blocks = 0
        self.saved_bytes = 0
        self.dropped: Counter[str] = Counter()
        """Blocks that were wanted on SSD and not written, by reason; those evicted before, the index counts."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kvpool-write-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Nodes that wait."""
        return len(self._queue) + len(self._deferred)

    def want(self, pin: Pin, depth: int) -> None:
        """Have the pinned blocks before `depth` written. Never waits for I/O."""
        node = saving.want(self._index, pin, depth)
        if node is not None:
            self._push([node])

    def want_everything(self) -> None:
        """Have all that is in memory written, what was used last first, for closing may not have time for all of it."""
        with self._index.lock:
            trees = list(self._index.trees.values())
        nodes = [node for tree in trees for node in saving.want_everything(self._index, tree)]
        nodes.sort(key=lambda node: -node.last_use)
        self._push(nodes[: MAX_QUEUED_NODES - self.queued])

    def flush(self, deadline_s: float | None) -> bool:
        """Wait until nothing is queued or being written; False at the deadline."""
        until = None if deadline_s is None else time.monotonic() + deadline_s
        with self._changed:
            while self._queue or self._deferred or self._active:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, until_s: float) -> bool:
        """Give up what is queued and end the threads; False where one is stuck in a write at `until_s`, and left to it.

        `until_s` is on `time.monotonic`.
        """
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._deferred.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _push(self, nodes: Iterable[Node]) -> None:
        overflow: list[Node] = []
        with self._changed:
            self._queue.extend(nodes)
            while len(self._queue) > MAX_QUEUED_NODES:
                overflow.append(self._queue.popleft())
            self._changed.notify_all()
        for node in overflow:
            self._drop(node, "queue-full")

    def _run(self) -> None:
        while (node := self._pop()) is not None:
            idle = Idle.DONE
            try:
                idle = self._write_all(node)
            except Exception:  # the loop's top: the queue must go on
                _log.exception("writing blocks to ssd")
                self._drop(node, "error")
            self._done(node, idle)

    def _pop(self) -> Node | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._active += 1
            return self._queue.popleft()

    def _done(self, node: Node, idle: Idle) -> None:
        """Whoever waited for another writer may try again, now that one has finished."""
        with self._changed:
            self._active -= 1
            if idle is Idle.BUSY:
                self._deferred.append(node)
            if idle is Idle.DONE or not self._active:
                self._queue.extend(self._deferred)
                self._deferred.clear()
            self._changed.notify_all()

    def _write_all(self, node: Node) -> Idle:
        """Write all that is wanted of a node, and of its ancestors before it.

        Making room for the end of a long chain may have taken its beginning. That is written again, but not for ever.
        """
        written = 0
        while not self._closed:
            if not self._store.writable:
                self._drop(node, "refused" if self._store.refusing else "ssd-unavailable")
                return Idle.DONE
            self._reclaimer.make_room()  # before blocks are leased for writing: those and their ancestors cannot move
            if written > 2 * node.end:
                self._drop(node, "refused")
                return Idle.DONE
            run = saving.begin(
                self._index, node, payload_bytes_of=self._payload_bytes_of, most_bytes=RUN_BYTES
            )  # fmt: skip
            if isinstance(run, Idle):
                return run
            node = run.wanted
            written += len(run.places)
            if (reason := self._write(run)) is not None:
                self._drop(node, reason)
                return Idle.DONE
        return Idle.DONE

    def _write(self, run: Run) -> str | None:
        """Write one run; why not all of it was taken, if so."""
        written: list[int | None] = [None] * len(run.places)
        sizes: list[int] = []
        forms: list[Form] = []
        granted = 0
        try:
            with self._sealer.sealed(run) as records:
                sizes = [len(record) for record in records]
                forms = [Form(codec_in(record)[0], len(record)) for record in records] if self._events.active else []
                account = run.pin.tree.account
                granted, _ = charge(self._index, account, SSD, sizes, give_up=partial(self._give_up, account))
                if granted:
                    written[:granted] = self._append(records[:granted])
        except GpuOutError:
            return "gpu-unavailable"
        finally:
            refused = saving.finish(self._index, run, written, charged=sum(sizes[:granted]))
            self._store.drop(refused)
            self._count(run, [place in refused or place is None for place in written], sizes, forms)
            saving.end(self._index, run)
        if granted < len(sizes):
            return "over-quota"
        return "refused" if None in written else None

    def _give_up(self, account: Account, nbytes: int) -> bool:
        return self._copies.evict_own(self._index, account, SSD, nbytes)

    def _append(self, records: list[Bytes]) -> list[int | None]:
        """Write records, as far as there is room; one that finds none in the open segment has another one freed."""
        written = self._until_refused(self._store.write(records))
        if None not in written or not self._store.writable:
            return written
        if not self._store.ran_out_of_room():
            self._store.refuse()
        elif self._reclaimer.make_room_now():
            taken = written.index(None)
            written[taken:] = self._until_refused(self._store.write(records[taken:]))
        return written

    def _until_refused(self, written: list[int | None]) -> list[int | None]:
        """A chain has no gaps: what was written after a record that was not cannot be reached, and is dropped."""
        taken = written.index(None) if None in written else len(written)
        self._store.drop([place for place in written[taken:] if place is not None])
        return written[:taken] + [None] * (len(written) - taken)

    def _count(self, run: Run, missing: list[bool], sizes: list[int], forms: list[Form]) -> None:
        """While the run is leased, so that no event of its removal comes before that of its storing.

        `missing` are the blocks that were not written, or for which the index has no use any more.
        """
        saved_bytes = sum(nbytes for nbytes, is_missing in zip(sizes, missing, strict=False) if not is_missing)
        with self._changed:
            self.saved_blocks += missing.count(False)
            self.saved_bytes += saved_bytes
        saved = [at for at, is_missing in enumerate(missing) if not is_missing]
        if forms and saved:
            self._events.publish_stored([run.heads[at] for at in saved], TierName.SSD, [forms[at] for at in saved])

    def _drop(self, node: Node, reason: str) -> None:
        blocks = saving.forget(self._index, node)
        if blocks:
            with self._changed:
                self.dropped[reason] += blocks

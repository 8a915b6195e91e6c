"""Semantic prefetch: what followed prompts like the one that is asked for is brought from SSD into RAM beforehand.

A match leaves its prompt in a short queue; a thread of its own asks which past prompts are like it, and reads what the
prompts that came after them have on SSD (what those themselves have never pays: `kvpool bench prefetch`). What was
prefetched and is neither used nor evicted yet is held within a budget of bytes, and room in RAM is made as for any
other block, never at the cost of leased or guaranteed ones. Only exact prefixes are ever served, so a wrong guess costs
a read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvpool.blocks.identity import Fingerprint, TreeId
from kvpool.blocks.layout import KVLayout
from kvpool.catalog.vectors.votes import ranked
from kvpool.pool.engine import Engine
from kvpool.pool.fetch import Fetch, plan
from kvpool.pool.remote.prompts import PromptMemory
from kvpool.pool.stats import PrefetchStats
from kvpool.prefix import sending
from kvpool.prefix.index import Pin
from kvpool.prefix.node import GPU, NOWHERE, RAM, SSD, Node
from kvpool.prefix.sending import Parcel

SIMILAR = 10
SEARCH_DEADLINE_S = 0.05
MAX_QUEUED = 256
WINDOW_BYTES = 8 << 20
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """Prefetched blocks of one edge that nobody has asked for yet."""

    node: Node
    at: int
    """Index in the edge of the first."""
    blocks: int
    nbytes: int
    since: int
    """The index's clock of uses then."""


class Prefetcher:
    """The queue and the thread. `max_bytes` is what may be held, `layout_of` says how a tree's blocks lie."""

    def __init__(
        self,
        engine: Engine,
        prompts: PromptMemory,
        *,
        max_bytes: Callable[[], int],
        layout_of: Callable[[Fingerprint], KVLayout | None],
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._max_bytes = max_bytes
        self._layout_of = layout_of
        self._queue: deque[tuple[TreeId, bytes]] = deque(maxlen=MAX_QUEUED)
        self._held: list[_Held] = []
        self._searches = self._prefetched = self._used = self._unused = 0
        self._filled, self._idle, self._closed = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="kvpool-prefetch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def asked(self, tree: TreeId, tokens: bytes) -> None:
        """A prompt was asked for. Never waits; of too many the oldest are left out."""
        self._queue.append((tree, tokens))
        self._idle.clear()
        self._filled.set()

    def stats(self) -> PrefetchStats:
        """Counters."""
        held = sum(one.nbytes for one in list(self._held))
        return PrefetchStats(self._searches, self._prefetched, self._used, self._unused, held)

    def flush(self, deadline_s: float) -> bool:
        """Wait until all that was asked for by now was looked at; False at the deadline."""
        return self._idle.wait(deadline_s)

    def close(self, until_s: float) -> bool:
        """End; False where it has not at `until_s`, on `time.monotonic`."""
        self._closed = True
        self._filled.set()
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until_s - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed:
            if not self._queue:
                self._idle.set()
            self._filled.wait(1.0)
            self._filled.clear()
            try:
                self._settle()
                while self._queue and not self._closed:
                    self._serve(*self._queue.popleft())
            except Exception:  # the thread's top: the next prompt may fare better
                _log.exception("prefetching")

    def _serve(self, tree: TreeId, tokens: bytes) -> None:
        self._searches += 1
        hits = self._prompts.likely(tokens, tree, SIMILAR, deadline_s=SEARCH_DEADLINE_S)
        for leaf in ranked((hit.score, hit.followers) for hit in hits):
            place = self._prompts.place_of(leaf)
            if place is not None and not self._closed and not self._promote(place):
                return

    def _promote(self, parcel: Parcel) -> bool:
        """Read what the prompt has on SSD alone; False where the budget is used up."""
        self._settle()
        room = self._max_bytes() - sum(one.nbytes for one in self._held)
        tree = parcel.node.tree
        layout = self._layout_of(tree.id.fingerprint)
        if layout is None or not self._engine.store.readable:
            return True
        if room < layout.record_bytes:
            return False
        index = self._engine.index
        pin = index.match(tree, sending.tokens(index, parcel))
        try:
            self._read(pin, layout, room // layout.record_bytes)
        finally:
            index.unpin(pin)
        return True

    def _read(self, pin: Pin, layout: KVLayout, most_blocks: int) -> None:
        engine = self._engine
        in_memory = [
            max(places) for places in zip(engine.index.places(pin, RAM), engine.index.places(pin, GPU), strict=True)
        ]
        wanted = [at for at, place in enumerate(in_memory) if place == NOWHERE][:most_blocks]
        if not wanted:
            return
        until = wanted[-1] + 1
        fetch = Fetch.begin(
            engine.fetch_parts,
            pin,
            plan(in_memory[:until], engine.index.places(pin, SSD)[:until]),
            payload_bytes=layout.payload_bytes,
            record_bytes=layout.record_bytes,
            budget_s=engine.settings.ssd_budget_s,
            window_bytes=WINDOW_BYTES,
            own_bytes=0,
        )
        brought = []
        try:
            for block in wanted:
                if fetch.record(block) is None:
                    break
                brought.append(block)
        finally:
            fetch.close()
        self._note(pin, brought, layout.record_bytes)

    def _note(self, pin: Pin, brought: list[int], record_bytes: int) -> None:
        index = self._engine.index
        self._prefetched += len(brought)
        with index.lock:
            for node in index.path(pin):
                mine = [block - node.start for block in brought if node.start <= block < node.end]
                if mine:
                    self._held.append(_Held(node, mine[0], len(mine), len(mine) * record_bytes, index.uses))

    def _settle(self) -> None:
        """See what became of what was prefetched."""
        index = self._engine.index
        left = []
        with index.lock:
            for held in self._held:
                node = held.node
                last = min(held.at + held.blocks, node.blocks) - 1
                if last >= held.at and node.used_at(last) > held.since:
                    self._used += held.blocks
                elif last < held.at or node.place(last, RAM) == NOWHERE:
                    self._unused += held.blocks
                else:
                    left.append(held)
        self._held = left

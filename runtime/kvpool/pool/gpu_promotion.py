"""Copies blocks that are loaded again and again from RAM up to device memory, behind the callers' backs.

Loads into device memory are counted by tree node; after so many, the blocks of that prefix are copied up, into free
room or in place of blocks that were used less recently. The copy in RAM then goes, since it could not be evicted while
deeper blocks are on the device; but one that is encoded stays, and what was decoded from it is never encoded again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES, KVLayout
from kvpool.pool.encodings import Encodings
from kvpool.pool.gpu_demotion import DemotionParts
from kvpool.pool.gpu_memory import GpuMemory
from kvpool.pool.gpu_store import GpuOutError
from kvpool.prefix import demoting
from kvpool.prefix.demoting import Span
from kvpool.prefix.heads import pinned_heads
from kvpool.prefix.index import BATCH_BLOCKS, Pin
from kvpool.prefix.node import GPU, Node
from kvpool.tiers.extents import Bytes
from kvpool.tiers.tier import TierName

MAX_COUNTED_NODES = 16_384
MAX_QUEUED = 1_024
BATCH_BYTES = 16 << 20


class Promoter:
    """`run` is a chore; `note` may be called from any thread. `after_hits` may change at any time."""

    def __init__(
        self,
        parts: DemotionParts,
        memory: GpuMemory,
        encodings: Encodings,
        *,
        layout_of: Callable[[Fingerprint], KVLayout | None],
        after_hits: Callable[[], int],
    ) -> None:
        self._parts = parts
        self._memory = memory
        self._encodings = encodings
        self._layout_of = layout_of
        self._after_hits = after_hits
        self._lock = threading.Lock()
        self._hits: OrderedDict[Node, int] = OrderedDict()
        """By node, the one counted last at the end: loads that found blocks of it below the device."""
        self._queue: deque[tuple[Node, int]] = deque(maxlen=MAX_QUEUED)
        self.promoted_blocks = 0
        """Blocks that were copied up."""

    def note(self, pin: Pin, first: int) -> None:
        """The pinned blocks were loaded into device memory, some from `first` on from a slower tier."""
        with self._parts.index.lock:
            nodes = [node for node in self._parts.index.path(pin) if node.end > first]
        after, reached = self._after_hits(), None
        with self._lock:
            for node in nodes:
                hits = self._hits.pop(node, 0) + 1
                if hits >= after:
                    reached = node
                else:
                    self._hits[node] = hits
            while len(self._hits) > MAX_COUNTED_NODES:
                self._hits.popitem(last=False)
            if reached is not None:
                self._queue.append((reached, pin.depth))
        if reached is not None:
            self._parts.store.wake()

    def run(self) -> None:
        """Copy up what is queued."""
        while self._queue:
            node, depth = self._queue.popleft()
            self._promote(node, depth)

    def _promote(self, node: Node, depth: int) -> None:
        """Parents before children, until there is no room."""
        layout = self._layout_of(node.tree.id.fingerprint)
        if layout is None:
            return
        most = max(1, min(BATCH_BLOCKS, BATCH_BYTES // layout.record_bytes))
        at = 0
        while (span := demoting.next_below(self._parts.index, node, at, depth, most)) is not None:
            at = span.pin.depth
            try:
                taken = self._copy_up(span, layout)
            except BaseException:
                self._parts.index.unpin(span.pin)
                raise
            self._parts.copies.release(demoting.leave_ram(self._parts.index, span))
            if not taken:
                return

    def _copy_up(self, span: Span, layout: KVLayout) -> bool:
        """Copy a run up, as far as there is room; False where there was not enough."""
        account, record_bytes = span.pin.tree.account, layout.record_bytes
        places = self._memory.allocate_over_colder(
            account, span.pin.tree.id, record_bytes, len(span.places), used_at=span.last_use
        )
        if not places:
            return False
        borrowed: list[Bytes] = []
        decoded: list[int] = []
        try:
            payloads = [
                self._payload(slot, layout, borrowed, decoded, place)
                for slot, place in zip(span.places, places, strict=False)
            ]
            self._parts.store.upload(places, payloads)
        except BaseException as error:
            self._memory.free(account, record_bytes, places)
            if isinstance(error, GpuOutError):
                return False
            raise
        for buffer in borrowed:
            self._encodings.give_back(buffer)
        self._parts.store.decoded.update(decoded)
        charged = len(places) * record_bytes
        refused = self._parts.index.fill(span.pin, span.first, GPU, places, charged=charged)
        self._memory.drop(refused)
        self.promoted_blocks += len(places) - len(refused)
        if self._parts.events.active and not span.pin.tree.erased:
            heads = pinned_heads(
                self._parts.index, span.pin, span.first, len(places), payload_bytes=layout.payload_bytes
            )
            self._parts.events.publish_stored(heads, TierName.GPU)
        return len(places) == len(span.places)

    def _payload(self, slot: int, layout: KVLayout, borrowed: list[Bytes], decoded: list[int], place: int) -> Bytes:
        """The payload in RAM as it is to lie on the device: in place, or decoded into a buffer."""
        record = self._parts.memory.ram.record(slot)
        if len(record) == layout.record_bytes:
            return record[PAGE_BYTES : PAGE_BYTES + layout.payload_bytes]
        buffer = self._encodings.borrow(layout.payload_bytes)
        borrowed.append(buffer)
        self._encodings.decode(layout, record, buffer)
        decoded.append(place)
        return buffer

"""Encodes blocks in RAM with the ram tier's codec, behind the callers' backs, each into a new slot.

A queue of tree nodes, in the order in which they were stored. With `compression.onEviction` it is worked at only while
RAM is nearly full, so that a block is encoded where it would else be evicted, and those used since they were queued go
to its end; without, as soon as nobody reads the block. A leased block waits. Both slots are charged until the swap. A
block whose values the codec cannot hold stays as it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvpool.codecs import PayloadCodec
from kvpool.pool.encodings import Encodings
from kvpool.pool.memory import Memory
from kvpool.prefix.heads import pinned_heads
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import NOWHERE, RAM, Node
from kvpool.prefix.relocating import Held, hold, release, settle

MAX_QUEUED_NODES = 65_536
"""Beyond it those queued longest ago stay as they are."""
NEARLY_FULL, FULL_NO_MORE = 0.85, 0.75
"""Shares of the ram tier's capacity between which encoding on eviction works."""


class _Queued(NamedTuple):
    node: Node
    last_use: int
    """When it was used last, as it was queued."""


class RamEncoder:
    """The queue; `run` is a chore of a thread of its own. `want` may be called from any thread."""

    def __init__(
        self,
        index: PrefixIndex,
        memory: Memory,
        encodings: Encodings,
        *,
        on_eviction: bool,
        compresses_shared: Callable[[], bool],
    ) -> None:
        self._index = index
        self._memory = memory
        self._encodings = encodings
        self._on_eviction = on_eviction
        self._compresses_shared = compresses_shared
        self._queue: deque[_Queued] = deque(maxlen=MAX_QUEUED_NODES)
        self._lock = threading.Lock()
        self.wake: Callable[[], None] | None = None
        """Has the chore run now; None while nobody runs it."""

    def want(self, node: Node) -> None:
        """The edge that ends in this node has new blocks in RAM, or edges above it have."""
        if self._encodings.codec(node.tree.id.fingerprint, RAM) is None:
            return
        with self._lock:
            self._queue.append(_Queued(node, node.last_use))
        if self.wake is not None and (not self._on_eviction or self._is_above(NEARLY_FULL)):
            self.wake()

    def run(self) -> None:
        """Encode what is to be encoded now. Each queued edge is looked at once at most."""
        if self._on_eviction and not self._is_above(NEARLY_FULL):
            return
        again: list[_Queued] = []
        for _ in range(len(self._queue)):
            if self._on_eviction and not self._is_above(FULL_NO_MORE):
                break
            with self._lock:
                queued = self._queue.popleft()
            if self._on_eviction and queued.node.last_use > queued.last_use:
                again.append(_Queued(queued.node, queued.node.last_use))
            elif not self._encode_chain(queued.node):
                again.append(queued)
        with self._lock:
            self._queue.extend(again)

    def _is_above(self, share: float) -> bool:
        return self._memory.ram.used_bytes > share * self._memory.ram.capacity_bytes

    def _encode_chain(self, node: Node | None) -> bool:
        """Encode an edge, and those above it, of which splits may have made several; False when some were leased."""
        done = True
        while node is not None and node.parent is not None:
            if not node.shared or self._compresses_shared():
                done = self._encode_edge(node) and done
            node = node.parent
        return done

    def _encode_edge(self, node: Node) -> bool:
        """Encode the blocks of an edge that are not yet; False when some were leased."""
        codec = self._encodings.codec(node.tree.id.fingerprint, RAM)
        if codec is None:
            return True
        done = True
        for place in self._raw_places(node):
            held = hold(self._index, RAM, place, near=node)
            if held is None:
                done = False
            else:
                self._encode(held, codec)
        return done

    def _raw_places(self, node: Node) -> list[int]:
        """Where blocks lie that are not encoded, the last first: that one would be evicted next."""
        bytes_of, raw_bytes = self._memory.ram.bytes_of, node.tree.record_bytes
        with self._index.lock:
            places = node.places[RAM]
            known = places.tolist() if places is not None else []
        return [place for place in reversed(known) if place != NOWHERE and bytes_of(place) == raw_bytes]

    def _encode(self, held: Held, codec: PayloadCodec) -> None:
        """Encode one block into another slot, and let the index point there; it stays as it is where it cannot be."""
        tree, memory = held.pin.tree, self._memory
        slots: list[int] = []
        try:
            slots = memory.allocate(tree.account, codec.record_bytes, 1).slots
            encoded = bool(slots) and self._encode_into(slots[0], held, codec)
        except BaseException:
            release(self._index, held)
            memory.free(tree.account, slots)
            raise
        if not encoded:
            release(self._index, held)
            memory.free(tree.account, slots)
            return
        self._index.expect_encoded(tree)
        moved = settle(self._index, held, slots[0], charged=codec.record_bytes)
        memory.drop([held.place if moved else slots[0]])

    def _encode_into(self, slot: int, held: Held, codec: PayloadCodec) -> bool:
        depth, payload_bytes = held.pin.depth - 1, codec.layout.payload_bytes
        head = pinned_heads(self._index, held.pin, depth, 1, payload_bytes=payload_bytes)[0]
        ram = self._memory.ram
        return self._encodings.encode(ram.record(held.place), head, codec, ram.record(slot))

"""Makes records of blocks in RAM that are about to leave the process: encoded if their tier says so, and sealed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvpool.blocks.layout import padded
from kvpool.blocks.record import Head, seal
from kvpool.codecs import PayloadCodec
from kvpool.pool.encodings import Encodings
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import SSD
from kvpool.prefix.saving import Run
from kvpool.tiers.extents import Bytes
from kvpool.tiers.ram import RamTier
from kvpool.tiers.ssd.scratch import aligned


class Sealer:
    """For any number of writer threads, each of which has memory of its own to encode into."""

    def __init__(
        self, ram: RamTier, index: PrefixIndex, encodings: Encodings, *, compresses_shared: Callable[[], bool]
    ) -> None:
        self._ram = ram
        self._index = index
        self._encodings = encodings
        self._compresses_shared = compresses_shared
        self._of_thread = threading.local()

    @contextmanager
    def sealed(self, run: Run) -> Iterator[list[Bytes]]:
        """The run's records as they go to SSD, good for the time of the context.

        One that is encoded in RAM already goes as it is. One that is not to be encoded, or whose values the codec
        cannot hold, is sealed where it lies.
        """
        tree = run.pin.tree
        codec = None
        if self._compresses_shared() or not run.node.shared:
            codec = self._encodings.codec(tree.id.fingerprint, SSD)
        scratch = self._scratch(codec.record_bytes * len(run.places)) if codec else None
        records = [
            self._sealed(self._ram.record(place), head, tree.record_bytes, codec, scratch, at)
            for at, (place, head) in enumerate(zip(run.places, run.heads, strict=True))
        ]
        if any(len(record) != tree.record_bytes for record in records):
            self._index.expect_encoded(tree)
        yield records

    def _sealed(
        self, record: Bytes, head: Head, raw_bytes: int, codec: PayloadCodec | None, scratch: Bytes | None, at: int
    ) -> Bytes:
        if len(record) != raw_bytes:
            return record
        if codec is not None and scratch is not None:
            encoded = scratch[at * codec.record_bytes : (at + 1) * codec.record_bytes]
            if self._encodings.encode(record, head, codec, encoded):
                return encoded
        seal(record, head)
        return record

    def _scratch(self, nbytes: int) -> Bytes:
        known: Bytes | None = getattr(self._of_thread, "memory", None)
        if known is None or len(known) < nbytes:
            known = self._of_thread.memory = aligned(padded(nbytes))
        return known

"""Makes records of blocks in memory that are about to leave the process: encoded if their tier says so, and sealed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvpool.blocks.layout import PAGE_BYTES, padded
from kvpool.blocks.record import Head, seal
from kvpool.codecs import PayloadCodec
from kvpool.pool.encodings import Encodings
from kvpool.pool.gpu_store import GpuOutError, GpuStore
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import GPU, SSD
from kvpool.prefix.saving import Run
from kvpool.tiers.extents import Bytes
from kvpool.tiers.ram import RamTier
from kvpool.tiers.ssd.scratch import aligned


class Sealer:
    """For any number of writer threads, each of which has memory of its own to encode into."""

    def __init__(
        self,
        ram: RamTier,
        index: PrefixIndex,
        encodings: Encodings,
        *,
        compresses_shared: Callable[[], bool],
        gpu: GpuStore | None = None,
    ) -> None:
        self._ram = ram
        self._gpu = gpu
        self._index = index
        self._encodings = encodings
        self._compresses_shared = compresses_shared
        self._of_thread = threading.local()

    @contextmanager
    def sealed(self, run: Run, to: int = SSD) -> Iterator[list[Bytes]]:
        """The run's records as they go to a tier, that of level `to`, good for the time of the context.

        One that is encoded in RAM already goes as it is. One that is not to be encoded, or whose values the codec
        cannot hold, is sealed where it lies. What is in device memory alone is copied out first; fewer records than the
        run has where one was decoded there, for it must not be encoded again. Raises `GpuOutError`.
        """
        tree = run.pin.tree
        codec = None
        if self._compresses_shared() or not run.node.shared:
            codec = self._encodings.codec(tree.id.fingerprint, to)
        scratch = self._memory("encoded", codec.record_bytes * len(run.places)) if codec else None
        raw = self._from_device(run) if run.level == GPU else [self._ram.record(place) for place in run.places]
        records = [
            self._sealed(record, head, tree.record_bytes, codec, scratch, at)
            for at, (record, head) in enumerate(zip(raw, run.heads, strict=False))
        ]
        if any(len(record) != tree.record_bytes for record in records):
            self._index.expect_encoded(tree)
        yield records

    def _from_device(self, run: Run) -> list[Bytes]:
        """Unsealed records, in memory of this thread's."""
        gpu, record_bytes = self._gpu, run.pin.tree.record_bytes
        assert gpu is not None
        exact = next((at for at, place in enumerate(run.places) if place in gpu.decoded), len(run.places))
        if not exact:
            return []
        memory = self._memory("copied", record_bytes * exact)
        records = list(memory[: record_bytes * exact].reshape(exact, record_bytes))
        end = PAGE_BYTES + run.heads[0].raw_bytes
        for record in records:
            record[end:] = 0
        try:
            gpu.download(run.places[:exact], [record[PAGE_BYTES:end] for record in records])
        except GpuOutError as error:
            if not error.settled:
                del self._of_thread.copied  # bytes may still arrive there
            raise
        return records

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

    def _memory(self, name: str, nbytes: int) -> Bytes:
        """So much memory, or more, that only this thread uses for that."""
        known: Bytes | None = getattr(self._of_thread, name, None)
        if known is None or len(known) < nbytes:
            known = aligned(padded(nbytes))
            setattr(self._of_thread, name, known)
        return known

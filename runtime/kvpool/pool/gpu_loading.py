"""Hands the blocks of a lease over where some of them lie in device memory.

A sink that is on the device takes those as they are; for any other they are copied to the host, several at a time. A
device that fails in the middle is no error: what lies elsewhere too comes from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np

from kvpool.blocks.layout import KVLayout
from kvpool.blocks.transfer import BlockSink, DeviceBlockSink
from kvpool.pool.gpu_store import GpuStore
from kvpool.prefix.node import NOWHERE
from kvpool.tiers.extents import Bytes

STAGE_BYTES = 4 << 20
"""About so much is copied to the host at once."""


class GpuReader:
    """What one load takes from the device; `places` by block, -1 for what is to come from elsewhere."""

    def __init__(
        self, store: GpuStore, layout: KVLayout, sink: BlockSink, places: Sequence[int], in_ram: Sequence[int]
    ) -> None:
        self._store = store
        self._layout = layout
        self._host_sink = sink
        self._sink = sink if isinstance(sink, DeviceBlockSink) else None
        self.places = list(places)
        if self._sink is None:  # what is in RAM as well is nearer
            self.places = [NOWHERE if ram != NOWHERE else place for place, ram in zip(places, in_ram, strict=True)]
        self.is_on_device = self._sink is not None

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """For the time in which `hand_over` is called. Raises `GpuOutError`."""
        with self._store.in_order() if any(place != NOWHERE for place in self.places) else nullcontext():
            yield

    def hand_over(self, block: int) -> int:
        """Hand over the block, and some that follow; how many. Raises `GpuOutError`: that one, and no more, is open."""
        if self._sink is not None:
            self._sink.write_block_from_device(
                block, self._store.payload(self.places[block], self._layout.payload_bytes)
            )
            return 1
        payloads = self._downloaded(block)
        for at, payload in enumerate(payloads, block):
            payload.flags.writeable = False
            self._host_sink.write_block(at, payload)
        return len(payloads)

    def give_up(self) -> None:
        """The device is out: nothing more is to come from there."""
        self.places = [NOWHERE] * len(self.places)

    def _downloaded(self, block: int) -> list[Bytes]:
        most = max(1, STAGE_BYTES // self._layout.payload_bytes)
        run = self.places[block : block + most]
        run = run[: run.index(NOWHERE)] if NOWHERE in run else run
        payloads = list(np.empty((len(run), self._layout.payload_bytes), np.uint8))
        self._store.download(run, payloads)
        return payloads

"""Where the blocks of one store land: on the device while there is room, the rest of a batch in RAM."""

from __future__ import annotations

from kvpool.blocks.layout import KVLayout
from kvpool.blocks.transfer import BlockSource, DeviceBlockSource
from kvpool.pool.gpu_parts import Gpu
from kvpool.pool.gpu_store import GpuOutError
from kvpool.prefix.index import Pin


class GpuLanding:
    """Takes blocks of one source in, batch by batch. Used by the storing thread alone."""

    def __init__(self, gpu: Gpu, layout: KVLayout, source: BlockSource) -> None:
        self._gpu = gpu
        self._layout = layout
        self._source = source if isinstance(source, DeviceBlockSource) else None
        self._left_over = 0
        """Blocks of the last batch for which the device had no room."""

    def take(self, pin: Pin, count: int) -> list[int]:
        """Places on the device of up to `count` blocks that follow the pin, filled and charged; none: use RAM."""
        if self._source is None or self._left_over or self._gpu.store.tier is None:
            return []
        account, record_bytes = pin.tree.account, self._layout.record_bytes
        places = self._gpu.memory.allocate(account, pin.tree.id, record_bytes, count)
        if not places:
            self._left_over = count
            return []
        try:
            self._fill(self._source, pin.depth, places)
        except BaseException as error:
            self._gpu.memory.free(account, record_bytes, places)
            if isinstance(error, GpuOutError):
                return []
            raise
        self._left_over = count - len(places)
        return places

    def in_ram(self, count: int) -> int:
        """How many blocks to store in RAM now, `count` at most, before the device is tried again."""
        if self._left_over:
            count = min(count, self._left_over)
        self._left_over = 0
        return count

    def _fill(self, source: DeviceBlockSource, first: int, places: list[int]) -> None:
        store, payload_bytes = self._gpu.store, self._layout.payload_bytes
        with store.in_order():
            for block, place in enumerate(places, first):
                source.read_block_on_device(block, store.payload(place, payload_bytes))

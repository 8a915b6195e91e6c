"""A lease: the right to read the blocks that a match has found, until it is closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.transfer import BlockSink
from kvpool.errors import PoolClosedError
from kvpool.pool.fetch import Fetch
from kvpool.pool.gpu_loading import GpuReader
from kvpool.pool.gpu_parts import Gpu
from kvpool.pool.gpu_store import GpuOutError
from kvpool.pool.results import LeaseState
from kvpool.prefix.index import Pin
from kvpool.prefix.node import GPU, NOWHERE, RAM, SSD
from kvpool.tiers.extents import Bytes
from kvpool.tiers.tier import TierName

if TYPE_CHECKING:
    from kvpool.pool.model import Model


class Lease:
    """The longest prefix of some tokens that the pool held when it was matched. Used by one thread at a time.

    Until `close`, none of its blocks is evicted, moved or changed: `close` it soon, best with `with`. What lies on SSD
    alone may still turn out to be unreadable, so `load` says how many tokens really arrived.
    """

    __slots__ = ("_model", "_pin", "_served")

    def __init__(self, model: Model, pin: Pin) -> None:
        self._model = model
        self._pin: Pin | None = pin
        self._served: Counter[TierName] | None = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def blocks(self) -> int:
        """How many whole blocks were matched; 0 once closed."""
        return 0 if self._pin is None else self._pin.depth

    @property
    def tokens(self) -> int:
        """How many tokens were matched: always whole blocks."""
        return self.blocks * self._model.layout.block_tokens

    @property
    def served(self) -> dict[TierName, int]:
        """How many blocks the last `load` delivered, by the tier in which it found them."""
        return dict(self._served or {})

    def poll(self) -> LeaseState:
        """How far the fetch from remote tiers is. Never blocks; without remote tiers, ready at once."""
        self._open_pin()
        self._model._engine.gate.check()
        return LeaseState.READY

    def wait(self, deadline_s: float) -> LeaseState:
        """Extend the lease by what remote tiers hold, for at most `deadline_s`; without such tiers, ready at once."""
        if deadline_s < 0:
            raise ValueError(f"deadline_s is {deadline_s}; it must be 0 or more")
        return self.poll()

    def load(self, sink: BlockSink) -> int:
        """Hand every matched block to `sink`, in order from the prompt's start; the number of tokens that arrived.

        Fewer than `tokens` where a block turned out to be damaged, its tier stalled for longer than its budget, or
        reading it would take longer than computing it: what is missing is to be computed. What the sink raises ends
        the load and reaches the caller. Raises `PoolClosedError` once the lease or the pool was closed.
        """
        pin = self._open_pin()
        model = self._model
        served = self._served = Counter()
        with model._engine.gate:
            in_ram = model._engine.index.places(pin, RAM)
            if model._engine.gpu is not None:
                loaded = self._load_with_gpu(model._engine.gpu, pin, sink, in_ram, served)
            elif NOWHERE not in in_ram:
                self._hand_over(sink, 0, in_ram)
                served[TierName.RAM] += len(in_ram)
                loaded = len(in_ram)
            else:
                loaded = self._load_with_ssd(pin, sink, in_ram, served)
        model.count_loaded(pin.depth, served)
        return loaded * model.layout.block_tokens

    def close(self) -> None:
        """Give the right up. Calling it again does nothing."""
        pin, self._pin = self._pin, None
        if pin is not None:
            self._model._engine.index.unpin(pin)
            if self._model._engine.index.has_graves:
                self._model._engine.wake()

    def _open_pin(self) -> Pin:
        if self._pin is None:
            raise PoolClosedError("the lease was closed: match again")
        return self._pin

    def _hand_over(self, sink: BlockSink, first: int, slots: Sequence[int]) -> None:
        engine, layout = self._model._engine, self._model.layout
        end = PAGE_BYTES + layout.payload_bytes
        for block, slot in enumerate(slots, first):
            record = engine.record(slot)
            if len(record) == layout.record_bytes:
                _write(sink, block, record[PAGE_BYTES:end])
            else:
                with engine.decoded(layout, record) as payload:
                    _write(sink, block, payload[:])

    def _load_with_gpu(self, gpu: Gpu, pin: Pin, sink: BlockSink, in_ram: list[int], served: Counter[TierName]) -> int:
        """As `load`; where the device fails on the way, the rest comes from where else it lies."""
        in_gpu = self._model._engine.index.places(pin, GPU)
        reader = GpuReader(gpu.store, self._model.layout, sink, in_gpu, in_ram)
        while True:
            try:
                with reader.in_order():
                    loaded = self._deliver_mixed(reader, pin, sink, in_ram, served)
                break
            except GpuOutError:
                reader.give_up()
        if reader.is_on_device and NOWHERE in in_gpu[:loaded] and gpu.store.tier is not None:
            gpu.promoter.note(pin, in_gpu.index(NOWHERE))
        return loaded

    def _deliver_mixed(
        self, reader: GpuReader, pin: Pin, sink: BlockSink, in_ram: list[int], served: Counter[TierName]
    ) -> int:
        """Deliver what was not `served` yet; the blocks that have arrived in all. Raises `GpuOutError`."""
        block = served.total()
        held = [max(places) for places in zip(in_ram, reader.places, strict=True)]
        fetch = None
        if NOWHERE in held[block:]:
            read_already = [0] * block
            fetch = self._model.fetch(pin, read_already + held[block:], self._model._engine.index.places(pin, SSD))
        try:
            while block < len(held):
                slot, tier, count = in_ram[block], TierName.RAM, 1
                if reader.places[block] != NOWHERE:
                    count, tier = reader.hand_over(block), TierName.GPU
                else:
                    if slot == NOWHERE:
                        fetched = None if fetch is None else fetch.slot(block)
                        if fetched is None:
                            break
                        slot, tier = fetched, TierName.SSD
                    self._hand_over(sink, block, (slot,))
                served[tier] += count
                block += count
            return block
        finally:
            if fetch is not None:
                fetch.close()

    def _load_with_ssd(self, pin: Pin, sink: BlockSink, in_ram: list[int], served: Counter[TierName]) -> int:
        engine = self._model._engine
        fetch = self._model.fetch(pin, in_ram, engine.index.places(pin, SSD))
        if fetch is None:
            known = in_ram.index(NOWHERE)
            self._hand_over(sink, 0, in_ram[:known])
            served[TierName.RAM] += known
            return known
        try:
            return self._deliver(fetch, sink, in_ram, served)
        finally:
            fetch.close()

    def _deliver(self, fetch: Fetch, sink: BlockSink, in_ram: list[int], served: Counter[TierName]) -> int:
        for block, slot in enumerate(in_ram):
            tier = TierName.RAM
            if slot == NOWHERE:
                fetched = fetch.slot(block)
                if fetched is None:
                    return block
                slot, tier = fetched, TierName.SSD
            self._hand_over(sink, block, (slot,))
            served[tier] += 1
        return len(in_ram)


def _write(sink: BlockSink, block: int, payload: Bytes) -> None:
    """Hand one payload over, a view that is nobody else's, so that it can be made read-only."""
    payload.flags.writeable = False
    sink.write_block(block, payload)

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
    from kvpool.pool.remote.lookup import Lookup, Sources
    from kvpool.prefix.tree import Extras


class Lease:
    """The longest prefix of some tokens that the pool held when it was matched. Used by one thread at a time.

    Until `close`, none of its blocks is evicted, moved or changed: `close` it soon, best with `with`. What lies on SSD
    alone may still turn out to be unreadable, so `load` says how many tokens really arrived.
    """

    __slots__ = ("_extras", "_lookup", "_model", "_packed", "_pin", "_served", "_sources")

    def __init__(self, model: Model, pin: Pin, packed: bytes, extras: Extras | None) -> None:
        self._model = model
        self._pin: Pin | None = pin
        self._packed = packed
        self._extras = extras
        self._lookup: Lookup | None = None
        self._sources: Sources | None = None
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

    def ask(self, deadline_s: float) -> LeaseState:
        """Begin to extend the lease by what shared tiers hold, within `deadline_s`, and return at once: see `poll`.

        Pending where something is asked for; ready where there are no such tiers, or nothing is missing. Asking again
        while it is pending changes nothing; after that, what is missing still is asked for. Raises `PoolClosedError`.
        """
        return self._ask(deadline_s, here=False)

    def poll(self) -> LeaseState:
        """How far it is with what was asked for; what has arrived is in the lease from now on. Never blocks.

        Expired once the deadline has passed: nothing more comes. Ready when all came that is to be had, or nothing was
        asked for. Raises `PoolClosedError`.
        """
        pin = self._open_pin()
        self._model._engine.gate.check()
        if self._lookup is None:
            return LeaseState.READY
        state = self._lookup.state  # before what it has brought is looked at, so that nothing comes after READY
        self._model._engine.index.advance(pin, self._packed, self._extras)
        return state

    def wait(self, deadline_s: float) -> LeaseState:
        """Extend the lease by what shared tiers hold: `ask`, and wait for it, at most until the deadline.

        Expired where there may be more to be had; ready where all has come, and where there are no such tiers. The
        lease is longer by what has arrived in either case: see `tokens`.
        """
        if self._ask(deadline_s, here=True) is LeaseState.PENDING and self._lookup is not None:
            self._lookup.wait()
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
        self._say_where_from(loaded, served)
        model.count_loaded(pin.depth, served)
        remote = model._engine.remote
        if remote is not None and (served[TierName.SSD] or served[TierName.DATABASE] or served[TierName.DRAGONFLY]):
            remote.promote(pin)
        return loaded * model.layout.block_tokens

    def close(self) -> None:
        """Give the right up. Calling it again does nothing."""
        pin, self._pin = self._pin, None
        if self._lookup is not None:
            self._lookup.end()
        if pin is not None:
            self._model._engine.index.unpin(pin)
            if self._model._engine.index.has_graves:
                self._model._engine.wake()

    def _open_pin(self) -> Pin:
        if self._pin is None:
            raise PoolClosedError("the lease was closed: match again")
        return self._pin

    def _ask(self, deadline_s: float, *, here: bool) -> LeaseState:
        if deadline_s < 0:
            raise ValueError(f"deadline_s is {deadline_s}; it must be 0 or more")
        pin = self._open_pin()
        self._model._engine.gate.check()
        if self._lookup is None or self._lookup.state is not LeaseState.PENDING:
            if self._sources is None:
                self._sources = {}
            self._lookup = self._model.look_up(
                pin, self._packed, self._extras, self._sources, deadline_s, here=here
            )  # fmt: skip
        return LeaseState.READY if self._lookup is None else self._lookup.state

    def _say_where_from(self, loaded: int, served: Counter[TierName]) -> None:
        """What a lookup has brought was served from RAM, and came from elsewhere."""
        for block, tier in tuple((self._sources or {}).items()):
            if block < loaded and served[TierName.RAM]:
                served[TierName.RAM] -= 1
                served[tier] += 1
        if not served[TierName.RAM]:
            del served[TierName.RAM]

    def _hand_over(self, sink: BlockSink, first: int, slots: Sequence[int]) -> None:
        engine = self._model._engine
        for block, slot in enumerate(slots, first):
            self._hand_over_record(sink, block, engine.record(slot))

    def _hand_over_record(self, sink: BlockSink, block: int, record: Bytes) -> None:
        engine, layout = self._model._engine, self._model.layout
        if len(record) == layout.record_bytes:
            _write(sink, block, record[PAGE_BYTES : PAGE_BYTES + layout.payload_bytes])
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
                    if slot != NOWHERE:
                        self._hand_over(sink, block, (slot,))
                    elif fetch is not None and (fetched := fetch.record(block)) is not None:
                        tier = TierName.SSD
                        self._hand_over_record(sink, block, fetched)
                    else:
                        break
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
            if slot != NOWHERE:
                self._hand_over(sink, block, (slot,))
                served[TierName.RAM] += 1
            elif (fetched := fetch.record(block)) is not None:
                self._hand_over_record(sink, block, fetched)
                served[TierName.SSD] += 1
            else:
                return block
        return len(in_ram)


def _write(sink: BlockSink, block: int, payload: Bytes) -> None:
    """Hand one payload over, a view that is nobody else's, so that it can be made read-only."""
    payload.flags.writeable = False
    sink.write_block(block, payload)

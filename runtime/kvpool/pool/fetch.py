"""Brings the blocks of one lease that lie on SSD alone into RAM, ahead of the copy that waits for them.

A fetch keeps a window of reads in flight. Where RAM is full of leased blocks, it goes on with the slots that it has, or
with a little memory of its own: a block is then delivered and not kept. It ends early, without an error, where a record
is bad or the tier stalls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvpool.blocks.record import Buffer, codec_in
from kvpool.pool.copies import Copies
from kvpool.pool.events import EventBus, Form
from kvpool.pool.memory import Memory
from kvpool.pool.ram_encoder import RamEncoder
from kvpool.pool.reading import TIER_OUT, Readers, ReadJob
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix.heads import pinned_heads
from kvpool.prefix.history import Loss
from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.node import RAM, SSD
from kvpool.tiers.ssd.place import bytes_of
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.tier import TierName

JOB_BYTES = 4 << 20
JOB_BLOCKS = 32
WINDOW_BYTES = 32 << 20
OWN_BYTES = 1 << 20


class Batch(NamedTuple):
    """Consecutive blocks that one job reads: from block `first` on, `places` on SSD; records of one length."""

    first: int
    places: Sequence[int]

    @property
    def record_bytes(self) -> int:
        """The length of each record."""
        return bytes_of(self.places[0])


@dataclass(frozen=True, slots=True)
class FetchParts:
    """What a fetch works with; one for all."""

    index: PrefixIndex
    memory: Memory
    copies: Copies
    store: SsdStore
    readers: Readers
    events: EventBus
    ram_encoder: RamEncoder


@dataclass(slots=True)
class Fetch:
    """Reads the batches of one load. Used by one thread; `close` ends it, whatever has happened."""

    parts: FetchParts
    pin: Pin
    payload_bytes: int
    record_bytes: int
    budget_s: float
    window_bytes: int
    own_bytes: int
    _todo: deque[Batch]
    _flying: deque[tuple[Batch, ReadJob]] = field(default_factory=deque)
    _current: tuple[Batch, ReadJob] | None = None
    _spare: list[int] = field(default_factory=list)
    _starved: bool = False
    _scratch: list[Buffer] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        parts: FetchParts,
        pin: Pin,
        batches: Sequence[Batch],
        *,
        payload_bytes: int,
        record_bytes: int,
        budget_s: float,
        window_bytes: int,
        own_bytes: int = OWN_BYTES,
    ) -> Fetch:
        """Start to read `batches`, some `window_bytes` ahead of `record`; 0: none before it is needed.

        `own_bytes` are what is taken beside RAM where that is full of leased blocks, or one record if that is larger;
        0: then the fetch ends there.
        """
        fetch = cls(parts, pin, payload_bytes, record_bytes, budget_s, window_bytes, own_bytes, deque(batches))
        fetch._submit()
        return fetch

    def record(self, block: int) -> Buffer | None:
        """The record of this block, verified; None where it is not to be had. Blocks are asked for in order.

        The record is good until the next call.
        """
        if self._current is None or block >= self._current[0].first + len(self._current[0].places):
            if not self._flying:
                self._submit()  # before this one's slots are kept: the last that there are go on to the next
            self._finish_current()
            if not self._next(block):
                return None
        assert self._current is not None
        batch, job = self._current
        at = block - batch.first
        fault = job.faults[at]
        if fault is None:
            return job.buffers[at]
        self._lose(block, batch.places[at], fault)
        return None

    def close(self) -> None:
        """Keep what was read and verified, give up what was not."""
        self._finish_current()
        while self._flying:
            _, job = self._flying.popleft()
            if job.abandon():
                self._spare += job.slots
        self._free_spare()

    def _next(self, block: int) -> bool:
        self._submit()
        if not self._flying or self._flying[0][0].first != block:  # no slot to be had, or the record went meanwhile
            return False
        batch, job = self._flying[0]
        if not self.parts.readers.wait(job, self.budget_s):
            self.parts.store.stalled(self.budget_s)
            return False
        self._flying.popleft()
        self._current = batch, job
        if self.window_bytes:
            self._submit()
        return True

    def _submit(self) -> None:
        """Start reads while the window and the slots allow that."""
        flying_bytes = sum(job.nbytes for _, job in self._flying)
        while self._todo and (not self._flying or flying_bytes < self.window_bytes):
            batch = self._todo[0]
            slots = self._slots(batch.record_bytes, len(batch.places))
            buffers = [self.parts.memory.ram.record(slot) for slot in slots] or self._own_buffers(batch)
            count = len(buffers)
            if not count:
                return
            self._todo.popleft()
            if count < len(batch.places):
                self._todo.appendleft(Batch(batch.first + count, batch.places[count:]))
                batch = Batch(batch.first, batch.places[:count])
            heads = pinned_heads(self.parts.index, self.pin, batch.first, count, payload_bytes=self.payload_bytes)
            job = ReadJob(batch.places, buffers, heads, slots=slots, account=self.pin.tree.account)
            flying_bytes += job.nbytes
            self._flying.append((batch, job))
            self.parts.readers.submit(job)

    def _own_buffers(self, batch: Batch) -> Sequence[Buffer]:
        """Memory beside RAM for the first records of a batch; none while it is in use, or slots will come back."""
        if self._flying or self._current is not None or not self.own_bytes:
            return ()
        if not self._scratch or len(self._scratch[0]) != batch.record_bytes:
            most = max(1, min(len(batch.places), self.own_bytes // batch.record_bytes))
            self._scratch = [aligned(batch.record_bytes) for _ in range(most)]
        return self._scratch[: len(batch.places)]

    def _slots(self, record_bytes: int, count: int) -> list[int]:
        memory = self.parts.memory
        if self._spare and memory.ram.bytes_of(self._spare[0]) != record_bytes:
            self._free_spare()
        slots, self._spare = self._spare[:count], self._spare[count:]
        if len(slots) < count and not self._starved:
            slots += memory.allocate(self.pin.tree.account, record_bytes, count - len(slots)).slots
            self._starved = len(slots) < count
        return slots

    def _finish_current(self) -> None:
        """The blocks of the current batch were delivered: keep them in RAM, or reuse their slots where RAM is full."""
        if self._current is None:
            return
        batch, job = self._current
        self._current = None
        if not job.slots:
            return
        good = next((at for at, fault in enumerate(job.faults) if fault is not None), len(job.slots))
        kept = 0 if self._starved and self._todo else good
        if batch.record_bytes != self.record_bytes:
            self.parts.index.expect_encoded(self.pin.tree)
        charged = kept * batch.record_bytes
        refused = self.parts.index.fill(self.pin, batch.first, RAM, job.slots[:kept], charged=charged)
        self._tell(job, set(job.slots[:kept]).difference(refused))
        self.parts.memory.drop(refused)
        if kept and batch.record_bytes == self.record_bytes:
            self.parts.ram_encoder.want(self.pin.node)
        self._spare += job.slots[kept:]
        if not self._todo:
            self._free_spare()

    def _free_spare(self) -> None:
        self.parts.memory.free(self.pin.tree.account, self._spare)
        self._spare = []

    def _tell(self, job: ReadJob, kept: set[int]) -> None:
        """Publish that these blocks are in RAM now."""
        if kept and self.parts.events.active:
            mine = [(slot, head) for slot, head in zip(job.slots, job.heads, strict=True) if slot in kept]
            records = [self.parts.memory.ram.record(slot) for slot, _ in mine]
            heads, forms = [head for _, head in mine], [Form(codec_in(record)[0], len(record)) for record in records]
            self.parts.events.publish_stored(heads, TierName.RAM, forms)

    def _lose(self, block: int, place: int, fault: str) -> None:
        """A record is bad: it is forgotten. One that could not be read for a tier that is out is not to blame."""
        if fault == TIER_OUT:
            return
        self.parts.store.count_corrupt(fault, place)
        self.parts.copies.release(self.parts.index.lose(self.pin, block, SSD, place, Loss.CORRUPT))


def plan(in_ram: Sequence[int], on_ssd: Sequence[int]) -> list[Batch]:
    """Cut the blocks that are on SSD and not in RAM into batches: consecutive blocks of one length, some 4 MiB each."""
    batches: list[Batch] = []
    first, run = 0, list[int]()
    for block, (ram, ssd) in enumerate(zip(in_ram, on_ssd, strict=True)):
        if run and (ram >= 0 or ssd < 0 or bytes_of(ssd) != bytes_of(run[0]) or _is_full(run)):
            batches.append(Batch(first, run))
            run = []
        if ram < 0 <= ssd:
            if not run:
                first = block
            run.append(ssd)
    if run:
        batches.append(Batch(first, run))
    return batches


def _is_full(run: Sequence[int]) -> bool:
    return len(run) == max(1, min(JOB_BLOCKS, JOB_BYTES // bytes_of(run[0])))

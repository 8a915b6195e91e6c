"""The gpu tier: blocks in slots of device memory, ready for attention.

A place is a slot of the slab. What lies there is a block's record under codec `none`: `payload` is what attention
reads, on the device, and the head page before it is filled only where a whole record was `put`. Nothing is evicted
here.

Whose bytes: whoever is handed a slot by `allocate` sees its own owner's former bytes there, or zeros, never another's.
A slot that changes hands is zeroed on the device, before anything that the new owner queues. What `put` stores is
overwritten from end to end before its place is known, and counts as anybody's afterwards.

Order on the device: see `ordering`. In short: drop a place when all that reads it is queued, on the engine's stream or
on the current one; do not upload into a place that kernels have been queued for; and hold a place, and the host memory
of a transfer, until the transfer has ended. A place that is dropped before is forgotten at once and free when it has.

Memory: extents from the device, up to the capacity, as they are needed. A device that has no more to give is no room.
When the engine itself runs out of memory, `give_back` makes the tier smaller, and it grows again after a while.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer
from kvpool.errors import InputError
from kvpool.tiers.extents import Bytes
from kvpool.tiers.gpu.device import Device, device_faults
from kvpool.tiers.gpu.memory import ANYBODY, LAST_PAUSE_S, DeviceSlot, DeviceSource, Owner
from kvpool.tiers.gpu.ordering import Ordering
from kvpool.tiers.gpu.staging import StagingPool
from kvpool.tiers.gpu.transfer import Copy, Traffic, Transfer, Transfers, Way
from kvpool.tiers.slab import EXTENTS_PER_CAPACITY, MAX_EXTENT_BYTES, SlabOf
from kvpool.tiers.tier import TierName, TierUnavailableError

STAGING_BUFFER_BYTES = 4 << 20
STAGING_BUFFERS = 16
MARGIN_BYTES = 512 << 20
"""Device memory that growing leaves to the engine."""
BUDGET_S = 10.0
"""How long `put` and `get` wait without progress."""
CLOSE_S = 5.0
"""How long closing waits for transfers under way."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuStats:
    """What the tier holds now, in bytes, and counts since it was opened."""

    capacity_bytes: int
    usable_bytes: int
    """The capacity, or less after the engine ran out of memory."""
    used_bytes: int
    """Held in slots that are in use."""
    reserved_bytes: int
    """Device memory held in extents, in use or not."""
    stranded_bytes: int
    """Unused bytes that only records of one size can have, unless something is moved."""
    staging_bytes: int
    """Host memory held in staging buffers."""
    extents: int
    grown: int
    """Extents allocated."""
    given_back: int
    """Extents let go."""
    out_of_memory: int
    """How often the device had no memory to give: to this tier, or to the engine, which said so."""
    handed_out: int
    """Slots handed out."""
    cleared: int
    """Of these, zeroed because the last owner was another."""
    reused_share: float
    """Share of `handed_out` for which no memory had to be allocated."""
    uploads: Traffic
    downloads: Traffic
    in_flight: int
    """Transfers that have not ended."""


class GpuTier:
    """Holds records in device memory; implements `LocalTier`. Safe from any thread.

    `initial_bytes` are allocated at once, as far as they are to be had. `streams` are for copies, half of them each
    way. `extent_bytes` None: derived from the capacity. `clock` counts seconds. Raises `TierUnavailableError` when the
    device fails, as every method but `drop` and `close` may.
    """

    name = TierName.GPU

    def __init__(
        self,
        capacity_bytes: int,
        *,
        device: Device,
        initial_bytes: int = 0,
        streams: int = 8,
        extent_bytes: int | None = None,
        staging_buffer_bytes: int = STAGING_BUFFER_BYTES,
        staging_buffers: int = STAGING_BUFFERS,
        margin_bytes: int = MARGIN_BYTES,
        budget_s: float = BUDGET_S,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        with device_faults():
            self._ordering = Ordering(device)
            staging = StagingPool(device, buffer_bytes=staging_buffer_bytes, count=staging_buffers)
            self._transfers = Transfers(device, self._ordering, staging, streams=streams, clock=clock, pause=pause)
        self._device = device
        self._source = DeviceSource(device, self._ordering, margin_bytes=margin_bytes, clock=clock)
        fixed = min(MAX_EXTENT_BYTES, capacity_bytes // EXTENTS_PER_CAPACITY) if extent_bytes is None else extent_bytes
        self.slab: SlabOf[DeviceSlot] = SlabOf(capacity_bytes, self._source, extent_bytes=fixed)
        self._capacity_bytes = capacity_bytes
        self._budget_s = budget_s
        self._lock = threading.Lock()
        self._held: dict[int, DeviceSlot] = {}  # by place: those in use, and not dropped
        self._handed_out = 0
        self._cleared = 0
        self._closed = False
        self._take_initially(initial_bytes)

    @property
    def capacity_bytes(self) -> int:
        """The most that extents of device memory may take."""
        return self._capacity_bytes

    @property
    def usable_bytes(self) -> int:
        """The capacity, or less after the engine ran out of memory."""
        return self.slab.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the places in use. Above `usable_bytes` only until what `resize` or `give_back` named is dropped."""
        return self.slab.used_bytes

    def allocate(self, record_bytes: int, owner: Owner) -> int | None:
        """Return a place for a record of this size (whole pages of 4 KiB), or None when there is no room."""
        places = self.allocate_many(record_bytes, 1, owner)
        return places[0] if places else None

    def allocate_many(self, record_bytes: int, count: int, owner: Owner) -> list[int]:
        """Return up to `count` places: as many as there are. What they show is `owner`'s own, or zeros.

        They may be written by what the calling thread or the engine queues from now on, and by `upload`.
        """
        places = self._take(record_bytes, count)
        slots = [self._slot(place) for place in places]
        others = [slot for slot in slots if slot.shows(owner)]
        try:
            with device_faults():
                self._ordering.clear([slot.record for slot in others])
                self._ordering.let_write()
        except TierUnavailableError:
            self.drop(places)
            raise
        for slot in slots:
            slot.owner = owner
        with self._lock:
            self._cleared += len(others)
        return places

    def record(self, place: int) -> Tensor:
        """The place's memory: uint8, on the device, exactly the record's length, good for as long as it is held.

        Raises `ValueError` when the place is not in use, as all are once the tier was closed.
        """
        return self._slot(place).record

    def payload(self, place: int) -> Tensor:
        """What follows the head page: the payload from its first byte on, and its padding. Raises as `record` does."""
        try:
            return self._held[place].payload
        except KeyError:
            raise _not_in_use(place) from None

    def bytes_of(self, place: int) -> int:
        """The length of the record at a place; 0 where the place is not in use."""
        slot = self._held.get(place)
        return 0 if slot is None else slot.record.numel()

    def upload(
        self, places: Sequence[int], payloads: Sequence[Bytes], *, ended: Callable[[], None] | None = None
    ) -> Transfer:
        """Copy each payload from host memory into its place, beside the engine's work.

        It comes after whatever was queued before the last place was dropped, and not after what the engine has queued
        for these places since they were allocated. Payloads are contiguous uint8, no longer than the place has room for
        after its head page. They are copied directly where they lie in page-locked memory. `ended` is called once, by
        any thread, when the host's memory is no longer needed: not if this raises. Raises `ValueError` for places and
        lengths (nothing is copied then).
        """
        return self._copy(Way.UPLOAD, places, [_flat(payload, writable=False) for payload in payloads], ended)

    def download(
        self, places: Sequence[int], into: Sequence[Bytes], *, ended: Callable[[], None] | None = None
    ) -> Transfer:
        """Copy the beginning of each place's payload into host memory, as much as fits there.

        What the engine has queued so far comes first, so that kernels that write these places are waited for, on the
        device. Otherwise as `upload`.
        """
        return self._copy(Way.DOWNLOAD, places, [_flat(target, writable=True) for target in into], ended)

    def put(self, records: Sequence[Buffer]) -> list[int | None]:
        """Copy each record into a place of its own, in order; None where there was no room.

        Raises `ValueError` for a buffer that is not whole pages (nothing is stored then).
        """
        self._check_open()
        sources = [_whole_pages(record) for record in records]
        places: list[int | None] = []
        try:
            for source in sources:
                places.append(self._take_for_record(source.nbytes))
            self._store(places, sources)
        except TierUnavailableError:
            self._drop_if_used(places)
            raise
        return places

    def get(self, places: Sequence[int], into: Sequence[Buffer]) -> list[bool]:
        """Copy each record into its buffer; False where the place is not in use.

        Raises `ValueError` where a buffer cannot be written, or has not its record's length (nothing is copied then).
        """
        self._check_open()
        targets = [_flat(np.frombuffer(buffer, np.uint8), writable=True) for buffer in into]
        with self._lock:
            found = [self._held.get(place) for place in places]
            for place, slot, target in zip(places, found, targets, strict=True):
                if slot is not None and slot.record.numel() != target.nbytes:
                    size = slot.record.numel()
                    raise ValueError(f"the record at {place:#x} has {size} bytes; its buffer {target.nbytes}")
            held = [place for place, slot in zip(places, found, strict=True) if slot is not None]
            slots = [slot for slot in found if slot is not None]
            for slot in slots:
                slot.transfers += 1
        copies = [Copy(target, slot.record) for slot, target in zip(found, targets, strict=True) if slot is not None]
        self._finish(self._staged(Way.DOWNLOAD, copies, slots, held))
        return [slot is not None for slot in found]

    def drop(self, places: Sequence[int]) -> None:
        """Give places back, once all that reads them is queued on the engine's stream, or on the current one.

        Raises `ValueError` at the first that is not in use; those before it are free then. Once the tier was closed, it
        does nothing.
        """
        try:
            with device_faults():
                self._ordering.note_drop()
        except TierUnavailableError as error:  # an ill device runs nothing that could still read them
            _log.warning("%s", error)
        with self._lock:
            for place in () if self._closed else places:
                slot = self._slot(place)
                del self._held[place]
                if slot.transfers:
                    slot.dropped = True
                else:
                    self.slab.free(place)

    def resize(self, capacity_bytes: int) -> list[int]:
        """Change the capacity; device memory that nobody uses is given back at once.

        Return the places that must be dropped before the rest is: each extent goes with its last place.
        """
        named = self.slab.resize(capacity_bytes)
        self._capacity_bytes = capacity_bytes
        self._trim()
        return self._not_dropped(named)

    def give_back(self, nbytes: int) -> list[int]:
        """The engine is out of device memory: hold so many bytes less, and do not grow for a while.

        Return the places that must be dropped for that; what nobody used is free already.
        """
        self._source.pause(at_least_s=LAST_PAUSE_S)
        named = self.slab.resize(max(0, min(self.slab.reserved_bytes, self.usable_bytes) - nbytes))
        self._trim()
        return self._not_dropped(named)

    def follow_engine(self) -> None:
        """What the calling thread queues from now on comes after all that the engine has queued: before it reads."""
        with device_faults():
            self._ordering.follow_engine()

    def precede_engine(self) -> None:
        """What the engine queues from now on comes after all that the calling thread has queued: when it has written.

        So is what others queue after their own `follow_engine`, and downloads; and no place that the thread has read
        is written again before that.
        """
        with device_faults():
            self._ordering.precede_engine()

    def advance(self) -> None:
        """Move transfers on that nobody waits for; they also move when anybody looks at any of them."""
        self._transfers.advance()

    def stats(self) -> GpuStats:
        """A snapshot."""
        self._transfers.advance()
        slab = self.slab.stats()
        return GpuStats(
            capacity_bytes=self._capacity_bytes,
            usable_bytes=slab.capacity_bytes,
            used_bytes=slab.used_bytes,
            reserved_bytes=slab.reserved_bytes,
            stranded_bytes=slab.stranded_bytes,
            staging_bytes=self._transfers.staging.reserved_bytes,
            extents=slab.extents,
            grown=self._source.grown,
            given_back=self._source.given_back,
            out_of_memory=self._source.out_of_memory,
            handed_out=self._handed_out,
            cleared=self._cleared,
            reused_share=1 - slab.mapped / self._handed_out if self._handed_out else 1.0,
            uploads=self._transfers.traffic(Way.UPLOAD),
            downloads=self._transfers.traffic(Way.DOWNLOAD),
            in_flight=self._transfers.open_count,
        )

    def close(self) -> None:
        """Give all memory back, when transfers have ended; after 5 s those that hang are left. May be called again.

        What a view still shows stays until the view goes. Close it before the ram tier, whose memory transfers use.
        """
        self._closed = True
        if not self._transfers.close(CLOSE_S):
            _log.warning("gpu tier: closed while the device did not answer")
        self._transfers.staging.close()
        with self._lock:
            self._held.clear()
        self.slab.close()
        self._trim()

    def _take_initially(self, nbytes: int) -> None:
        try:
            while self.slab.reserved_bytes < min(nbytes, self._capacity_bytes):
                if not self.slab.prefault_extent(lambda: False):
                    return
        except OSError as error:
            _log.warning(
                "gpu tier: %d of %d bytes taken at start: %s", self.slab.reserved_bytes, nbytes, error.strerror
            )

    def _take(self, record_bytes: int, count: int) -> list[int]:
        places = self.slab.allocate_many(record_bytes, count)
        if len(places) < count:
            self._transfers.advance()  # dropped places are free when their transfers have ended
            if self.usable_bytes < self._capacity_bytes and not self._source.paused and not self._closed:
                self.slab.resize(self._capacity_bytes)
            places += self.slab.allocate_many(record_bytes, count - len(places))
        with self._lock:
            self._enter(places)
            self._handed_out += len(places)
        return places

    def _take_for_record(self, record_bytes: int) -> int | None:
        places = self._take(record_bytes, 1)
        if not places:
            self._check_open()
            return None
        return places[0]

    def _borrow(self, places: Sequence[int]) -> list[DeviceSlot]:
        """The slots, each with a transfer more. Raises `ValueError` at a place that is not in use; none has, then."""
        with self._lock:
            slots = [self._slot(place) for place in places]
            for slot in slots:
                slot.transfers += 1
        return slots

    def _return(self, slots: Iterable[DeviceSlot], places: Iterable[int]) -> None:
        """A transfer has ended."""
        with self._lock:
            for slot, place in zip(slots, places, strict=True):
                slot.transfers -= 1
                if slot.dropped and not slot.transfers:
                    slot.dropped = False
                    self.slab.free(place)

    def _copy(
        self, way: Way, places: Sequence[int], hosts: Sequence[Bytes], ended: Callable[[], None] | None
    ) -> Transfer:
        self._check_open()
        if len(places) != len(hosts):
            raise ValueError(f"{len(places)} places and {len(hosts)} buffers")
        slots = self._borrow(places)

        def end() -> None:
            self._return(slots, places)
            if ended is not None:
                ended()

        try:
            copies = [Copy(host, _beginning(slot, host)) for slot, host in zip(slots, hosts, strict=True)]
            return self._transfers.start(way, copies, end)
        except (TierUnavailableError, ValueError):
            self._return(slots, places)
            raise

    def _staged(self, way: Way, copies: Sequence[Copy], slots: Sequence[DeviceSlot], places: Sequence[int]) -> Transfer:
        """Through staging buffers, so that the caller's memory is left alone once the call has returned."""
        for slot in slots if way is Way.UPLOAD else ():
            slot.owner = ANYBODY
        try:
            return self._transfers.start_staged(way, copies, lambda: self._return(slots, places))
        except TierUnavailableError:
            self._return(slots, places)
            raise

    def _finish(self, transfer: Transfer) -> None:
        """Wait for as long as it moves."""
        landed = -1
        while transfer.landed > landed:
            landed = transfer.landed
            if transfer.wait(self._budget_s):
                return
        transfer.cancel()
        raise TierUnavailableError(TierName.GPU, f"the device did nothing for {self._budget_s:g} s")

    def _enter(self, places: Sequence[int]) -> None:
        """Lock held. They are in use from now on."""
        if self._closed and places:
            raise TierUnavailableError(TierName.GPU, "it was closed meanwhile")
        for place in places:
            self._held[place] = self.slab.view(place)

    def _slot(self, place: int) -> DeviceSlot:
        try:
            return self._held[place]
        except KeyError:
            raise _not_in_use(place) from None

    def _store(self, places: Sequence[int | None], sources: Sequence[Bytes]) -> None:
        taken = [(place, source) for place, source in zip(places, sources, strict=True) if place is not None]
        stored = [place for place, _ in taken]
        try:
            slots = self._borrow(stored)
        except ValueError:
            raise TierUnavailableError(TierName.GPU, "it was closed meanwhile") from None
        copies = [Copy(source, slot.record) for slot, (_, source) in zip(slots, taken, strict=True)]
        self._finish(self._staged(Way.UPLOAD, copies, slots, stored))

    def _drop_if_used(self, places: Sequence[int | None]) -> None:
        for place in places:
            if place is not None and self._held.get(place) is not None:
                self.drop([place])

    def _not_dropped(self, places: Sequence[int]) -> list[int]:
        return [place for place in places if self._held.get(place) is not None]

    def _trim(self) -> None:
        try:
            with device_faults():
                self._device.trim()
        except TierUnavailableError as error:
            _log.warning("%s", error)

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailableError(TierName.GPU, "it was closed")


def _not_in_use(place: int) -> ValueError:
    return ValueError(f"place {place:#x} is not in use: never handed out, or dropped")


def _beginning(slot: DeviceSlot, host: Bytes) -> Tensor:
    if not host.nbytes:
        raise InputError("a payload of 0 bytes cannot be copied")
    if host.nbytes > slot.payload.numel():
        raise InputError(f"a payload of {host.nbytes} bytes; its place has room for {slot.payload.numel()}")
    return slot.payload[: host.nbytes]


def _flat(array: Bytes, *, writable: bool) -> Bytes:
    if array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise InputError(f"a buffer of {array.dtype} {array.shape}: it must be contiguous uint8")
    if writable and not array.flags.writeable:
        raise InputError("a buffer that cannot be written")
    return array.reshape(-1)


def _whole_pages(record: Buffer) -> Bytes:
    view = np.frombuffer(record, np.uint8)
    if not view.nbytes or view.nbytes % PAGE_BYTES:
        raise ValueError(f"a record of {view.nbytes} bytes: it must be whole pages of {PAGE_BYTES}")
    return view

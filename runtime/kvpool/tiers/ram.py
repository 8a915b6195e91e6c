"""The ram tier: sealed records in slots of host memory.

A place is a slot of the slab. A block that is stored goes straight into its slot: `allocate`, fill `record`, and the
place is the caller's until it is dropped. Nothing is evicted here, and only `put` and `get` copy; other threads run
meanwhile.

Whose bytes: a slot is handed out with what its last owner left in it. Whoever allocates overwrites the whole payload
before anything reads it, and `seal` writes the head and zeroes the padding; `put` overwrites the slot from end to end.
Who reads a place holds it (a lease), for a place that was dropped is soon somebody else's.

Memory: private and anonymous, left out of core dumps. `start_prefault` touches it in the background, ahead of its use,
for a store into a page that the kernel has yet to hand out takes ten times as long. Where there is a GPU, a `page_lock`
locks each extent once it was touched, so that the device copies from and to it directly.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer
from kvpool.tiers.extents import PREFAULT_STEP_BYTES, SLOT_BITS, Bytes, PageLock
from kvpool.tiers.host_memory import available_bytes
from kvpool.tiers.slab import Slab
from kvpool.tiers.tier import TierName, TierUnavailableError

PREFAULT_MARGIN_BYTES = 512 << 20
"""What prefaulting leaves to everybody else on the machine, or in the container."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RamStats:
    """What the tier holds now, in bytes, and counts since it was made."""

    capacity_bytes: int
    used_bytes: int
    """Held in slots that are in use."""
    reserved_bytes: int
    """Mapped, in use or not."""
    stranded_bytes: int
    """Unused bytes that only records of one size can have, unless something is moved."""
    prefaulted_bytes: int
    """Touched in the background since the tier was made."""
    extents: int
    recut: int
    huge_pages: bool
    """Whether the kernel was asked for them."""


class RamTier:
    """Holds records in host memory; implements `LocalTier`. Safe from any thread.

    `extent_bytes` None: derived from the capacity (see `Slab`). `available_memory` says how much more memory the
    process may have; prefaulting asks it. `page_lock` locks what prefaulting has touched, until it is unmapped; what is
    mapped otherwise stays pageable.
    """

    name = TierName.RAM

    def __init__(
        self,
        capacity_bytes: int,
        *,
        huge_pages: bool = False,
        extent_bytes: int | None = None,
        available_memory: Callable[[], int] = available_bytes,
        page_lock: PageLock | None = None,
    ) -> None:
        self.slab = Slab(capacity_bytes, huge_pages=huge_pages, extent_bytes=extent_bytes, page_lock=page_lock)
        self._available_memory = available_memory
        self._closed = threading.Event()
        self._prefault_lock = threading.Lock()
        self._prefault_thread: threading.Thread | None = None
        self._prefaulted_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        """The most that extents of memory may take."""
        return self.slab.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the places in use. Above the capacity only after `resize`, until what it named was dropped."""
        return self.slab.used_bytes

    def allocate(self, record_bytes: int) -> int | None:
        """Return a place for a record of this size (whole pages of 4 KiB), or None when there is no room."""
        return self.slab.allocate(record_bytes)

    def allocate_many(self, record_bytes: int, count: int) -> list[int]:
        """Return up to `count` places: as many as there are."""
        return self.slab.allocate_many(record_bytes, count)

    def record(self, place: int) -> Bytes:
        """Return the place's bytes: writable, exactly the record's length, good for as long as the place is held.

        Raises `ValueError` when the place is not in use, as all are once the tier was closed.
        """
        return self.slab.view(place)

    def bytes_of(self, place: int) -> int:
        """The length of the record at a place; 0 where the place is not in use."""
        return self.slab.slot_bytes(place) or 0

    def put(self, records: Sequence[Buffer]) -> list[int | None]:
        """Copy each record into a place of its own, in order; None where there was no room.

        Raises `ValueError` for a buffer that is not whole pages (nothing is stored then).
        """
        self._check_open()
        return [self._put(source) for source in [_whole_pages(record) for record in records]]

    def get(self, places: Sequence[int], into: Sequence[Buffer]) -> list[bool]:
        """Copy each record into its buffer; False where the place is not in use.

        Raises `ValueError` where a buffer cannot be written, or has not its record's length (nothing is copied then).
        """
        self._check_open()
        wanted = [self._pair(place, buffer) for place, buffer in zip(places, into, strict=True)]
        for pair in wanted:
            if pair is not None:
                np.copyto(*pair)
        return [pair is not None for pair in wanted]

    def drop(self, places: Sequence[int]) -> None:
        """Give places back. Raises `ValueError` at the first that is not in use; those before it are free then."""
        self.slab.free_many(places)

    def start_prefault(self) -> None:
        """Touch the memory up to the capacity, in a background thread that ends when that is done.

        It ends early where it would leave the machine, or the container, less than `PREFAULT_MARGIN_BYTES`: the rest is
        touched when it is used. Does nothing while it runs; after `resize` it may be called again.
        """
        with self._prefault_lock:
            running = self._prefault_thread is not None and self._prefault_thread.is_alive()
            if not running and not self._closed.is_set():
                self._prefault_thread = threading.Thread(target=self._prefault, name="kvpool-prefault", daemon=True)
                self._prefault_thread.start()

    def resize(self, capacity_bytes: int) -> list[int]:
        """Change the capacity; memory that nobody uses is given back at once.

        Return the places that must be moved or dropped before the rest is: each extent goes with its last place.
        """
        return self.slab.resize(capacity_bytes)

    def stats(self) -> RamStats:
        """A snapshot."""
        slab = self.slab.stats()
        return RamStats(
            capacity_bytes=slab.capacity_bytes,
            used_bytes=slab.used_bytes,
            reserved_bytes=slab.reserved_bytes,
            stranded_bytes=slab.stranded_bytes,
            prefaulted_bytes=self._prefaulted_bytes,
            extents=slab.extents,
            recut=slab.recut,
            huge_pages=self.slab.huge_pages,
        )

    def close(self) -> None:
        """Give all memory back; what a view still shows stays until the view goes. Calling it again does nothing.

        Afterwards nothing can be allocated, `put` and `get` raise `TierUnavailableError`, and dropping does nothing.
        """
        with self._prefault_lock:
            self._closed.set()
            thread = self._prefault_thread
        if thread is not None:
            thread.join()
        self.slab.close()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise TierUnavailableError(TierName.RAM, "it was closed")

    def _put(self, source: Bytes) -> int | None:
        place = self.slab.allocate(source.nbytes)
        if place is None:
            self._check_open()
            return None
        view = self._view_if_used(place)
        if view is None:
            raise TierUnavailableError(TierName.RAM, "it was closed meanwhile")
        np.copyto(view, source)
        return place

    def _pair(self, place: int, buffer: Buffer) -> tuple[Bytes, Bytes] | None:
        """Where the record goes, and the record; None where the place is not in use."""
        record, target = self._view_if_used(place), np.frombuffer(buffer, np.uint8)
        if not target.flags.writeable:
            raise ValueError(f"the buffer for the record at {place:#x} cannot be written")
        if record is not None and record.nbytes != target.nbytes:
            raise ValueError(f"the record at {place:#x} has {record.nbytes} bytes; its buffer {target.nbytes}")
        return None if record is None else (target, record)

    def _view_if_used(self, place: int) -> Bytes | None:
        try:
            return self.slab.view(place)
        except ValueError:
            return None

    def _prefault(self) -> None:
        try:
            while touched := self.slab.prefault_extent(self._prefault_must_stop):
                self._prefaulted_bytes += touched
        except OSError as error:
            _log.warning("ram tier: touching memory ahead: %s; the rest is touched when it is used", error)

    def _prefault_must_stop(self) -> bool:
        return self._closed.is_set() or self._available_memory() < PREFAULT_MARGIN_BYTES + PREFAULT_STEP_BYTES


def region_of(place: int) -> int:
    """The extent that holds a place. Places of one region are given back to other sizes together."""
    return place >> SLOT_BITS


def _whole_pages(record: Buffer) -> Bytes:
    view = np.frombuffer(record, np.uint8)
    if not view.nbytes or view.nbytes % PAGE_BYTES:
        raise ValueError(f"a record of {view.nbytes} bytes: it must be whole pages of {PAGE_BYTES}")
    return view

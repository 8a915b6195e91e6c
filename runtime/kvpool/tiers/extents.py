"""Extents: stretches of memory that the slab cuts into slots.

An extent is cut into slots of one size at a time. Cutting it for another size keeps its pages (`mremap` moves the
border, not the bytes), for writing a page that the kernel has yet to hand out costs ten times as much as writing a warm
one. What an extent is made of is behind `ExtentMemory`: here, private anonymous mappings of the host; in the gpu tier,
device memory. Nothing here is locked: the slab does that.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
View = TypeVar("View")
"""What a slot is seen as: `Bytes` on the host."""
View_co = TypeVar("View_co", covariant=True)

SLOT_BITS = 32
INDEX_MASK = (1 << SLOT_BITS) - 1
PREFAULT_STEP_BYTES = 8 << 20

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_POPULATE_WRITE = 23
"""Linux 5.14: make pages writable without changing what they hold."""


class Rows(Protocol[View_co]):
    """The views of an extent's slots, by their index."""

    def __getitem__(self, index: int, /) -> View_co:
        """Raises `IndexError` where there is no such slot."""
        ...


class ExtentMemory(Protocol[View_co]):
    """The memory of one extent. Called with the slab's lock held, all but `touch`."""

    @property
    def nbytes(self) -> int:
        """Bytes that it has."""
        ...

    def resize(self, nbytes: int) -> None:
        """Have so many bytes from now on, where that costs nothing; otherwise nothing changes. It is empty now."""
        ...

    def rows(self, slots: int, slot_bytes: int) -> Rows[View_co]:
        """One view for each slot, in order, from its first byte on: they replace all that were made before."""
        ...

    def touch(self, stopped: Callable[[], bool]) -> int:
        """Make it ready ahead of its use, until `stopped()`; the bytes that are. Raises `OSError` without memory."""
        ...

    def release(self) -> None:
        """Give the memory back; where a view of it is still held, when the last one goes."""
        ...


class Extent(Generic[View]):
    """Memory that is cut into `slots` slots of `slot_bytes` (both 0: not cut yet).

    A slot is `number << 32 | index`. Every cut takes a new number, so that a slot of an earlier cut is known as stale.
    `free` lists the slots that are not in use; `claim` says for which slot size the extent is being emptied, if any.
    """

    __slots__ = ("claim", "free", "memory", "number", "rows", "slot_bytes", "slots")

    def __init__(self, number: int, memory: ExtentMemory[View]) -> None:
        self.number = number
        self.memory = memory
        self.slot_bytes = 0
        self.slots = 0
        self.free: list[int] = []
        self.rows: Rows[View] = ()
        self.claim: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self.memory.nbytes

    @property
    def used_slots(self) -> int:
        """Slots in use."""
        return self.slots - len(self.free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use."""
        return self.used_slots * self.slot_bytes

    @property
    def is_empty(self) -> bool:
        """No slot is in use."""
        return len(self.free) == self.slots

    def slots_in_use(self) -> list[int]:
        """The slots in use, lowest first."""
        first = self.number << SLOT_BITS
        return sorted(set(range(first, first + self.slots)).difference(self.free))

    def cut(self, number: int, slot_bytes: int, slots: int) -> None:
        """Cut this empty extent anew. The memory is resized to fit, where it can be.

        Otherwise it keeps its length and holds as many slots as that allows, more or fewer, maybe none.
        """
        self.rows = ()
        if slot_bytes * slots != self.nbytes:
            self.memory.resize(slot_bytes * slots)
            slots = self.nbytes // slot_bytes
        self.number = number
        self.slot_bytes = slot_bytes
        self.slots = slots
        first = number << SLOT_BITS
        self.free = list(range(first + slots - 1, first - 1, -1))
        if slots:
            self.rows = self.memory.rows(slots, slot_bytes)

    def unmap(self) -> None:
        """Give the memory back; where a view of it is still held, when the last one goes."""
        self.rows = ()
        self.memory.release()


class PageLock(Protocol):
    """Keeps pages of the host where they are, so that a device may copy from and to them directly."""

    def lock(self, address: int, nbytes: int) -> bool:
        """Lock these whole pages; False where that is not to be had, which is no error."""
        ...

    def unlock(self, address: int) -> None:
        """Undo it, before the pages go."""
        ...


class HostMemory:
    """A private anonymous mapping, page-aligned, left out of core dumps: prompts do not belong there.

    `page_lock` locks its pages once they were touched; then it is never resized, for locked pages cannot move.
    """

    __slots__ = ("_locked_at", "_mapping", "_page_lock")

    def __init__(self, nbytes: int, *, huge_pages: bool = False, page_lock: PageLock | None = None) -> None:
        self._mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_DONTDUMP)
        if huge_pages:
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._page_lock = page_lock
        self._locked_at: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the mapping."""
        return len(self._mapping)

    def resize(self, nbytes: int) -> None:
        """Resize the mapping, where nobody looks at it, its pages are not locked, and the system agrees."""
        if self._locked_at is None:
            try:
                self._mapping.resize(nbytes)
            except (BufferError, OSError):
                return

    def rows(self, slots: int, slot_bytes: int) -> Bytes:
        """Writable, with what lay there before."""
        return np.frombuffer(self._mapping, np.uint8, slots * slot_bytes).reshape(slots, slot_bytes)

    def touch(self, stopped: Callable[[], bool]) -> int:
        """Have the kernel hand out every page, then lock them. Other threads run meanwhile."""
        pages = np.frombuffer(self._mapping, np.uint8)
        touched = touch(pages, stopped)
        if self._page_lock is not None and touched == len(pages):
            address = pages.ctypes.data
            self._locked_at = address if self._page_lock.lock(address, touched) else None
        return touched

    def release(self) -> None:
        """Unmap it. Who still holds a view reads old bytes, never another's: nobody gets this mapping."""
        if self._page_lock is not None and self._locked_at is not None:
            self._page_lock.unlock(self._locked_at)
            self._locked_at = None
        try:
            self._mapping.close()
        except BufferError:
            return


class HostSource:
    """Maps the memory of a slab's extents on the host. `huge_pages` asks for 2 MiB pages where the kernel allows it."""

    def __init__(self, *, huge_pages: bool = False, page_lock: PageLock | None = None) -> None:
        self.huge_pages = huge_pages and huge_pages_allowed()
        self._page_lock = page_lock

    def __call__(self, nbytes: int) -> HostMemory:
        """So many bytes. Raises `OSError` when the system has no memory to give."""
        return HostMemory(nbytes, huge_pages=self.huge_pages, page_lock=self._page_lock)


def huge_pages_allowed() -> bool:
    """Whether this kernel grants transparent huge pages to those who ask."""
    try:
        return "[never]" not in _THP.read_text()
    except OSError:
        return False


def touch(pages: Bytes, stopped: Callable[[], bool]) -> int:
    """Have the kernel hand out every page of memory that nobody else uses yet, some 8 MiB at a time.

    Return the bytes touched: fewer than all once `stopped()`. Other threads run meanwhile. Raises `OSError` when the
    system is out of memory.
    """
    for offset in range(0, len(pages), PREFAULT_STEP_BYTES):
        if stopped():
            return offset
        _touch_step(pages[offset : offset + PREFAULT_STEP_BYTES])
    return len(pages)


def _touch_step(pages: Bytes) -> None:
    if _libc.madvise(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(len(pages)), _MADV_POPULATE_WRITE) == 0:
        return
    error = ctypes.get_errno()
    if error != errno.EINVAL:
        raise OSError(error, os.strerror(error))
    pages.fill(0)  # before Linux 5.14


_libc = ctypes.CDLL(None, use_errno=True)

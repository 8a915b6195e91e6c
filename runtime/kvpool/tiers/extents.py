"""Extents: the anonymous mappings that the slab cuts into slots.

An extent is one private mapping, page-aligned, cut into slots of one size at a time. Cutting it for another size keeps
its pages (`mremap` moves the border, not the bytes), for writing a page that the kernel has yet to hand out costs ten
times as much as writing a warm one. Nothing here is locked: the slab does that.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]

SLOT_BITS = 32
INDEX_MASK = (1 << SLOT_BITS) - 1
PREFAULT_STEP_BYTES = 8 << 20

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_POPULATE_WRITE = 23
"""Linux 5.14: make pages writable without changing what they hold."""


class Extent:
    """A mapping of `nbytes`, cut into `slots` slots of `slot_bytes` (both 0: not cut yet).

    A slot is `number << 32 | index`. Every cut takes a new number, so that a slot of an earlier cut is known as stale.
    `free` lists the slots that are not in use; `claim` says for which slot size the extent is being emptied, if any.
    """

    __slots__ = ("claim", "free", "memory", "number", "rows", "slot_bytes", "slots")

    def __init__(self, number: int, nbytes: int, *, huge_pages: bool) -> None:
        self.number = number
        self.memory = _mapped(nbytes, huge_pages=huge_pages)
        self.slot_bytes = 0
        self.slots = 0
        self.free: list[int] = []
        self.rows: Bytes = np.empty((0, 0), np.uint8)
        self.claim: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the mapping."""
        return len(self.memory)

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
        """Cut this empty extent anew. The mapping is resized to fit, where nobody looks at it and the system agrees.

        Otherwise it keeps its length and holds as many of the slots as that allows, maybe none.
        """
        self.rows = np.empty((0, 0), np.uint8)
        try:
            if slot_bytes * slots != self.nbytes:
                self.memory.resize(slot_bytes * slots)
        except (BufferError, OSError):
            slots = min(slots, self.nbytes // slot_bytes)
        self.number = number
        self.slot_bytes = slot_bytes
        self.slots = slots
        first = number << SLOT_BITS
        self.free = list(range(first + slots - 1, first - 1, -1))
        used = slots * slot_bytes
        self.rows = np.frombuffer(self.memory, np.uint8, used).reshape(slots, slot_bytes) if used else self.rows

    def unmap(self) -> None:
        """Give the memory back; where a view of it is still held, when the last one goes."""
        self.rows = np.empty((0, 0), np.uint8)
        with suppress(BufferError):  # whoever holds the view reads old bytes, never another's: nobody gets this mapping
            self.memory.close()


def huge_pages_allowed() -> bool:
    """Whether this kernel grants transparent huge pages to those who ask."""
    try:
        return "[never]" not in _THP.read_text()
    except OSError:
        return False


def touch(memory: Any, stopped: Callable[[], bool]) -> int:
    """Have the kernel hand out every page of a mapping that nobody else uses yet, some 8 MiB at a time.

    Return the bytes touched: fewer than all once `stopped()`. Other threads run meanwhile. Raises `OSError` when the
    system is out of memory.
    """
    pages = np.frombuffer(memory, np.uint8)
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


def _mapped(nbytes: int, *, huge_pages: bool) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)  # prompts do not belong in core dumps
    if huge_pages:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_libc = ctypes.CDLL(None, use_errno=True)

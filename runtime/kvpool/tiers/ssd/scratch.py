"""Page-aligned memory for what cannot go straight from a caller's buffer to the disk: tagged heads, unaligned records.

Pieces are of one size and used again. At most `_KEPT` idle ones are kept; an operation that finds none makes its own.
"""

import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer

Bytes: TypeAlias = npt.NDArray[np.uint8]
"""A one-dimensional view of some buffer's bytes."""

SCRATCH_BYTES = 1 << 20
_KEPT = 4


class Scratch:
    """Lends pieces of `SCRATCH_BYTES`. Safe from any thread."""

    def __init__(self) -> None:
        self._idle: deque[Bytes] = deque(maxlen=_KEPT)

    @contextmanager
    def lend(self) -> Iterator[Bytes]:
        """A piece of aligned memory for the time of the context; it holds anything."""
        try:
            piece = self._idle.pop()
        except IndexError:
            piece = aligned(SCRATCH_BYTES)
        try:
            yield piece
        finally:
            self._idle.append(piece)


def aligned(nbytes: int) -> Bytes:
    """`nbytes` of zeros on a page boundary."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def bytes_view(buffer: Buffer) -> Bytes:
    """`buffer`'s bytes, without a copy. Raises `ValueError` where they are not contiguous."""
    if type(buffer) is np.ndarray and buffer.dtype == np.uint8 and buffer.ndim == 1 and buffer.flags.c_contiguous:
        return buffer
    return np.frombuffer(buffer, np.uint8)


def is_aligned(view: Bytes) -> bool:
    """Whether O_DIRECT can use this memory: it starts on a page boundary and is whole pages long."""
    address: int = view.__array_interface__["data"][0]
    return address % PAGE_BYTES == 0 and view.nbytes % PAGE_BYTES == 0

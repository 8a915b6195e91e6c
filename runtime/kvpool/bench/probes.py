"""What the machine itself can do: the figures that the engine's are put beside."""

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Self

import numpy as np

from kvpool.bench.area import UnmeasurableError
from kvpool.blocks.record import Buffer


def touched(nbytes: int) -> Buffer:
    """Page-aligned memory whose pages the system has handed out, filled with noise that repeats every 64 KiB."""
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    noise = np.random.default_rng(1).integers(0, 256, 64 << 10, np.uint8)
    for offset in range(0, nbytes, noise.nbytes):
        piece = memory[offset : offset + noise.nbytes]
        np.copyto(piece, noise[: piece.nbytes])
    return memory


class Memcpy:
    """One thread's copy of blocks between two warm arenas, as large as those that the subject works on."""

    def __init__(self, block_bytes: int, blocks: int) -> None:
        self.block_bytes = block_bytes
        self._blocks = blocks
        self._from = touched(block_bytes * blocks).reshape(blocks, block_bytes)
        self._to = touched(block_bytes * blocks).reshape(blocks, block_bytes)
        self._next = cycle(range(blocks))

    def copy_one(self) -> None:
        """Copy the next block."""
        at = next(self._next)
        np.copyto(self._to[at], self._from[at])

    def copy_some(self, blocks: int) -> None:
        """Copy the next so many blocks."""
        for _ in range(blocks):
            self.copy_one()


class RawDisk:
    """O_DIRECT reads and writes of one size on a preallocated file of its own, so many at once.

    Write it once before measuring: space that was never written takes twice as long.
    """

    def __init__(self, path: Path, *, block_bytes: int, blocks: int, depth: int) -> None:
        self.block_bytes = block_bytes
        self.nbytes = block_bytes * blocks
        self._path = path
        self._offsets = range(0, block_bytes * blocks, block_bytes)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError as error:
            raise UnmeasurableError(f"no O_DIRECT in {path.parent}: {error.strerror}") from None
        os.posix_fallocate(self._fd, 0, block_bytes * blocks)
        self._threads = ThreadPoolExecutor(depth)
        self._buffers = [touched(block_bytes) for _ in range(depth)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        os.close(self._fd)
        self._path.unlink()

    def write_all(self) -> None:
        """Write the whole file."""
        self._move_all(lambda buffer, offset: os.pwrite(self._fd, buffer, offset))

    def read_all(self) -> None:
        """Read the whole file."""
        self._move_all(lambda buffer, offset: os.preadv(self._fd, [buffer], offset))

    def _move_all(self, move: Callable[[Buffer, int], int]) -> None:
        depth = len(self._buffers)

        def share(worker: int) -> None:
            for offset in self._offsets[worker::depth]:
                if move(self._buffers[worker], offset) != self.block_bytes:
                    raise UnmeasurableError("the disk moved less than it was asked to")

        list(self._threads.map(share, range(depth)))

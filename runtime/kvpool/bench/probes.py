"""What the machine itself can do: the figures that the engine's are put beside."""

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from time import perf_counter
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

    def copy_all(self) -> None:
        """Copy as many blocks as the arena has."""
        for _ in range(self._blocks):
            self.copy_one()


class RawDisk:
    """O_DIRECT reads and writes of one size on a preallocated file, so many at once."""

    def __init__(self, path: Path, *, block_bytes: int, blocks: int, depth: int) -> None:
        self.block_bytes = block_bytes
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

    def write_rate(self) -> float:
        """Bytes per second over the whole file."""
        return self._rate(lambda buffer, offset: os.pwrite(self._fd, buffer, offset))

    def read_rate(self) -> float:
        """Bytes per second over the whole file."""
        return self._rate(lambda buffer, offset: os.preadv(self._fd, [buffer], offset))

    def _rate(self, move: Callable[[Buffer, int], int]) -> float:
        depth = len(self._buffers)
        began_s = perf_counter()
        moved = self._threads.map(
            lambda worker: sum(move(self._buffers[worker], offset) for offset in self._offsets[worker::depth]),
            range(depth),
        )
        nbytes = sum(moved)
        return nbytes / (perf_counter() - began_s)

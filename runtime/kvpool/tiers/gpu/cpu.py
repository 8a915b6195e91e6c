"""Host memory as a device: what is queued is done at once, so that every event has passed.

For tests of all that is not CUDA itself, on machines without a GPU. Pages are locked in the books only.
"""

import bisect
import sys
import threading
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kvpool.tiers.gpu.device import Event, Passed, Stream

_STREAM = "cpu"
_PASSED = Passed()


class CpuDevice:
    """Implements `Device`."""

    engine_stream: Stream = _STREAM

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locked: list[tuple[int, int]] = []  # (address, end) of page-locked memory, sorted

    def allocate(self, nbytes: int) -> Tensor:
        """Memory of the host."""
        return _empty(nbytes)

    def allocate_staging(self, nbytes: int) -> Tensor:
        """Memory of the host."""
        return _empty(nbytes)

    def available_bytes(self) -> int:
        """Not known: as much as the system gives."""
        return sys.maxsize

    def reaches(self, host: Tensor) -> bool:
        """Whether it lies within what was registered, as on CUDA."""
        first = host.data_ptr()
        with self._lock:
            at = bisect.bisect_right(self._locked, (first, sys.maxsize)) - 1
            return at >= 0 and first + host.nbytes <= self._locked[at][1]

    def new_stream(self) -> Stream:
        """There is but one."""
        return _STREAM

    def current_stream(self) -> Stream:
        """There is but one."""
        return _STREAM

    def record(self, stream: Stream) -> Event:
        """It has passed."""
        return _PASSED

    def wait(self, stream: Stream, event: Event) -> None:
        """Nothing needs to wait."""

    def copy(self, stream: Stream, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy now, on this thread: torch would use them all, and one busy core would hold up every copy."""
        for target, source in pairs:
            np.copyto(target.numpy(), source.numpy())

    def clear(self, stream: Stream, memory: Iterable[Tensor]) -> None:
        """Zero now."""
        for each in memory:
            each.numpy().fill(0)

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        """Nothing is queued."""

    def trim(self) -> None:
        """The system has it already."""

    def register(self, address: int, nbytes: int) -> None:
        """Enter it in the books."""
        with self._lock:
            bisect.insort(self._locked, (address, address + nbytes))

    def unregister(self, address: int) -> None:
        """Strike it out."""
        with self._lock:
            self._locked = [locked for locked in self._locked if locked[0] != address]


def _empty(nbytes: int) -> Tensor:
    """Never an inference tensor, which could not be written outside of inference mode, whoever calls."""
    with torch.inference_mode(False):
        try:
            return torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:  # how torch's allocator for the CPU says it
            raise torch.OutOfMemoryError(str(error)) from None

"""Staging buffers: page-locked host memory through which pageable memory is copied from and to the device."""

import threading

from kvpool.tiers.extents import Bytes
from kvpool.tiers.gpu.device import Device, device_faults
from kvpool.tiers.tier import TierName, TierUnavailableError


class StagingBuffer:
    """Host memory that the device reaches; `array` is the same memory as numpy sees it."""

    __slots__ = ("array", "tensor")

    def __init__(self, device: Device, nbytes: int) -> None:
        self.tensor = device.allocate_staging(nbytes)
        self.array: Bytes = self.tensor.numpy()


class StagingPool:
    """At most `count` buffers, made when they are first needed. Safe from any thread.

    Who has taken one gives it back when nothing on the device reads or writes it any more.
    """

    def __init__(self, device: Device, *, buffer_bytes: int, count: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._device = device
        self._count = count
        self._lock = threading.Lock()
        self._free: list[StagingBuffer] = []
        self._made = 0
        self._closed = False

    @property
    def reserved_bytes(self) -> int:
        """Host memory held in buffers."""
        return self._made * self.buffer_bytes

    def take(self) -> StagingBuffer | None:
        """A buffer; None while all are taken. Raises `TierUnavailableError` when none can be made."""
        with self._lock:
            if self._closed:
                raise TierUnavailableError(TierName.GPU, "it was closed meanwhile")
            if self._free:
                return self._free.pop()
            if self._made >= self._count:
                return None
            self._made += 1
        try:
            with device_faults():
                return StagingBuffer(self._device, self.buffer_bytes)
        except BaseException:
            with self._lock:
                self._made -= 1
            raise

    def give_back(self, buffer: StagingBuffer) -> None:
        """It may be taken by somebody else from now on."""
        with self._lock:
            if self._closed:
                self._made -= 1
            else:
                self._free.append(buffer)

    def lose(self) -> None:
        """One that was taken never comes back; another may be made instead."""
        with self._lock:
            self._made -= 1

    def close(self) -> None:
        """Give all memory back; what is taken now goes when it is given back."""
        with self._lock:
            self._closed = True
            self._made -= len(self._free)
            self._free.clear()

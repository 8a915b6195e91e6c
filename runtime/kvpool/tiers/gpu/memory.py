"""Device memory for the slab: extents that are allocated when they are needed, and what a slot of one is.

Whose bytes: device memory comes with whatever lay there, of this process or of another tenant. So an extent is zeroed
whole each time that it is cut into slots, and each slot says whose bytes it has held since. `GpuTier` zeroes a slot
again before it hands it to anybody else; nothing else may hand slots out.

Growing: a GPU that is full stays full for a while, and each attempt has torch empty its cache and wait for the device.
So after an attempt that failed no other is made for a time that doubles from 0.1 s up to 30 s.
"""

import errno
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Final, TypeAlias

import torch
from torch import Tensor

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.gpu.device import Device, device_faults
from kvpool.tiers.gpu.ordering import Ordering
from kvpool.tiers.tier import TierUnavailableError

FIRST_PAUSE_S = 0.1
LAST_PAUSE_S = 30.0

Owner: TypeAlias = Hashable
"""Whoever may see a slot's bytes: say, fingerprint and tenant. Equal owners are one."""
NOBODY: Final = object()
"""The owner of a slot that holds zeros."""
ANYBODY: Final = object()
"""The owner of a slot whose bytes may be anybody's. Equal to no owner, not to itself either: see `DeviceSlot.shows`."""


class DeviceSlot:
    """A slot, for as long as its extent is cut that way.

    `record` is its memory, uint8, on the device; `payload` what follows the head page, padding included. `transfers`
    counts the copies under way from or to it; `dropped` says that it is to be freed when they are over. Both are the
    tier's.
    """

    __slots__ = ("dropped", "owner", "payload", "record", "transfers")

    def __init__(self, record: Tensor) -> None:
        self.record = record
        self.payload = record[PAGE_BYTES:]
        self.owner: Owner = NOBODY
        self.transfers = 0
        self.dropped = False

    def shows(self, owner: Owner) -> bool:
        """Whether it may hold bytes that `owner` must not see."""
        return self.owner is not NOBODY and (self.owner is ANYBODY or self.owner != owner)


class DeviceMemory:
    """One extent; implements `ExtentMemory`. Never resized: a device's allocation has one length."""

    def __init__(self, memory: Tensor, ordering: Ordering, released: Callable[[], None]) -> None:
        self.nbytes = memory.numel()
        self._memory: Tensor | None = memory
        self._ordering = ordering
        self._released = released

    def resize(self, nbytes: int) -> None:
        """It cannot be."""

    def rows(self, slots: int, slot_bytes: int) -> Sequence[DeviceSlot]:
        """Slots that hold zeros, as soon as what is queued here is done: see `Ordering.let_write`."""
        assert self._memory is not None
        with device_faults():
            self._ordering.clear([self._memory])
            rows = self._memory[: slots * slot_bytes].view(slots, slot_bytes).unbind(0)
        return [DeviceSlot(row) for row in rows]

    def touch(self, stopped: Callable[[], bool]) -> int:
        """Device memory is there once it is allocated."""
        return self.nbytes

    def release(self) -> None:
        """Let it go: torch has it back when the last view of it goes, and gives it to whoever allocates next."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._released()
            with suppress(TierUnavailableError), device_faults():  # an ill device reuses nothing
                self._ordering.retire(memory)


class DeviceSource:
    """Allocates the memory of extents, as long as the device then has `margin_bytes` left for everybody else."""

    def __init__(self, device: Device, ordering: Ordering, *, margin_bytes: int, clock: Callable[[], float]) -> None:
        self._device = device
        self._ordering = ordering
        self._margin_bytes = margin_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s = FIRST_PAUSE_S
        self._again_at = float("-inf")
        self.grown = 0
        """Extents allocated."""
        self.given_back = 0
        """Extents let go."""
        self.out_of_memory = 0
        """How often the device had no memory to give, or the engine said so."""

    def __call__(self, nbytes: int) -> DeviceMemory:
        """So many bytes. Raises `OSError` when the device has none to give, `TierUnavailableError` when it is ill."""
        if self.paused:
            raise _no_memory("the device was full a moment ago")
        with device_faults():
            try:
                if self._device.available_bytes() - nbytes < self._margin_bytes:
                    raise torch.OutOfMemoryError
                memory = self._device.allocate(nbytes)
            except torch.OutOfMemoryError:
                self.pause()
                raise _no_memory("the device is full") from None
        with self._lock:
            self._pause_s = FIRST_PAUSE_S
            self.grown += 1
        return DeviceMemory(memory, self._ordering, self._count_release)

    @property
    def paused(self) -> bool:
        """Whether no memory is asked for now."""
        return self._clock() < self._again_at

    def pause(self, at_least_s: float = 0.0) -> None:
        """The device is out of memory: ask for none for a while."""
        with self._lock:
            self.out_of_memory += 1
            self._again_at = self._clock() + max(self._pause_s, at_least_s)
            self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)

    def _count_release(self) -> None:
        with self._lock:
            self.given_back += 1


def _no_memory(reason: str) -> OSError:
    return OSError(errno.ENOMEM, reason)

"""Tier 1: device memory, ready for attention. The only part of the engine that needs torch, and only once it is opened.

    with engine's model on the device:      tier = open_gpu_tier(16 << 30, initial_bytes=4 << 30)
    host memory that the device reads:      RamTier(..., page_lock=page_lock_for("cuda", 8 << 30))

`tier` holds the slots, `transfer` moves bytes, `ordering` says what waits for what on the device, `memory` grows.
"""

from typing import TYPE_CHECKING

from kvpool.tiers.extents import PageLock
from kvpool.tiers.tier import TierName, TierUnavailableError

if TYPE_CHECKING:
    from kvpool.tiers.gpu.device import Device
    from kvpool.tiers.gpu.tier import GpuTier


def open_gpu_tier(
    capacity_bytes: int,
    *,
    initial_bytes: int = 0,
    streams: int = 8,
    pinned_memory: bool = True,
    device: str = "cuda",
) -> "GpuTier":
    """A tier on `device`: "cuda", "cuda:1", or "cpu", which is host memory through the same interface.

    To be called in the thread of the engine whose blocks it holds: the stream that is current there is the engine's,
    and what is queued on it comes before every copy. Raises `TierUnavailableError` where there is no such device, no
    torch, or a device that does not work.
    """
    opened = _device(device, pinned_memory=pinned_memory)
    from kvpool.tiers.gpu.tier import GpuTier

    return GpuTier(capacity_bytes, device=opened, initial_bytes=initial_bytes, streams=streams)


def page_lock_for(device: str, max_bytes: int) -> PageLock:
    """Locks pages of the host for `device`, `max_bytes` of them at most. Raises `TierUnavailableError` as above."""
    opened = _device(device, pinned_memory=True)
    from kvpool.tiers.gpu.pinning import PageLocks

    return PageLocks(opened.register, opened.unregister, max_bytes=max_bytes)


def _device(name: str, *, pinned_memory: bool) -> "Device":
    try:
        if name == "cpu":
            from kvpool.tiers.gpu.cpu import CpuDevice

            return CpuDevice()
        from kvpool.tiers.gpu.cuda import CudaDevice

        return CudaDevice(name, pinned_memory=pinned_memory)
    except ModuleNotFoundError as error:
        raise TierUnavailableError(TierName.GPU, f"{error.name} is not installed") from None

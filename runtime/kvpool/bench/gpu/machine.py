"""The device that the gpu tier is measured on, and plain copies on it: what it can do itself."""

from collections.abc import Callable
from time import perf_counter

from torch import Tensor

from kvpool.bench.area import UnmeasurableError
from kvpool.bench.rounds import Measure
from kvpool.tiers.gpu.cpu import CpuDevice
from kvpool.tiers.gpu.cuda import CudaDevice
from kvpool.tiers.gpu.device import Device
from kvpool.tiers.tier import TierUnavailableError

Kernel = Callable[[], object]


class Machine:
    """A device to measure on: CUDA, or host memory through the same interface, of which only trends mean anything."""

    def __init__(self, device: Device) -> None:
        self.device = device

    @classmethod
    def with_cuda(cls) -> "Machine":
        """Raises `UnmeasurableError` where there is no CUDA device."""
        try:
            return cls(CudaDevice())
        except TierUnavailableError as error:
            raise UnmeasurableError(error.reason) from None

    @classmethod
    def any(cls) -> "Machine":
        """The CUDA device, or host memory."""
        try:
            return cls.with_cuda()
        except UnmeasurableError:
            return cls(CpuDevice())

    @property
    def is_cuda(self) -> bool:
        """Whether it is the real thing."""
        return isinstance(self.device, CudaDevice)

    @property
    def name(self) -> str:
        """As torch names it."""
        return str(self.device.device) if isinstance(self.device, CudaDevice) else "cpu"

    def synchronize(self) -> None:
        """Wait until all that is queued is done."""
        if self.is_cuda:
            import torch

            torch.cuda.synchronize(self.name)

    def timed(self, work: Kernel) -> float:
        """Seconds from an idle device until all of `work` is done."""
        self.synchronize()
        began_s = perf_counter()
        work()
        self.synchronize()
        return perf_counter() - began_s

    def rate(self, work: Kernel, nbytes: int) -> Measure:
        """Measures `work`, which moves so many bytes: bytes per second."""
        return lambda: nbytes / self.timed(work)


class PlainCopies:
    """Blocks in page-locked host memory and in device memory, and `cudaMemcpyAsync` of each, on one stream a way."""

    def __init__(self, machine: Machine, block_bytes: int, blocks: int) -> None:
        device = machine.device
        self._device = device
        self.host: list[Tensor] = list(
            device.allocate_staging(block_bytes * blocks).view(blocks, block_bytes).unbind(0)
        )
        self._on_device = list(device.allocate(block_bytes * blocks).view(blocks, block_bytes).unbind(0))
        self._streams = device.new_stream(), device.new_stream()
        for block in self.host:
            block.random_(0, 256)

    def up(self) -> None:
        """Queue all blocks, host to device."""
        self._device.copy(self._streams[0], zip(self._on_device, self.host, strict=True))

    def down(self) -> None:
        """Queue all blocks, device to host."""
        self._device.copy(self._streams[1], zip(self.host, self._on_device, strict=True))

    def half_each_way(self) -> None:
        """Queue the first half up and the second half down, at once."""
        half = len(self.host) // 2
        self._device.copy(self._streams[0], zip(self._on_device[:half], self.host[:half], strict=True))
        self._device.copy(self._streams[1], zip(self.host[half:], self._on_device[half:], strict=True))

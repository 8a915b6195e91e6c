"""A CUDA device through torch.

Memory comes from torch's caching allocator, as the engine's does: what an extent gives back, the engine can have at
once. It is allocated on the engine's stream, for the allocator keeps freed memory by the stream that it was allocated
on. Streams of ours are made by `torch.cuda.Stream`, which never wait for the default stream by themselves, so that they
copy beside running compute; what must wait is said with events.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvpool.tiers.gpu.device import Event, Stream, first_line
from kvpool.tiers.tier import TierName, TierUnavailableError

_PORTABLE = 1
"""`cudaHostRegisterPortable`: locked for every context of the process."""


class CudaDevice:
    """Implements `Device`. `pinned_memory` False: no host memory is page-locked, and copies wait for the device.

    Raises `TierUnavailableError` where torch has no CUDA, there is no such GPU, or it does not compute.
    """

    def __init__(self, name: str = "cuda", *, pinned_memory: bool = True) -> None:
        self._pinned = pinned_memory
        if not torch.cuda.is_available():
            raise TierUnavailableError(TierName.GPU, _why_there_is_none())
        try:
            self.device = _named(name)
            self.engine_stream: Stream = torch.cuda.current_stream(self.device)
            self._check_that_it_computes()
        except (RuntimeError, AssertionError) as error:  # AssertionError: "Invalid device id", of torch's own checks
            raise TierUnavailableError(TierName.GPU, f"{name}: {first_line(error)}") from error

    def allocate(self, nbytes: int) -> Tensor:
        """From torch's allocator, on the engine's stream."""
        with _plain_tensors(), torch.cuda.stream(self.engine_stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def allocate_staging(self, nbytes: int) -> Tensor:
        """Page-locked; pageable where the system refuses that, which is slower and nothing else."""
        with _plain_tensors():
            if self._pinned:
                try:
                    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
                except RuntimeError:
                    self._forget_last_error()
            return torch.empty(nbytes, dtype=torch.uint8)

    def available_bytes(self) -> int:
        """Free on the device, or freed in torch's allocator, which hands it out or gives it back when it must."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free) + cached

    def reaches(self, host: Tensor) -> bool:
        """Page-locked memory. Where nothing is to be page-locked, all: the driver has staging buffers of its own."""
        return not self._pinned or host.is_pinned()

    def new_stream(self) -> Stream:
        """One of torch's pool of streams of this device; after 32 they come again."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> Stream:
        """The calling thread's; each thread begins with the default stream."""
        return torch.cuda.current_stream(self.device)

    def record(self, stream: Stream) -> Event:
        """An event without timing, the cheapest."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """`cudaStreamWaitEvent`: the host does not wait."""
        stream.wait_event(event)

    def copy(self, stream: Stream, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """`cudaMemcpyAsync` each: contiguous, of one type. With pageable memory it returns when the copy is done."""
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def clear(self, stream: Stream, memory: Iterable[Tensor]) -> None:
        """A kernel each."""
        with torch.cuda.stream(stream):
            for each in memory:
                each.zero_()

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        """Tell torch's allocator, which knows the engine's stream only."""
        for stream in streams:
            memory.record_stream(stream)

    def trim(self) -> None:
        """Empty torch's cache. It is given back with `cudaFree`, which waits for the device."""
        torch.cuda.empty_cache()

    def register(self, address: int, nbytes: int) -> None:
        """`cudaHostRegister`."""
        with torch.cuda.device(self.device):
            error = int(_runtime().cudaHostRegister(address, nbytes, _PORTABLE))
            if error:
                self._forget_last_error()
                raise RuntimeError(f"cudaHostRegister of {nbytes} bytes: CUDA error {error}")

    def unregister(self, address: int) -> None:
        """`cudaHostUnregister`."""
        with torch.cuda.device(self.device):
            error = int(_runtime().cudaHostUnregister(address))
            if error:
                self._forget_last_error()
                raise RuntimeError(f"cudaHostUnregister: CUDA error {error}")

    def _forget_last_error(self) -> None:
        """Take back the error that CUDA remembers for this thread after a call was refused.

        The next kernel launch would report it as its own: that of the engine. torch offers no `cudaGetLastError`, but
        checks it after every launch, and what was reported is forgotten.
        """
        with contextlib.suppress(RuntimeError), torch.cuda.stream(self.engine_stream):
            torch.empty(1, dtype=torch.uint8, device=self.device).fill_(1)

    def _check_that_it_computes(self) -> None:
        if int(torch.full((1024,), 3, dtype=torch.int32, device=self.device).sum()) != 3072:
            raise RuntimeError("it computes wrong sums")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Never inference tensors, which could not be written outside of inference mode, whoever calls."""
    with torch.inference_mode(False):
        yield


def _runtime() -> Any:
    """The CUDA runtime's functions that torch passes on; each returns an error number, 0 for none."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _named(name: str) -> torch.device:
    """The device, with its number. Raises `RuntimeError` where there is none of this name."""
    device = torch.device(name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if device.type != "cuda" or index >= torch.cuda.device_count():
        raise RuntimeError(f"there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return torch.device("cuda", index)


def _why_there_is_none() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device: see nvidia-smi, and CUDA_VISIBLE_DEVICES"

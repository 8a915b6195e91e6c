"""What the gpu tier asks of a device: memory, and streams on which work is queued and done in order.

`CudaDevice` is the real thing. `CpuDevice` is host memory through the same interface, where everything is done at once.
Nothing above this module knows which one it is.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kvpool.tiers.tier import TierName, TierUnavailableError

Stream: TypeAlias = Any
"""A queue of work that is done in order: on CUDA a `torch.cuda.Stream`. Can be compared and hashed."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether all that was queued before this point is done. Never waits."""
        ...


class Device(Protocol):
    """Safe from any thread. Every method may raise `RuntimeError`: see `device_faults`."""

    @property
    def engine_stream(self) -> Stream:
        """The stream on which the engine computes: the one that was current when the device was opened."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory, uint8, with whatever lies there. Raises `torch.OutOfMemoryError`."""
        ...

    def allocate_staging(self, nbytes: int) -> Tensor:
        """Host memory, uint8, page-locked if that is to be had."""
        ...

    def available_bytes(self) -> int:
        """Device memory that could be allocated now."""
        ...

    def reaches(self, host: Tensor) -> bool:
        """Whether this host memory is to be copied from and to directly, without a staging buffer."""
        ...

    def new_stream(self) -> Stream:
        """A stream beside all others."""
        ...

    def current_stream(self) -> Stream:
        """The stream on which the calling thread queues."""
        ...

    def record(self, stream: Stream) -> Event:
        """The point that `stream` has been filled to."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Have all that is queued on `stream` from now on wait for `event`. Does not wait itself."""
        ...

    def copy(self, stream: Stream, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue copies, (target, source) of one length each."""
        ...

    def clear(self, stream: Stream, memory: Iterable[Tensor]) -> None:
        """Queue the zeroing of these."""
        ...

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        """`memory` is about to be let go: nobody is given it before these streams have done what is queued now."""
        ...

    def trim(self) -> None:
        """Return memory that was let go to the system, for other processes. May take as long as what is queued."""
        ...

    def register(self, address: int, nbytes: int) -> None:
        """Page-lock host memory that is whole pages. Raises `RuntimeError` where that is refused."""
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`. Raises `RuntimeError`."""
        ...


class Passed:
    """An event of a stream that never has anything to do."""

    def query(self) -> bool:
        """True."""
        return True


@contextmanager
def device_faults() -> Iterator[None]:
    """Turns errors of the device into `TierUnavailableError`; being out of memory is none, and passes through."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TierUnavailableError(TierName.GPU, first_line(error)) from error


def first_line(error: BaseException) -> str:
    """What CUDA says, without the advice on debugging that follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

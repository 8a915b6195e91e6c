"""Devices for tests, all of host memory: one that does its work late, one that is full, one that is ill."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpool.tiers.gpu.cpu import CpuDevice
from kvpool.tiers.gpu.cuda import CudaDevice
from kvpool.tiers.gpu.device import Device, Event, Stream
from kvpool.tiers.tier import TierUnavailableError

GARBAGE = 0xAB


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self.device = device
        self.passed = False

    def query(self) -> bool:
        self.device.on_query()
        return self.passed


class LateStream:
    """Work that waits to be done, in order. A wait is work that cannot be done yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Callable[[], object] | LateEvent] = deque()


class LateDevice:
    """Does what is queued on its streams when the test says so, in any order that the waits on events allow.

    What reads or writes memory does so then, as on CUDA: whoever does not wait meets other bytes. `seed`: each look at
    an event lets a few random pieces of work be done before. Without one, nothing is done but by `run` and `step`.
    Memory comes full of garbage, and `direct` says whether the device reaches all of the host's memory.
    """

    def __init__(self, seed: int | None = None, *, direct: bool = False) -> None:
        self.engine_stream: Stream = LateStream("engine")
        self.streams: list[LateStream] = [self.engine_stream]
        self.direct = direct
        self.hung = False
        self.retired: list[tuple[int, set[Stream]]] = []
        self._random = None if seed is None else Random(seed)
        self._lock = threading.RLock()
        self._current = threading.local()

    # --- what the tier asks ---

    def allocate(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.from_numpy(np.full(nbytes, GARBAGE, np.uint8))

    def allocate_staging(self, nbytes: int) -> Tensor:
        return self.allocate(nbytes)

    def available_bytes(self) -> int:
        return sys.maxsize

    def reaches(self, host: Tensor) -> bool:
        return self.direct

    def new_stream(self) -> Stream:
        with self._lock:
            stream = LateStream(f"stream {len(self.streams)}")
            self.streams.append(stream)
        return stream

    def current_stream(self) -> Stream:
        return getattr(self._current, "stream", self.engine_stream)

    def record(self, stream: Stream) -> Event:
        event = LateEvent(self)
        with self._lock:
            stream.queue.append(lambda: setattr(event, "passed", True))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, LateEvent)
        with self._lock:
            stream.queue.append(event)

    def copy(self, stream: Stream, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            self.queue(stream, partial(np.copyto, target.numpy(), source.numpy()))

    def clear(self, stream: Stream, memory: Iterable[Tensor]) -> None:
        for each in memory:
            self.queue(stream, partial(each.numpy().fill, 0))

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        self.retired.append((memory.numel(), set(streams)))

    def trim(self) -> None:
        pass

    def register(self, address: int, nbytes: int) -> None:
        pass

    def unregister(self, address: int) -> None:
        pass

    # --- what the test does ---

    def queue(self, stream: Stream, work: Callable[[], object]) -> None:
        """A kernel of the engine."""
        with self._lock:
            stream.queue.append(work)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """The calling thread queues on `stream`."""
        before, self._current.stream = self.current_stream(), stream
        yield
        self._current.stream = before

    def step(self, stream: Stream) -> bool:
        """Do the next piece of work of a stream; False where there is none, or it must wait."""
        with self._lock:
            if not stream.queue or self.hung:
                return False
            work = stream.queue[0]
            if isinstance(work, LateEvent):
                if not work.passed:
                    return False
            else:
                work()
            stream.queue.popleft()
            return True

    def run(self, *streams: Stream) -> None:
        """Do all that can be done on these streams, or on all."""
        while sum(self.step(stream) for stream in streams or self.streams):
            pass

    def on_query(self) -> None:
        if self._random is not None:
            with self._lock:
                for stream in self._random.choices(self.streams, k=self._random.randrange(8)):
                    self.step(stream)


class FullDevice(CpuDevice):
    """Has `room_bytes` of memory, and counts what is allocated until it really goes."""

    def __init__(self, room_bytes: int) -> None:
        super().__init__()
        self.room_bytes = room_bytes
        self.allocated_bytes = 0
        self.attempts = 0

    def allocate(self, nbytes: int) -> Tensor:
        self.attempts += 1
        if self.allocated_bytes + nbytes > self.room_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate some.")
        memory = super().allocate(nbytes)
        self.allocated_bytes += nbytes
        weakref.finalize(memory.untyped_storage(), self._free, nbytes)
        return memory

    def _free(self, nbytes: int) -> None:
        self.allocated_bytes -= nbytes


class IllDevice(LateDevice):
    """Fails in whatever is named in `fails`, as a CUDA device does: every call from then on."""

    def __init__(self, seed: int | None = 1) -> None:
        super().__init__(seed)
        self.fails: set[str] = set()

    def check(self, name: str) -> None:
        if name in self.fails:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported")

    def allocate(self, nbytes: int) -> Tensor:
        self.check("allocate")
        return super().allocate(nbytes)

    def copy(self, stream: Stream, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for pair in pairs:
            super().copy(stream, [pair])
            self.check("copy")  # after the first was taken

    def clear(self, stream: Stream, memory: Iterable[Tensor]) -> None:
        self.check("clear")
        super().clear(stream, memory)

    def record(self, stream: Stream) -> Event:
        self.check("record")
        return super().record(stream)

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        self.check("retire")
        super().retire(memory, streams)

    def trim(self) -> None:
        self.check("trim")

    def on_query(self) -> None:
        self.check("query")
        super().on_query()


def cuda() -> Device:
    """The real thing; the test is skipped where there is none."""
    try:
        return CudaDevice()
    except TierUnavailableError as error:
        pytest.skip(error.reason)


REAL_DEVICES = [
    pytest.param(CpuDevice, id="cpu"),
    pytest.param(cuda, id="cuda", marks=pytest.mark.gpu),
]
"""Makers of devices that do what they are told."""
EVERY_DEVICE = [
    *REAL_DEVICES,
    pytest.param(lambda: LateDevice(seed=7), id="late"),
    pytest.param(lambda: LateDevice(seed=8, direct=True), id="late-direct"),
]

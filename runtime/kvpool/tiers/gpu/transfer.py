"""Copies between host and device, on several streams beside the engine's.

Nobody works here but the callers: a transfer is queued by the thread that starts it, and moved on by whoever looks at
any transfer. So no thread of ours competes with the engine's for Python's lock.

Direct: host memory that the device reaches (page-locked) is copied from and to as it is; everything is queued at once.
Staged: other memory goes through staging buffers, of which there are few. An upload fills one, queues its copy to the
device, and has it back once that is done; a download is emptied by the host. What finds no buffer waits its turn.

A transfer's memory, on both sides, must be held until it has ended, which `ended` tells, once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpool.tiers.extents import Bytes
from kvpool.tiers.gpu.device import Device, Event, Stream, device_faults
from kvpool.tiers.gpu.ordering import Ordering
from kvpool.tiers.gpu.staging import StagingBuffer, StagingPool
from kvpool.tiers.tier import TierName, TierUnavailableError

_EAGER_LOOKS = 20
"""So often an end is looked for without a pause: a copy of 1 MiB takes 20 us."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 20e-6, 1e-3
_UNKNOWN = object()
_LOADS_PER_LOOK = 8
"""So many staged ones are landed, and so many queued, at one look: they copy on the host, and deadlines are to hold."""


class Way(Enum):
    """Which way bytes go."""

    UPLOAD = "host-to-device"
    DOWNLOAD = "device-to-host"


class Copy(NamedTuple):
    """Host memory (one-dimensional uint8, contiguous) and device memory of the same length."""

    host: Bytes
    device: Tensor


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went one way since the tier was opened."""

    transfers: int = 0
    copied_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Load:
    """What is queued on one stream at once. `buffer` is that of a staged load under way.

    `complete` says that all of it was queued: not where the device refused some, or where Ctrl-C came between.
    """

    copies: list[Copy]
    stream: Stream
    staged: bool
    buffer: StagingBuffer | None = None
    event: Event | None = None
    complete: bool = False

    @property
    def nbytes(self) -> int:
        return sum(copy.host.nbytes for copy in self.copies)

    @property
    def has_arrived(self) -> bool:
        """Also where it never left."""
        return self.event is None or self.event.query()


class Transfer:
    """Copies under way, of one batch. Safe from any thread."""

    def __init__(self, way: Way, loads: Iterable[_Load], owner: "Transfers", ended: Callable[[], None]) -> None:
        self.way = way
        self._owner = owner
        self._ended_callback = ended
        self._lock = threading.Lock()
        self._waiting = deque(loads)
        self._queued: deque[_Load] = deque()
        self._landed = 0
        self._ended = False
        self._cancelled = False
        self._fault: TierUnavailableError | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not: none of its memory is touched any more. Never waits for the device."""
        self._owner.advance()
        return self._ended

    @property
    def landed(self) -> int:
        """Loads that have arrived: a measure of progress."""
        return self._landed

    def wait(self, deadline_s: float) -> bool:
        """Wait for its end, `deadline_s` seconds at most. Whether it has ended.

        Raises `TierUnavailableError` when the device has failed: what arrived is not known, and not looked at. Copies
        that it took before may be under way until `done`.
        """
        ended = self._owner.wait_until(lambda: self._ended, deadline_s)
        self._raise_fault()
        return ended

    def join(self, deadline_s: float) -> bool:
        """Have what the calling thread queues on its current stream from now on wait for these copies, on the device.

        False where not all of them could be queued within so many seconds: direct ones always are. Raises as `wait`.
        """
        queued = self._owner.wait_until(lambda: not self._waiting, deadline_s)
        self._raise_fault()
        if queued:
            with self._lock:
                events = [load.event for load in self._queued if load.event is not None]
            self._owner.join(events)
        return queued

    def cancel(self) -> None:
        """Queue nothing more. What is queued goes on, but staged downloads no longer reach the host's memory."""
        with self._lock:
            self._cancelled = True
            self._waiting.clear()

    def advance(self) -> bool:
        """Take note of what has arrived, and queue what can be. Whether there was anything to do."""
        with self._lock:
            moved = 0
            if not self._ended:
                moved = self._land() + self._launch()
                self._ended = not self._waiting and not self._queued
            if not self._ended:
                return moved > 0
        self._tell()
        return True

    def give_up(self, reason: str) -> None:
        """End it whatever the device does: the tier is closing, and has waited."""
        with self._lock:
            if not self._ended:
                self._fail(TierUnavailableError(TierName.GPU, reason))
                self._abandon()
                self._ended = True
        self._tell()

    def _tell(self) -> None:
        """Say once that it has ended."""
        if self._owner.forget(self):
            self._ended_callback()

    def _land(self) -> int:
        landed = 0
        try:
            with device_faults():
                while self._queued and self._queued[0].has_arrived:
                    load = self._queued[0]
                    self._take_in(load)
                    landed += 1
                    if load.staged and landed >= _LOADS_PER_LOOK:
                        break
        except TierUnavailableError as error:  # it cannot even say what has arrived: nothing more will
            self._fail(error)
            self._abandon()
        return landed

    def _take_in(self, load: _Load) -> None:
        """In an order in which Ctrl-C, wherever it comes, never makes a copy seem done that was not."""
        if not load.complete and self._fault is None:
            self._fail(TierUnavailableError(TierName.GPU, "a copy was broken off"))
        if load.buffer is not None and self.way is Way.DOWNLOAD and not self._cancelled:
            for copy, (first, end) in zip(load.copies, _spans(load.copies), strict=True):
                np.copyto(copy.host, load.buffer.array[first:end])
        self._queued.popleft()
        if load.buffer is not None:
            self._owner.staging.give_back(load.buffer)
        self._landed += 1
        self._owner.count_landed(self.way, load.nbytes)

    def _launch(self) -> int:
        launched = 0
        try:
            with device_faults():
                while self._waiting and self._take_buffer(self._waiting[0]):
                    load = self._waiting[0]
                    self._queued.append(load)
                    self._waiting.popleft()
                    self._owner.queue(load, self._pairs(load))
                    launched += 1
                    if load.staged and launched >= _LOADS_PER_LOOK:
                        break
        except (TierUnavailableError, torch.OutOfMemoryError) as error:  # what is queued by now may arrive
            self._fail(error)
        return launched

    def _take_buffer(self, load: _Load) -> bool:
        """Whether the load can be queued: it needs no staging buffer, or has one now."""
        if load.staged and load.buffer is None:
            load.buffer = self._owner.staging.take()
        return not load.staged or load.buffer is not None

    def _pairs(self, load: _Load) -> Iterable[tuple[Tensor, Tensor]]:
        hosts = _host_side(load, fill=self.way is Way.UPLOAD)
        devices = [copy.device for copy in load.copies]
        return zip(devices, hosts, strict=True) if self.way is Way.UPLOAD else zip(hosts, devices, strict=True)

    def _fail(self, error: TierUnavailableError | torch.OutOfMemoryError) -> None:
        """Lock held."""
        if isinstance(error, TierUnavailableError):
            self._fault = error
        else:
            self._fault = TierUnavailableError(TierName.GPU, "out of memory while copying")
        self._cancelled = True
        self._waiting.clear()

    def _abandon(self) -> None:
        """Lock held. The buffers under way are not used again: who knows what the device still does with them."""
        for load in self._queued:
            if load.buffer is not None:
                self._owner.staging.lose()
        self._queued.clear()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise TierUnavailableError(TierName.GPU, self._fault.reason) from self._fault


class Transfers:
    """All transfers of a tier, and the streams that they are on. `pause` sleeps so many seconds."""

    def __init__(
        self,
        device: Device,
        ordering: Ordering,
        staging: StagingPool,
        *,
        streams: int,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.device = device
        self.staging = staging
        self.streams = ordering.new_streams(streams)
        self._ordering = ordering
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        self._open: dict[Transfer, object] = {}
        self._started = dict.fromkeys(Way, 0)
        self._bytes = dict.fromkeys(Way, 0)

    def start(self, way: Way, copies: Sequence[Copy], ended: Callable[[], None]) -> Transfer:
        """Begin, directly where the device reaches the host's memory. What comes first is said in `ordering`.

        `ended` is called once, by any thread, when it has ended; never if this raises `TierUnavailableError`.
        """
        direct: list[Copy] = []
        staged: list[Copy] = []
        with device_faults():
            for copy in copies:
                (direct if self.device.reaches(host_tensor(copy.host)) else staged).append(copy)
        return self._start(way, direct, staged, ended)

    def start_staged(self, way: Way, copies: Sequence[Copy], ended: Callable[[], None]) -> Transfer:
        """As `start`, all of it through staging buffers: once it is cancelled, the host's memory is left alone."""
        return self._start(way, [], copies, ended)

    def traffic(self, way: Way) -> Traffic:
        """Counts so far."""
        with self._lock:
            return Traffic(self._started[way], self._bytes[way])

    @property
    def open_count(self) -> int:
        """Transfers that have not ended, as far as anybody has looked."""
        return len(self._open)

    def advance(self) -> bool:
        """Move all transfers on: one that nobody looks at must not keep buffers and slots from the others.

        Whether there was anything to do.
        """
        return sum(transfer.advance() for transfer in tuple(self._open)) > 0

    def wait_until(self, reached: Callable[[], bool], deadline_s: float) -> bool:
        """Move transfers on until something is reached, so many seconds at most. Whether it was."""
        give_up_at = self._clock() + deadline_s
        looks, pause_s = 0, _FIRST_PAUSE_S
        while True:
            moved = self.advance()
            if reached():
                return True
            left_s = give_up_at - self._clock()
            if left_s <= 0:
                return False
            looks = 0 if moved else looks + 1
            if looks > _EAGER_LOOKS:
                self._pause(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def close(self, deadline_s: float) -> bool:
        """Wait for all, so many seconds at most; what hangs then is given up. Whether all ended by themselves."""
        ended = self.wait_until(lambda: not self._open, deadline_s)
        for transfer in tuple(self._open):
            transfer.give_up("it was closed while the device did not answer")
        return ended

    def queue(self, load: _Load, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Queue a load's copies. Its event is set even if that fails midway: some of them may be under way."""
        try:
            self.device.copy(load.stream, pairs)
            load.complete = True
        finally:
            load.event = self.device.record(load.stream)

    def join(self, events: Sequence[Event]) -> None:
        """Have the calling thread's current stream wait for these."""
        with device_faults():
            current = self.device.current_stream()
            for event in events:
                self.device.wait(current, event)

    def count_landed(self, way: Way, nbytes: int) -> None:
        """So many bytes have arrived."""
        with self._lock:
            self._bytes[way] += nbytes

    def forget(self, transfer: Transfer) -> bool:
        """It has ended. True for the first who says so."""
        return self._open.pop(transfer, _UNKNOWN) is not _UNKNOWN

    def _start(self, way: Way, direct: Sequence[Copy], staged: Sequence[Copy], ended: Callable[[], None]) -> Transfer:
        lanes = self._lanes(way)
        loads = [*_direct_loads(direct, lanes), *_staged_loads(staged, lanes, self.staging.buffer_bytes)]
        streams = {load.stream for load in loads}
        with device_faults():
            if way is Way.UPLOAD:
                self._ordering.before_upload(streams)
            else:
                self._ordering.before_download(streams)
        transfer = Transfer(way, loads, self, ended)
        with self._lock:
            self._started[way] += 1
        self._open[transfer] = None
        transfer.advance()
        return transfer

    def _lanes(self, way: Way) -> Sequence[Stream]:
        """Half of the streams for each way, so that they do not wait for each other: a device copies both ways at once.

        A single stream serves both.
        """
        half = len(self.streams) // 2
        return self.streams[half:] if way is Way.UPLOAD else self.streams[: half or 1]


def host_tensor(array: Bytes) -> Tensor:
    """The same memory as torch sees it. Of read-only memory too, about which torch would warn: it is only read."""
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Exposed(array)))


class _Exposed:
    """An array's memory, as `numpy.asarray` takes it, without the mark that it must not be written."""

    def __init__(self, array: Bytes) -> None:
        interface = dict(array.__array_interface__)
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
        self.array = array


def _host_side(load: _Load, *, fill: bool) -> Iterator[Tensor]:
    """The host's side of each copy: parts of the buffer, filled as they come if asked to; or the memory itself."""
    if load.buffer is None:
        yield from (host_tensor(copy.host) for copy in load.copies)
        return
    for copy, (first, end) in zip(load.copies, _spans(load.copies), strict=True):
        if fill:
            np.copyto(load.buffer.array[first:end], copy.host)
        yield load.buffer.tensor[first:end]


def _spans(copies: Sequence[Copy]) -> Iterator[tuple[int, int]]:
    """Where each lies in a buffer."""
    first = 0
    for copy in copies:
        yield first, first + copy.host.nbytes
        first += copy.host.nbytes


def _direct_loads(copies: Sequence[Copy], lanes: Sequence[Stream]) -> Iterator[_Load]:
    """About as many bytes on each stream, in order."""
    share = sum(copy.host.nbytes for copy in copies) / len(lanes)
    streams = cycle(lanes)
    load, filled = _Load([], next(streams), staged=False), 0
    for copy in copies:
        if filled and filled >= share:
            yield load
            load, filled = _Load([], next(streams), staged=False), 0
        load.copies.append(copy)
        filled += copy.host.nbytes
    if load.copies:
        yield load


def _staged_loads(copies: Sequence[Copy], lanes: Sequence[Stream], buffer_bytes: int) -> Iterator[_Load]:
    """A buffer's content each, on the streams by turns: small copies together, large ones in pieces."""
    streams = cycle(lanes)
    load, filled = _Load([], next(streams), staged=True), 0
    for piece in _pieces(copies, buffer_bytes):
        if filled + piece.host.nbytes > buffer_bytes:
            yield load
            load, filled = _Load([], next(streams), staged=True), 0
        load.copies.append(piece)
        filled += piece.host.nbytes
    if load.copies:
        yield load


def _pieces(copies: Sequence[Copy], buffer_bytes: int) -> Iterator[Copy]:
    for copy in copies:
        for first in range(0, copy.host.nbytes, buffer_bytes):
            yield Copy(copy.host[first : first + buffer_bytes], copy.device[first : first + buffer_bytes])

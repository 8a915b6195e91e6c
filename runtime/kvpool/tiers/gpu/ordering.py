"""What waits for what on the device.

Streams of ours run beside the engine's. So before one of them touches a slot, all must be over that was queued for it:

- what the engine has queued: kernels that write a slot that is to be copied out, or that still read one that was
  dropped and belongs to somebody else by now;
- what was queued on the current stream of a thread that dropped places;
- the clearing of slots that change hands.

Each is an event, and a stream of ours waits for all of them: on the device, never on the host.

The other way round, whoever was given cleared slots may write them from the engine's stream or from its own: both wait
for the clearing.
"""

import threading
from collections.abc import Iterable, Sequence

from torch import Tensor

from kvpool.tiers.gpu.device import Device, Event, Stream


class Ordering:
    """Of one device. Safe from any thread."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._clearing = device.new_stream()
        self._cleared: Event | None = None
        self._noted: dict[Stream, Event] = {}
        self._own: list[Stream] = [self._clearing]

    def new_streams(self, count: int) -> Sequence[Stream]:
        """Streams for copies."""
        streams = [self._device.new_stream() for _ in range(count)]
        self._own += streams
        return streams

    def note_current(self) -> None:
        """What the calling thread has queued so far must be over before places that it drops are used again.

        Of the engine's stream nothing needs to be noted: it is looked at each time.
        """
        current = self._device.current_stream()
        if current != self._device.engine_stream:
            with self._lock:
                self._noted[current] = self._device.record(current)

    def hold_back(self, streams: Iterable[Stream]) -> None:
        """Have streams of ours wait for everything that may concern the slots that they are to touch."""
        with self._lock:
            events = self._pending()
            for stream in streams:
                for event in events:
                    self._device.wait(stream, event)

    def clear(self, memory: Sequence[Tensor]) -> None:
        """Zero these, after everything else."""
        if not memory:
            return
        with self._lock:
            for event in self._pending():
                self._device.wait(self._clearing, event)
            self._device.clear(self._clearing, memory)
            self._cleared = self._device.record(self._clearing)

    def let_write(self) -> None:
        """What the calling thread, or the engine, queues from now on comes after all that was cleared."""
        cleared = self._cleared
        if cleared is None:
            return
        if cleared.query():
            with self._lock:
                if self._cleared is cleared:
                    self._cleared = None
            return
        for stream in {self._device.engine_stream, self._device.current_stream()}:
            self._device.wait(stream, cleared)

    def retire(self, memory: Tensor) -> None:
        """`memory` is about to be let go."""
        with self._lock:
            streams = {*self._own, *self._noted}
        self._device.retire(memory, streams)

    def _pending(self) -> list[Event]:
        """Lock held."""
        self._noted = {stream: event for stream, event in self._noted.items() if not event.query()}
        events = [self._device.record(self._device.engine_stream), *self._noted.values()]
        current = self._device.current_stream()
        if current != self._device.engine_stream:
            events.append(self._device.record(current))
        if self._cleared is not None:
            events.append(self._cleared)
        return [event for event in events if not event.query()]

"""What waits for what on the device.

Streams of ours run beside the engine's, and wait for events, on the device, never on the host:

- a download, for all that the engine and the calling thread have queued: kernels that write what it copies out;
- an upload, for all that was queued when a place was last dropped, on the engine's stream and on that of the thread
  that dropped it: kernels may still read a slot that is somebody else's by now. Not for what the engine has queued
  since, or it could not run beside it; so who wants other bytes in a place that kernels use drops it and takes another;
- the clearing of slots that change hands, for all of these;
- and everything, for the clearing.

The other way round, whoever was given slots may write them from the engine's stream or from its own: both wait for the
clearing, and for what other streams had queued when a place was dropped.
"""

import threading
from collections.abc import Collection, Iterable, Sequence

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

    def note_drop(self) -> None:
        """What is queued so far must be over before places that are being dropped are written again."""
        with self._lock:
            for stream in self._elsewhere():
                self._noted[stream] = self._device.record(stream)

    def before_upload(self, streams: Iterable[Stream]) -> None:
        """Have streams of ours wait until what places were dropped and cleared for is over."""
        with self._lock:
            self._wait(streams, self._settling().values())

    def before_download(self, streams: Iterable[Stream]) -> None:
        """Have streams of ours wait for that, and for all that is queued now."""
        with self._lock:
            self._wait(streams, [*self._settling().values(), *self._queued()])

    def clear(self, memory: Sequence[Tensor]) -> None:
        """Zero these, after everything else."""
        if not memory:
            return
        with self._lock:
            self._wait([self._clearing], [*self._settling().values(), *self._queued()])
            self._device.clear(self._clearing, memory)
            self._cleared = self._device.record(self._clearing)

    def let_write(self) -> None:
        """What the calling thread, or the engine, queues from now on may write slots that were just handed out.

        A stream need not wait for what it was given itself.
        """
        with self._lock:
            settling = self._settling()
            for stream in self._elsewhere() if settling else ():
                for other, event in settling.items():
                    if other != stream:
                        self._device.wait(stream, event)

    def follow_engine(self) -> None:
        """What the calling thread queues from now on comes after all that the engine has queued."""
        self._between(self._device.engine_stream, self._device.current_stream())

    def precede_engine(self) -> None:
        """What the engine queues from now on comes after all that the calling thread has queued."""
        self._between(self._device.current_stream(), self._device.engine_stream)

    def retire(self, memory: Tensor) -> None:
        """`memory` is about to be let go."""
        with self._lock:
            streams = {*self._own, *self._noted}
        self._device.retire(memory, streams)

    def _elsewhere(self) -> set[Stream]:
        """Streams that others queue on: the engine's, and the calling thread's."""
        return {self._device.engine_stream, self._device.current_stream()}

    def _between(self, before: Stream, after: Stream) -> None:
        """Nothing to do on one stream, as nearly always: threads share the default one unless they say otherwise."""
        if before != after:
            self._device.wait(after, self._device.record(before))

    def _queued(self) -> list[Event]:
        return [self._device.record(stream) for stream in self._elsewhere()]

    def _settling(self) -> dict[Stream, Event]:
        """Lock held. What must be over before slots are written, by the stream. What is over is forgotten."""
        self._noted = {stream: event for stream, event in self._noted.items() if not event.query()}
        if self._cleared is not None and self._cleared.query():
            self._cleared = None
        return self._noted if self._cleared is None else self._noted | {self._clearing: self._cleared}

    def _wait(self, streams: Iterable[Stream], events: Collection[Event]) -> None:
        for stream in streams:
            for event in events:
                self._device.wait(stream, event)

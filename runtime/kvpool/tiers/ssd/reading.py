"""Reading: records side by side come in one call, straight into the caller's buffers.

A record that cannot be read is a miss; a disk that cannot be read is not. After a failure the segment's first page says
which it is.
"""

import logging
import threading
from collections.abc import Sequence

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.batch import Part, Run, runs
from kvpool.tiers.ssd.place import segment_of
from kvpool.tiers.ssd.scratch import Bytes
from kvpool.tiers.ssd.space import Space
from kvpool.tiers.ssd.stats import Counts

_log = logging.getLogger(__name__)


class Reader:
    """Reads records by their places. A segment that is read keeps its file."""

    def __init__(self, space: Space, lock: threading.Lock, counts: Counts) -> None:
        self._space = space
        self._lock = lock
        self._counts = counts

    def get(self, places: Sequence[int], buffers: Sequence[Bytes]) -> list[bool]:
        """Read each record into its buffer; False where it did not come. Raises `OSError` where the disk is out."""
        arrived = [False] * len(buffers)
        parts = self._pin(places, buffers)
        try:
            for run in runs(parts):
                self._read(run, arrived)
        finally:
            self._unpin(parts, arrived)
        return arrived

    def _pin(self, places: Sequence[int], buffers: Sequence[Bytes]) -> list[Part]:
        parts: list[Part] = []
        with self._lock:
            for position, (place, buffer) in enumerate(zip(places, buffers, strict=True)):
                segment = self._space.segments.get(segment_of(place))
                if segment is not None and segment.is_live(place):
                    segment.readers += 1
                    parts.append(Part(position, buffer, place, segment))
        return parts

    def _unpin(self, parts: Sequence[Part], arrived: Sequence[bool]) -> None:
        with self._lock:
            for part in parts:
                part.segment.readers -= 1
        came = [part.buffer.nbytes for part in parts if arrived[part.position]]
        self._counts.add(records_read=len(came), bytes_read=sum(came), read_failures=len(parts) - len(came))

    def _read(self, run: Run, arrived: list[bool]) -> None:
        try:
            file = self._space.file(run.segment)
        except FileNotFoundError:
            _log.warning("ssd tier: %s is gone; somebody else removed it", run.segment.path)
            return
        came = file.read_records(run.buffers, run.offset)
        for part, whole in zip(run.parts, came, strict=True):
            arrived[part.position] = whole
        self._counts.add(read_calls=1)
        if not all(came):
            with file.scratch.lend() as piece:
                file.read_into(piece[:PAGE_BYTES], 0)

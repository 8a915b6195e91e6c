"""Open files of segments: a bounded number, for a large disk has more segments than a process may open files.

A caller has counted itself a reader or writer of the segment before it asks, and until it has done; only segments that
nobody uses are closed to make room.
"""

import logging
import threading
from collections import OrderedDict

from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.ledger import Segment

MAX_OPEN_SEGMENTS = 256
_log = logging.getLogger(__name__)


class Descriptors:
    """Opens segments on demand, and closes the least recently used beyond `MAX_OPEN_SEGMENTS`."""

    def __init__(self, disk: Disk, *, direct: bool) -> None:
        self._disk = disk
        self._direct = direct
        self._lock = threading.Lock()
        self._open: OrderedDict[Segment, int] = OrderedDict()

    def of(self, segment: Segment) -> int:
        """The descriptor of `segment`. Raises `OSError`."""
        with self._lock:
            fd = self._open.get(segment)
            if fd is None:
                self._close_idle(MAX_OPEN_SEGMENTS - 1)
                fd = self._open[segment] = self._disk.open(segment.path, direct=self._direct)
            else:
                self._open.move_to_end(segment)
                self._close_idle(MAX_OPEN_SEGMENTS)
            return fd

    def close(self, segment: Segment) -> None:
        """Close it if it is open; nobody uses it any more."""
        with self._lock:
            fd = self._open.pop(segment, None)
            if fd is not None:
                self._close(fd)

    def close_all(self) -> None:
        """Close every descriptor; no operation is in flight."""
        with self._lock:
            while self._open:
                self._close(self._open.popitem()[1])

    def _close_idle(self, wanted: int) -> None:
        while len(self._open) > wanted:
            idle = next((segment for segment in self._open if not segment.busy), None)
            if idle is None:  # one call uses them all
                return
            self._close(self._open.pop(idle))

    def _close(self, fd: int) -> None:
        try:
            self._disk.close(fd)
        except OSError as error:  # the descriptor is gone all the same; what was written is verified when it is read
            _log.warning("ssd tier: closing a segment: %s", error)

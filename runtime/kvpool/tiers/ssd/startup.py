"""Start-up: reads what lay in the directory when it was opened, one segment at a time.

Whoever comes first reads: the engine, which wants to know the records, or a put, which must not go before. One thread
at a time; the others wait for it.
"""

import logging
import threading
import time
from collections import deque
from contextlib import suppress

from kvpool.tiers.ssd.ledger import Phase, Segment
from kvpool.tiers.ssd.recovery import Found, Recovery, read_segment
from kvpool.tiers.ssd.sealing import Sealer
from kvpool.tiers.ssd.segment import RecoveredRecord, SegmentFormatError
from kvpool.tiers.ssd.space import Space
from kvpool.tiers.ssd.writing import Writer

_log = logging.getLogger(__name__)


class Startup:
    """Takes the discovered segments over, or discards them. `recovery` tells what came of it."""

    def __init__(self, space: Space, writer: Writer, sealer: Sealer, lock: threading.Lock) -> None:
        self.recovery = Recovery()
        self._space = space
        self._writer = writer
        self._sealer = sealer
        self._lock = lock
        self._turn = threading.Lock()
        self._unread: deque[Segment] = deque()
        self._finished = False

    def discover(self) -> None:
        """Find the segment files. Raises `OSError`."""
        segments, self.recovery.foreign_files, too_many = self._space.discover()
        self._unread.extend(segments)
        if too_many:
            self.recovery.dropped["over-capacity"] += too_many

    def finish(self) -> None:
        """Read all that is left; who asks for the records later learns of none of these."""
        while not self._finished:
            self.read_next()

    def read_next(self) -> list[RecoveredRecord] | None:
        """The records of the next segment; None when all were read."""
        with self._turn:
            if not self._unread:
                self._finished = True
                return None
            started = time.perf_counter()
            records = self._take_over(self._unread.popleft())
            self.recovery.seconds += time.perf_counter() - started
            return records

    def _take_over(self, segment: Segment) -> list[RecoveredRecord]:
        segment.writers += 1
        try:
            found = read_segment(self._space.file(segment), segment.id, segment.file_bytes, self.recovery.dropped)
        except SegmentFormatError as error:
            self._discard(segment, error.reason)
            return []
        except OSError as error:
            self._leave(segment, error)
            return []
        if found.header.blank:
            self._space.keep_blank(segment)
            return []
        with self._lock:
            segment.writers -= 1
            self._adopt(segment, found)
        self._sealer.seal_ready()
        with self._lock:
            self._writer.consider_resuming(segment)
        self.recovery.segments += 1
        self.recovery.records += len(found.records)
        return found.records

    def _adopt(self, segment: Segment, found: Found) -> None:
        places = [record.place for record in found.records]
        segment.adopt(found.header, places, found.next_page, found.variable_bytes)
        segment.entries = list(found.entries)
        segment.footer_written = found.footer
        self._sealer.complete(segment)

    def _discard(self, segment: Segment, reason: str) -> None:
        self.recovery.dropped[reason] += 1
        _log.warning("ssd tier: %s is dropped: %s", segment.path.name, reason)
        with self._lock:
            self._space.remove(segment)
        with suppress(OSError):  # counted as litter then
            self._space.discard(segment)

    def _leave(self, segment: Segment, error: OSError) -> None:
        """It may be readable another time: its file stays until its room is needed; nothing lives there till then."""
        self.recovery.dropped["io-error"] += 1
        _log.warning("ssd tier: %s cannot be read: %s", segment.path.name, error)
        with self._lock:
            segment.writers -= 1
            segment.phase = Phase.SEALED
            segment.footer_written = True
            self._space.note_records(segment)

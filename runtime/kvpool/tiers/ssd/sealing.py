"""Sealing: a segment that takes no more records is synced, and gets the footer by which a restart finds them."""

import logging
import threading

from kvpool.tiers.ssd.daily_budget import DailyBudget
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.ledger import Phase, Segment
from kvpool.tiers.ssd.segment import encode_footer
from kvpool.tiers.ssd.space import Space
from kvpool.tiers.ssd.stats import Counts

_log = logging.getLogger(__name__)


class Sealer:
    """Holds the segments that are full until nobody writes to them any more, and seals them then."""

    def __init__(self, disk: Disk, space: Space, budget: DailyBudget, lock: threading.Lock, counts: Counts) -> None:
        self._disk = disk
        self._space = space
        self._budget = budget
        self._lock = lock
        self._counts = counts
        self._full: list[Segment] = []

    def complete(self, segment: Segment) -> None:
        """No more records for this one: sealed where its footer stands, or else by `seal_ready`. Under the lock."""
        segment.phase = Phase.SEALED if segment.footer_written else Phase.FULL
        if segment.phase is Phase.FULL:
            self._full.append(segment)
        self._space.note_records(segment)

    def retry_failed(self) -> None:
        """Let `seal_ready` try again with every segment whose footer could not be written. Under the lock."""
        for segment in self._space.segments.values():
            if segment.phase is Phase.SEALED and not segment.footer_written:
                self.complete(segment)

    def seal_ready(self) -> int:
        """Seal every full segment to which nobody writes; how many could not be. Does I/O."""
        failures = 0
        while self._full:  # looked at without the lock: who fills a segment, or ends the last write to it, looks again
            with self._lock:
                segment = next((full for full in self._full if full.writers == 0), None)
                if segment is None:
                    return failures
                self._full.remove(segment)
                segment.writers += 1  # its file stays
            if not self._seal(segment):
                failures += 1
        return failures

    def _seal(self, segment: Segment) -> bool:
        """Sync the records and the file's name, write the footer, sync that.

        A fault is counted; the records can be read all the same, and a restart finds them by reading all of them.
        """
        with self._lock:
            footer = encode_footer(segment.header, segment.live_entries(), segment.next_page)
            self._budget.charge(len(footer))
        written = False
        try:
            self._budget.keep_mark()
            file = self._space.file(segment)
            self._disk.fdatasync(file.fd)
            self._space.sync_names()
            file.write_pages(footer, segment.file_bytes - len(footer))
            self._disk.fdatasync(file.fd)
            written = True
        except OSError as error:
            _log.warning("ssd tier: sealing %s: %s; a restart will scan it", segment.path.name, error)
        with self._lock:
            segment.writers -= 1
            segment.phase = Phase.SEALED
            segment.footer_written = written
            if written:
                segment.entries = []
        if written:
            self._counts.add(bytes_written=len(footer))
        else:
            self._counts.add(seal_failures=1)
        return written

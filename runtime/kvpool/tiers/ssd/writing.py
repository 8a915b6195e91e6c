"""Writing: one open segment per model, from which every put reserves its pages.

A put reserves under the lock, writes without it, and publishes the places after: nobody sees a record before its write
ended, and a failed write leaves a gap. `_grow_lock` lets one thread at a time make segments, and is taken before the
lock.
"""

import logging
import threading
from collections.abc import Sequence

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.batch import Incoming, Part, runs
from kvpool.tiers.ssd.daily_budget import DailyBudget
from kvpool.tiers.ssd.ledger import Phase, Segment
from kvpool.tiers.ssd.recovery import read_entries
from kvpool.tiers.ssd.sealing import Sealer
from kvpool.tiers.ssd.segment import Entry, SegmentFormatError, encode_entry, encode_header
from kvpool.tiers.ssd.space import Space
from kvpool.tiers.ssd.stats import Counts

_RESUME_SHARE = 8
"""After a restart a model's segment is continued if at least one part in so many of it is free."""
_PAGE_OF_ZEROS = bytes(PAGE_BYTES)
_log = logging.getLogger(__name__)


class Writer:
    """Appends records, and opens, continues and closes the segments that take them."""

    def __init__(self, space: Space, sealer: Sealer, budget: DailyBudget, lock: threading.Lock, counts: Counts) -> None:
        self.grow_lock = threading.Lock()
        self._space = space
        self._sealer = sealer
        self._budget = budget
        self._lock = lock
        self._counts = counts
        self.wants_segment = False
        """A record was refused for want of a segment, and none was freed since. Under the lock."""
        self._open: dict[Fingerprint, Segment] = {}
        self._writes = 0

    def put(self, records: Sequence[Incoming], *, guaranteed: bool, reclaim: bool) -> list[int | None]:
        """Append each record; its place, or None where there is no room or no budget for it.

        Raises `OSError`: none of them was stored.
        """
        reserved: list[Part] = []
        written = False
        try:
            self._reserve(records, reserved, guaranteed=guaranteed, reclaim=reclaim)
            if reserved:
                self._budget.keep_mark()
                self._write(reserved)
            written = True
        finally:
            self._settle(reserved, written=written)
        places: list[int | None] = [None] * len(records)
        for part in reserved:
            places[part.position] = part.place
        return places

    def fullest(self) -> float:
        """The share of its pages that the fullest open segment has given away; 1 if none is open. Under the lock."""
        return max((s.next_page * PAGE_BYTES / s.file_bytes for s in self._open.values()), default=1.0)

    def close_all(self) -> None:
        """No open segment takes more records. Under the lock."""
        for segment in list(self._open.values()):
            self._close(segment)

    def remove(self, segment: Segment) -> None:
        """Forget a segment that nobody uses, and every record in it. Under the lock; `retire` its file afterwards."""
        self.wants_segment = False
        self._open_no_more(segment)
        self._space.remove(segment)

    def consider_resuming(self, segment: Segment) -> None:
        """After a restart, of each model's sealed segments the one with the most room is open again. Under the lock."""
        rival = self._open.get(segment.header.fingerprint)
        if not segment.footer_written or _free_bytes(segment) * _RESUME_SHARE < segment.file_bytes:
            return
        if rival is None or _free_bytes(segment) > _free_bytes(rival):
            if rival is not None:
                self._close(rival)
            segment.phase = Phase.OPEN
            self._open[segment.header.fingerprint] = segment

    # --- reserving -------------------------------------------------------------------------------------------------

    def _reserve(self, records: Sequence[Incoming], reserved: list[Part], *, guaranteed: bool, reclaim: bool) -> None:
        """Fill `reserved` with every record that there is room and budget for. May raise `OSError` if that is none."""
        todo = list(reversed(records))
        while todo:
            with self._lock:
                self._reserve_while_room(todo, reserved, guaranteed=guaranteed, reclaim=reclaim)
            if not todo:
                return
            try:
                grown = self._grow(todo[-1], reclaim=reclaim)
            except OSError as error:
                if not reserved:
                    raise
                _log.warning("ssd tier: no further segment: %s", error)
                self._counts.add(refused_no_room=len(todo))
                return
            if not grown:
                self._counts.add(refused_no_room=1)
                todo.pop()

    def _reserve_while_room(
        self, todo: list[Incoming], reserved: list[Part], *, guaranteed: bool, reclaim: bool
    ) -> None:
        while todo:
            item = todo[-1]
            if not guaranteed and not self._budget.allows(item.record.nbytes):
                self._counts.add(refused_budget=1)
                todo.pop()
                continue
            segment = self._open.get(item.head.fingerprint)
            if segment is None or not _takes(segment, item, reclaim=reclaim):
                return
            todo.pop()
            self._budget.charge(item.record.nbytes)
            place = segment.reserve(item.pages, encode_entry(item.head, segment.next_page))
            segment.writers += 1
            self._writes += 1
            segment.last_write = self._writes
            reserved.append(Part(item.position, item.record, place, segment))

    def _write(self, reserved: Sequence[Part]) -> None:
        for run in runs(reserved):
            calls = self._space.file(run.segment).write_records(run.buffers, run.offset)
            nbytes = sum(part.buffer.nbytes for part in run.parts)
            self._counts.add(write_calls=calls, records_written=len(run.parts), bytes_written=nbytes)

    def _settle(self, reserved: Sequence[Part], *, written: bool) -> None:
        """Publish what was written, or leave a gap; then seal what is full and has no writer any more."""
        with self._lock:
            for part in reserved:
                part.segment.writers -= 1
                if written:
                    part.segment.publish(part.place)
                else:
                    part.segment.abandon(part.place)
                self._space.note_records(part.segment)
        self._sealer.seal_ready()

    # --- growing ---------------------------------------------------------------------------------------------------

    def _grow(self, item: Incoming, *, reclaim: bool) -> bool:
        """See that the record's model has an open segment with room for it; False if there is none to be had."""
        fingerprint = item.head.fingerprint
        with self.grow_lock:
            with self._lock:
                if not self._space.can_hold(item.pages, item.variable_bytes):
                    return False
                current = self._open.get(fingerprint)
                if current is not None and _has_room(current, item, reclaim=reclaim):
                    if not current.footer_written:
                        return True
                    current.writers += 1
                else:
                    current = None
            if current is not None:
                self._resume(current)
                return True
            segment = self._create(item, reclaim=reclaim)
            with self._lock:
                if segment is None:
                    self.wants_segment = True
                    self._close_least_recently_written()
                else:
                    self.wants_segment = False
                    if fingerprint in self._open:
                        self._close(self._open[fingerprint])
                    self._open[fingerprint] = segment
                    segment.writers -= 1
        self._sealer.seal_ready()
        return segment is not None

    def _create(self, item: Incoming, *, reclaim: bool) -> Segment | None:
        """A new segment, of which the caller is counted a writer; if need be in place of one in which nothing lives."""
        while True:
            wanted = (item.head.fingerprint, item.pages, item.variable_bytes)
            segment = self._space.create(*wanted, reclaim=reclaim)
            if segment is not None:
                return segment
            with self._lock:
                dead = next(iter(self._space.dead_segments()), None)
                if dead is None:
                    return None
                self.remove(dead)
            self._space.retire(dead)

    def _resume(self, segment: Segment) -> None:
        """Continue a segment that an earlier process sealed, or close it for good. The caller counted itself a writer.

        Its footer is unmade first, so that a crash finds a scan; the header, on which a scan depends, is made anew.
        """
        entries: list[Entry] | None = None
        unmade = False
        try:
            file = self._space.file(segment)
            entries = read_entries(file, segment.header)
            file.write_pages(encode_header(segment.header), 0)
            file.write_pages(_PAGE_OF_ZEROS, segment.file_bytes - PAGE_BYTES)
            unmade = True
        except (SegmentFormatError, OSError) as error:
            _log.warning("ssd tier: %s is not continued: %s", segment.path.name, error)
        with self._lock:
            segment.writers -= 1
            if entries is not None:
                segment.resume(entries)
            if not unmade or segment.phase is not Phase.OPEN:  # `close_all` came between
                self._close(segment)
        self._sealer.seal_ready()

    def _close(self, segment: Segment) -> None:
        self._open_no_more(segment)
        self._sealer.complete(segment)

    def _open_no_more(self, segment: Segment) -> None:
        if self._open.get(segment.header.fingerprint) is segment:
            del self._open[segment.header.fingerprint]

    def _close_least_recently_written(self) -> None:
        """Nothing can be made and nothing is sealed: give the engine a segment that it may free."""
        if self._open and not any(s.phase is Phase.SEALED for s in self._space.segments.values()):
            self._close(min(self._open.values(), key=lambda segment: segment.last_write))


def _has_room(segment: Segment, item: Incoming, *, reclaim: bool) -> bool:
    return (reclaim or not segment.for_reclaim) and segment.has_room(item.pages, item.variable_bytes)


def _takes(segment: Segment, item: Incoming, *, reclaim: bool) -> bool:
    """Whether a record may be appended now; a segment whose footer still stands has to be resumed first."""
    return not segment.footer_written and _has_room(segment, item, reclaim=reclaim)


def _free_bytes(segment: Segment) -> int:
    return segment.file_bytes - segment.next_page * PAGE_BYTES

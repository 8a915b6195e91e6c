"""The ssd tier: sealed records in append-only segment files, one open segment per model.

Memory: 9 bytes per record, the footer's entries of the open segments, 1 MiB of scratch per operation in flight.
Threads: any number put, get, drop and free at once. `_lock` guards all state and is held for arithmetic only;
`_grow_lock` lets one thread at a time make segments, and is taken first. A put reserves pages under the lock, writes
without it, and publishes the places after: nobody sees a record before its write ended. A segment in which a write or
read is in flight keeps its file. Limits: see `space` (bytes) and `daily_budget` (writes per day).

What is durable: a sealed segment (its data is synced before its footer is written); a put is not synced, so power loss
may cost the records of the open segments. `drop` is in memory only: a dropped record may come back after a restart,
verified as any other. A freed segment does not.
"""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer, Head, read_head
from kvpool.tiers.ssd.daily_budget import DailyBudget
from kvpool.tiers.ssd.disk import Disk, PosixDisk
from kvpool.tiers.ssd.ledger import Phase, Segment, SegmentInfo
from kvpool.tiers.ssd.lock import LOCK_NAME, DirectoryLock
from kvpool.tiers.ssd.marker import check_marker, write_marker
from kvpool.tiers.ssd.place import bytes_of, offset_of, segment_of
from kvpool.tiers.ssd.recovery import Found, Recovery, read_entries, read_segment
from kvpool.tiers.ssd.scratch import Bytes, aligned, bytes_view
from kvpool.tiers.ssd.segment import RecoveredRecord, SegmentFormatError, encode_entry, encode_footer
from kvpool.tiers.ssd.segment_file import MAX_RUN_BYTES, MAX_RUN_RECORDS
from kvpool.tiers.ssd.space import Space
from kvpool.tiers.ssd.stats import SsdStats
from kvpool.tiers.tier import TierName, TierUnavailableError

_RESUME_SHARE = 8
"""After a restart a model's segment is continued if at least one part in so many of it is free."""
_PAGE_OF_ZEROS = bytes(PAGE_BYTES)
_log = logging.getLogger(__name__)


class _Incoming(NamedTuple):
    """A record that is to be written."""

    position: int
    record: Bytes
    head: Head

    @property
    def pages(self) -> int:
        return self.record.nbytes // PAGE_BYTES

    @property
    def variable_bytes(self) -> int:
        return len(self.head.tokens) + len(self.head.extra)


class _Reserved(NamedTuple):
    """A record and the pages it was given."""

    position: int
    record: Bytes
    segment: Segment
    slot: int
    place: int


class _Wanted(NamedTuple):
    """A record that is to be read."""

    place: int
    position: int
    buffer: Bytes
    segment: Segment


class _Run(NamedTuple):
    """Records that lie side by side in one segment: one call to the disk."""

    segment: Segment
    offset: int
    buffers: list[Bytes]
    positions: list[int]


class SsdTier:
    """Holds sealed records in segment files; implements `LocalTier`. Made by `open`."""

    name = TierName.SSD

    def __init__(
        self, directory: Path, disk: Disk, lock: DirectoryLock, space: Space, state_lock: threading.Lock,
        budget: DailyBudget,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.recovery = Recovery()
        self._disk = disk
        self._directory_lock = lock
        self._space = space
        self._budget = budget
        self._lock = state_lock
        self._grow_lock = threading.Lock()
        self._open: dict[Fingerprint, Segment] = {}
        self._full: list[Segment] = []
        self._writes = 0
        self._in_flight = 0
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._unread: list[Segment] = []
        self._recovering = self._recover()
        self._recovered = False

    @classmethod
    def open(
        cls, directory: Path, *, capacity_bytes: int, segment_bytes: int | None = None,
        daily_write_bytes: int | None = None, direct_io: bool = True, disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> "SsdTier":  # fmt: skip
        """Take the directory, made if need be, and find the segments that lie there; `recovered` then reads them.

        `segment_bytes` None: derived from the capacity. `direct_io`: where the file system has it; without it the page
        cache is used. Raises `ConfigError` for sizes that cannot work, `DirectoryInUseError`, `IncompatibleDataError`
        for a newer program's data (nothing is touched then), and `TierUnavailableError`.
        """
        disk = disk or PosixDisk()
        try:
            check_marker(disk, directory)
            disk.make_directory(directory)
            lock = DirectoryLock.acquire(disk, directory, clock())
        except OSError as error:
            raise _unavailable(error, f"opening {directory}") from error
        try:
            direct = direct_io and _has_direct_io(disk, directory)
            state_lock = threading.Lock()
            space = Space(disk, directory, state_lock, capacity_bytes, segment_bytes, direct=direct, clock=clock)
            write_marker(disk, directory)
            budget = DailyBudget(disk, directory, daily_write_bytes, clock)
            tier = cls(directory, disk, lock, space, state_lock, budget)
            tier._discover()
        except OSError as error:
            lock.release()
            raise _unavailable(error, f"opening {directory}") from error
        except BaseException:
            lock.release()
            raise
        return tier

    @property
    def capacity_bytes(self) -> int:
        """The most that the directory's files may take."""
        return self._space.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """What the directory's files take, the spare's and freed ones included: they are kept to be used again."""
        return self._space.used_bytes

    @property
    def free_segments(self) -> int:
        """Segments that puts may yet begin, without the spare."""
        with self._lock:
            return self._space.free_segments()

    @property
    def spent_today_bytes(self) -> int:
        """Bytes counted against the daily budget in this UTC day."""
        with self._lock:
            return self._budget.spent_bytes

    def recovered(self) -> Iterator[list[RecoveredRecord]]:
        """What lay in the directory, segment by segment, parents before children as they were written. Once.

        To be taken to its end before the first put, which otherwise takes the rest: those records are then known to
        `places_in` alone. `recovery` is complete afterwards. A record may be dropped as soon as its list was taken.
        """
        return self._recovering

    def put(self, records: Sequence[Buffer], *, guaranteed: bool = False, reclaim: bool = False) -> list[int | None]:
        """Append each record, in order; its place, or None: no room, or the daily budget is spent.

        `guaranteed`: counted against the daily budget, but never refused for it. `reclaim`: re-appended to free its
        segment, so that the spare may be used. Raises `CorruptRecordError` or `ValueError` for a buffer that is no
        whole record (nothing is written then), and `TierUnavailableError`: none of the records was stored.
        """
        incoming = [_incoming(position, record) for position, record in enumerate(records)]
        places: list[int | None] = [None] * len(incoming)
        with self._operation():
            self._finish_recovery()
            reserved: list[_Reserved] = []
            written = False
            try:
                self._reserve(incoming, reserved, guaranteed=guaranteed, reclaim=reclaim)
                if reserved:
                    self._budget.keep_mark()
                    self._write(reserved)
                written = True
            except OSError as error:
                self._count("write_failures")
                raise _unavailable(error, "writing") from error
            finally:
                self._settle(reserved, written=written)
            for item in reserved:
                places[item.position] = item.place
        return places

    def get(self, places: Sequence[int], into: Sequence[Buffer]) -> list[bool]:
        """Read each record into its buffer; False where it is gone, did not come whole, or could not be read.

        Records side by side come in one call. Raises `ValueError` where a buffer has not its record's length.
        """
        buffers = [bytes_view(buffer) for buffer in into]
        for place, buffer in zip(places, buffers, strict=True):
            if buffer.nbytes != bytes_of(place):
                raise ValueError(f"the record at {place:#x} has {bytes_of(place)} bytes; its buffer {buffer.nbytes}")
        arrived = [False] * len(buffers)
        with self._operation():
            wanted = self._pin(places, buffers)
            try:
                for run in _runs(wanted):
                    self._read(run, arrived)
            finally:
                self._unpin(wanted, arrived)
        return arrived

    def drop(self, places: Sequence[int]) -> None:
        """Forget these records. Those of a freed segment are forgotten already; unknown ones raise `ValueError`."""
        with self._lock:
            for place in places:
                segment = self._space.segments.get(segment_of(place))
                if segment is not None:
                    segment.drop(place)
                    self._space.note_records(segment)

    def segments(self) -> list[SegmentInfo]:
        """Every segment that holds, or may take, records."""
        with self._lock:
            return [segment.info for segment in self._space.segments.values() if segment.phase is not Phase.UNREAD]

    def places_in(self, segment_id: int) -> list[int]:
        """The places in this segment that can be read; none if it is gone."""
        with self._lock:
            segment = self._space.segments.get(segment_id)
            return segment.live_places() if segment else []

    def free_segment(self, segment_id: int) -> bool:
        """Give a segment's file back; what still lives there is forgotten, on disk too.

        False, and nothing changed, while it is read or written. True if it is gone already. Raises
        `TierUnavailableError` where its file could neither be marked as free nor be unlinked: its records are
        forgotten all the same, its bytes stay counted until a later put can unlink it.
        """
        with self._operation():
            with self._lock:
                segment = self._space.segments.get(segment_id)
                if segment is None:
                    return True
                if segment.busy or segment.phase in (Phase.UNREAD, Phase.FULL):
                    return False
                self._remove(segment)
            try:
                self._space.retire(segment)
            except OSError as error:
                raise _unavailable(error, f"freeing segment {segment_id}") from error
        return True

    def wants_room(self) -> bool:
        """Whether a segment should be freed now, so that puts need not be refused soon."""
        with self._lock:
            if self._space.free_segments():
                return False
            fullest = max((s.next_page * PAGE_BYTES / s.file_bytes for s in self._open.values()), default=1.0)
            return fullest > 0.75

    def seal_all(self) -> None:
        """Make all that was put durable: sync and seal every open segment, or raise `TierUnavailableError`."""
        with self._operation():
            with self._lock:
                for segment in list(self._open.values()):
                    self._close_segment(segment)
                for segment in self._space.segments.values():
                    if segment.phase is Phase.SEALED and not segment.footer_written:
                        self._complete(segment)
            failures = self._counts["seal_failures"]
            self._seal_ready()
            if self._counts["seal_failures"] > failures:
                raise TierUnavailableError(TierName.SSD, "a segment could not be sealed")

    def resize(self, capacity_bytes: int) -> None:
        """Change the capacity. Less than what is used: blank files go at once, the rest as segments are freed."""
        self._space.check_capacity(capacity_bytes)
        with self._operation(), self._grow_lock:
            with self._lock:
                self._space.capacity_bytes = capacity_bytes
            try:
                self._space.shrink()
            except OSError as error:
                raise _unavailable(error, "shrinking") from error

    def set_daily_write_bytes(self, daily_write_bytes: int | None) -> None:
        """Change the daily budget; what was spent today stays spent."""
        with self._lock:
            self._budget.limit_bytes = daily_write_bytes

    def stats(self) -> SsdStats:
        """A snapshot of what was counted."""
        with self._lock:
            segments = list(self._space.segments.values())
            live = sum(segment.live_bytes for segment in segments)
            taken = sum((segment.next_page - 1) * PAGE_BYTES for segment in segments)
            names = SsdStats._fields[: SsdStats._fields.index("live_records")]
            counted = {name: self._counts[name] for name in names}
            return SsdStats(
                **counted, live_records=sum(segment.live_records for segment in segments), live_bytes=live,
                dead_bytes=taken - live, physical_bytes=self._space.used_bytes,
                dropped=sum(self.recovery.dropped.values()), segments=len(segments),
                free_segments=self._space.free_segments(), spent_today_bytes=self._budget.spent_bytes,
            )  # fmt: skip

    def close(self) -> None:
        """Seal what is open and give the directory back; faults are logged. An operation in flight ends first.

        The lock and the files are given back by the last operation in flight, so that no late write can meet the next
        owner. Calling it again does nothing.
        """
        if self._closed:
            return
        try:
            self.seal_all()
            self._budget.close()
        except (TierUnavailableError, OSError) as error:
            _log.warning("ssd tier: closing %s: %s", self.directory, error)
        with self._lock:
            self._closed = True
            last = self._in_flight == 0
        if last:
            self._give_back()

    # --- in flight -------------------------------------------------------------------------------------------------

    @contextmanager
    def _operation(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise TierUnavailableError(TierName.SSD, "it was closed")
            self._in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
                last = self._closed and self._in_flight == 0
            if last:
                self._give_back()

    def _count(self, name: str, increase: int = 1) -> None:
        with self._lock:
            self._counts[name] += increase

    def _give_back(self) -> None:
        self._space.descriptors.close_all()
        self._directory_lock.release()

    # --- writing ---------------------------------------------------------------------------------------------------

    def _reserve(
        self, incoming: Sequence[_Incoming], reserved: list[_Reserved], *, guaranteed: bool, reclaim: bool
    ) -> None:
        """Fill `reserved` with every record that there is room and budget for. May raise `OSError` if that is none."""
        todo = list(reversed(incoming))
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
                self._count("refused_no_room", len(todo))
                return
            if not grown:
                self._count("refused_no_room")
                todo.pop()

    def _reserve_while_room(
        self, todo: list[_Incoming], reserved: list[_Reserved], *, guaranteed: bool, reclaim: bool
    ) -> None:
        while todo:
            item = todo[-1]
            segment = self._open.get(item.head.fingerprint)
            if segment is None or not _takes(segment, item, reclaim=reclaim):
                return
            todo.pop()
            if not self._budget.charge(item.record.nbytes, always=guaranteed):
                self._counts["refused_budget"] += 1
                continue
            entry = encode_entry(item.head, segment.next_page)
            index = segment.reserve(item.pages)
            segment.note_entry(entry)
            segment.writers += 1
            self._writes += 1
            segment.last_write = self._writes
            reserved.append(_Reserved(item.position, item.record, segment, index, segment.places[index]))

    def _write(self, reserved: Sequence[_Reserved]) -> None:
        for run in _runs([_Wanted(item.place, item.position, item.record, item.segment) for item in reserved]):
            calls = self._space.file(run.segment).write_records(run.buffers, run.offset)
            with self._lock:
                self._counts["write_calls"] += calls
                self._counts["records_written"] += len(run.buffers)
                self._counts["bytes_written"] += sum(buffer.nbytes for buffer in run.buffers)

    def _settle(self, reserved: Sequence[_Reserved], *, written: bool) -> None:
        """Publish what was written, or leave a gap; then seal what is full and has no writer any more."""
        with self._lock:
            for item in reserved:
                item.segment.writers -= 1
                if written:
                    item.segment.publish(item.slot)
                else:
                    item.segment.abandon(item.slot)
                    self._space.note_records(item.segment)
        self._seal_ready()

    # --- segments --------------------------------------------------------------------------------------------------

    def _grow(self, item: _Incoming, *, reclaim: bool) -> bool:
        """See that the record's model has an open segment with room for it; False if there is none to be had."""
        fingerprint = item.head.fingerprint
        with self._grow_lock:
            with self._lock:
                current = self._open.get(fingerprint)
                if current is not None and _has_room(current, item, reclaim=reclaim):
                    if not current.footer_written:
                        return True
                    current.writers += 1
                else:
                    current = None
            if current is not None:
                return self._resume(current)
            segment = self._create(item, reclaim=reclaim)
            with self._lock:
                if segment is None:
                    self._close_least_recently_written()
                else:
                    if fingerprint in self._open:
                        self._close_segment(self._open[fingerprint])
                    self._open[fingerprint] = segment
        self._seal_ready()
        return segment is not None

    def _create(self, item: _Incoming, *, reclaim: bool) -> Segment | None:
        """A new segment, if need be in place of one in which nothing lives."""
        while True:
            wanted = (item.head.fingerprint, item.pages, item.variable_bytes)
            segment = self._space.create(*wanted, reclaim=reclaim)
            if segment is not None:
                return segment
            with self._lock:
                dead = next(iter(self._space.dead_segments()), None)
                if dead is None:
                    return None
                self._remove(dead)
            self._space.retire(dead)

    def _resume(self, segment: Segment) -> bool:
        """Continue a segment that an earlier process sealed. Its footer is unmade first, so that a crash finds a scan.

        The caller counted itself a writer.
        """
        try:
            entries = read_entries(self._space.file(segment), segment.header)
            self._space.file(segment).write_pages(_PAGE_OF_ZEROS, segment.file_bytes - PAGE_BYTES)
        except SegmentFormatError:
            entries = None
        finally:
            with self._lock:
                segment.writers -= 1
        with self._lock:
            if entries is not None and len(entries) == len(segment.places):
                segment.resume(entries)
            else:  # damaged since start-up: nothing is added to it
                self._close_segment(segment)
        return True

    def _remove(self, segment: Segment) -> None:
        if self._open.get(segment.header.fingerprint) is segment:
            del self._open[segment.header.fingerprint]
        self._space.remove(segment)

    def _close_segment(self, segment: Segment) -> None:
        """No more records for this one; sealed where its footer still stands, or else as soon as nobody writes."""
        del self._open[segment.header.fingerprint]
        self._complete(segment)

    def _complete(self, segment: Segment) -> None:
        segment.phase = Phase.SEALED if segment.footer_written else Phase.FULL
        if segment.phase is Phase.FULL:
            self._full.append(segment)

    def _close_least_recently_written(self) -> None:
        """Nothing can be made and nothing is sealed: give the engine a segment that it may free."""
        if self._open and not any(s.phase is Phase.SEALED for s in self._space.segments.values()):
            self._close_segment(min(self._open.values(), key=lambda segment: segment.last_write))

    def _seal_ready(self) -> None:
        while True:
            with self._lock:
                segment = next((full for full in self._full if full.writers == 0), None)
                if segment is None:
                    return
                self._full.remove(segment)
                segment.writers += 1  # its file stays
            self._seal(segment)

    def _seal(self, segment: Segment) -> None:
        """Sync the records, write the footer, sync that. A fault is counted; the records can be read all the same."""
        with self._lock:
            footer = encode_footer(segment.header, segment.live_entries(), segment.next_page)
            self._budget.charge(len(footer), always=True)
        written = False
        try:
            file = self._space.file(segment)
            self._disk.fdatasync(file.fd)
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
                self._counts["bytes_written"] += len(footer)
            else:
                self._counts["seal_failures"] += 1

    # --- reading ---------------------------------------------------------------------------------------------------

    def _pin(self, places: Sequence[int], buffers: Sequence[Bytes]) -> list[_Wanted]:
        wanted: list[_Wanted] = []
        with self._lock:
            for position, (place, buffer) in enumerate(zip(places, buffers, strict=True)):
                segment = self._space.segments.get(segment_of(place))
                if segment is not None and segment.is_live(place):
                    segment.readers += 1
                    wanted.append(_Wanted(place, position, buffer, segment))
        return wanted

    def _unpin(self, wanted: Sequence[_Wanted], arrived: Sequence[bool]) -> None:
        with self._lock:
            for item in wanted:
                item.segment.readers -= 1
                if arrived[item.position]:
                    self._counts["records_read"] += 1
                    self._counts["bytes_read"] += item.buffer.nbytes
                else:
                    self._counts["read_failures"] += 1

    def _read(self, run: _Run, arrived: list[bool]) -> None:
        try:
            file = self._space.file(run.segment)
        except OSError as error:
            _log.warning("ssd tier: opening %s: %s", run.segment.path.name, error)
            return
        for position, came in zip(run.positions, file.read_records(run.buffers, run.offset), strict=True):
            arrived[position] = came
        self._count("read_calls")

    # --- recovery --------------------------------------------------------------------------------------------------

    def _discover(self) -> None:
        self._unread, self.recovery.foreign_files, too_many = self._space.discover()
        if too_many:
            self.recovery.dropped["over-capacity"] += too_many

    def _finish_recovery(self) -> None:
        if not self._recovered:
            for _ in self._recovering:
                pass

    def _recover(self) -> Iterator[list[RecoveredRecord]]:
        for segment in self._unread:
            started = time.perf_counter()
            records = self._recover_segment(segment)
            self.recovery.seconds += time.perf_counter() - started
            if records:
                yield records
        self._unread = []
        self._recovered = True

    def _recover_segment(self, segment: Segment) -> list[RecoveredRecord]:
        segment.writers += 1
        try:
            found = read_segment(self._space.file(segment), segment.id, segment.file_bytes, self.recovery.dropped)
        except (SegmentFormatError, OSError) as error:
            reason = error.reason if isinstance(error, SegmentFormatError) else "io-error"
            self._discard(segment, reason)
            return []
        with self._lock:
            segment.writers -= 1
            if found.header.blank:
                self._space.keep_blank(segment)
                return []
            self._adopt(segment, found)
        self._seal_ready()
        with self._lock:
            self._consider_resuming(segment)
        self.recovery.segments += 1
        self.recovery.records += len(found.records)
        return found.records

    def _discard(self, segment: Segment, reason: str) -> None:
        self.recovery.dropped[reason] += 1
        _log.warning("ssd tier: %s is dropped: %s", segment.path.name, reason)
        with self._lock:
            self._space.remove(segment)
        with suppress(OSError):  # counted as litter then
            self._space.discard(segment)

    def _adopt(self, segment: Segment, found: Found) -> None:
        variable_bytes = sum(len(record.tokens) + len(record.extra) for record in found.records)
        places = [record.place for record in found.records]
        segment.adopt(found.header, places, found.next_page, variable_bytes)
        segment.entries = list(found.entries)
        self._space.note_records(segment)
        segment.footer_written = found.footer
        self._complete(segment)

    def _consider_resuming(self, segment: Segment) -> None:
        """Of each model's segments the one with the most room is open again."""
        rival = self._open.get(segment.header.fingerprint)
        if not segment.footer_written or _free_bytes(segment) * _RESUME_SHARE < segment.file_bytes:
            return
        if rival is None or _free_bytes(segment) > _free_bytes(rival):
            if rival is not None:
                rival.phase = Phase.SEALED
            segment.phase = Phase.OPEN
            self._open[segment.header.fingerprint] = segment


def _incoming(position: int, buffer: Buffer) -> _Incoming:
    record = bytes_view(buffer)
    head = read_head(record)
    if head.record_bytes != record.nbytes:
        raise ValueError(f"the record has {head.record_bytes} bytes; its buffer {record.nbytes}")
    return _Incoming(position, record, head)


def _has_room(segment: Segment, item: _Incoming, *, reclaim: bool) -> bool:
    return (reclaim or not segment.for_reclaim) and segment.has_room(item.pages, item.variable_bytes)


def _takes(segment: Segment, item: _Incoming, *, reclaim: bool) -> bool:
    """Whether a record may be appended now; a segment whose footer still stands has to be resumed first."""
    return not segment.footer_written and _has_room(segment, item, reclaim=reclaim)


def _free_bytes(segment: Segment) -> int:
    return segment.file_bytes - segment.next_page * PAGE_BYTES


def _runs(wanted: list[_Wanted]) -> Iterator[_Run]:
    """Put what lies side by side together, as much as one call takes."""
    run: _Run | None = None
    end = size = 0
    for place, position, buffer, segment in sorted(wanted, key=lambda item: item.place):
        offset = offset_of(place)
        adjacent = run is not None and segment is run.segment and offset == end
        if run is None or not adjacent or len(run.buffers) == MAX_RUN_RECORDS or size + buffer.nbytes > MAX_RUN_BYTES:
            if run is not None:
                yield run
            run, size = _Run(segment, offset, [], []), 0
        run.buffers.append(buffer)
        run.positions.append(position)
        size += buffer.nbytes
        end = offset + buffer.nbytes
    if run is not None:
        yield run


def _has_direct_io(disk: Disk, directory: Path) -> bool:
    """Whether the file system reads past the page cache; asked of the lock's file, which is there."""
    try:
        fd = disk.open(directory / LOCK_NAME, direct=True)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    try:
        disk.preadv(fd, [aligned(PAGE_BYTES)], 0)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        disk.close(fd)
    return True


def _unavailable(error: OSError, doing: str) -> TierUnavailableError:
    code = errno.errorcode.get(error.errno or 0, "EIO")
    return TierUnavailableError(TierName.SSD, f"{doing}: {code}, {os.strerror(error.errno or errno.EIO)}")

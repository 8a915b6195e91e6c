"""The ssd tier: sealed records in append-only segment files, one open segment per model.

Memory: 9 bytes per record, the footer's entries of the open segments, 1 MiB of scratch per operation in flight.
Threads: any number put, get, drop and free at once. `_lock` guards all state of `space`, `ledger`, `writing`, `reading`
and `sealing`, and is held for arithmetic only; the other locks are taken before it. A segment in which a write or read
is in flight keeps its file. Limits: see `space` (bytes) and `daily_budget` (writes per day).

What is durable: a sealed segment (its data is synced before its footer is written); a put is not synced, so power loss
may cost the records of the open segments. `drop` is in memory only: a dropped record may come back after a restart,
verified as any other. A freed segment does not, but after power loss.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer
from kvpool.tiers.ssd.batch import incoming
from kvpool.tiers.ssd.daily_budget import DailyBudget
from kvpool.tiers.ssd.disk import Disk, PosixDisk
from kvpool.tiers.ssd.in_flight import InFlight
from kvpool.tiers.ssd.ledger import Phase, SegmentInfo
from kvpool.tiers.ssd.lock import LOCK_NAME, DirectoryLock
from kvpool.tiers.ssd.marker import check_marker, write_marker
from kvpool.tiers.ssd.place import bytes_of, segment_of
from kvpool.tiers.ssd.reading import Reader
from kvpool.tiers.ssd.recovery import Recovery
from kvpool.tiers.ssd.scratch import aligned, bytes_view
from kvpool.tiers.ssd.sealing import Sealer
from kvpool.tiers.ssd.segment import RecoveredRecord
from kvpool.tiers.ssd.space import Space
from kvpool.tiers.ssd.startup import Startup
from kvpool.tiers.ssd.stats import Counts, SsdStats
from kvpool.tiers.ssd.writing import Writer
from kvpool.tiers.tier import TierName, TierUnavailableError

_log = logging.getLogger(__name__)


class SsdTier:
    """Holds sealed records in segment files; implements `LocalTier`. Made by `open`."""

    name = TierName.SSD

    def __init__(
        self, directory: Path, disk: Disk, directory_lock: DirectoryLock, space: Space, lock: threading.Lock,
        budget: DailyBudget,
    ) -> None:  # fmt: skip
        self.directory = directory
        self._directory_lock = directory_lock
        self._space = space
        self._budget = budget
        self._lock = lock
        self._counts = Counts()
        self._sealer = Sealer(disk, space, budget, lock, self._counts)
        self._writer = Writer(space, self._sealer, budget, lock, self._counts)
        self._reader = Reader(space, lock, self._counts)
        self._startup = Startup(space, self._writer, self._sealer, lock)
        self._in_flight = InFlight(self._give_back)

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
            directory_lock = DirectoryLock.acquire(disk, directory, clock())
        except OSError as error:
            raise _unavailable(error, f"opening {directory}") from error
        try:
            direct = direct_io and _has_direct_io(disk, directory)
            lock = threading.Lock()
            space = Space(disk, directory, lock, capacity_bytes, segment_bytes, direct=direct, clock=clock)
            write_marker(disk, directory)
            budget = DailyBudget(disk, directory, daily_write_bytes, clock)
            tier = cls(directory, disk, directory_lock, space, lock, budget)
            tier._startup.discover()
        except OSError as error:
            directory_lock.release()
            raise _unavailable(error, f"opening {directory}") from error
        except BaseException:
            directory_lock.release()
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
        return self._budget.spent_bytes

    @property
    def recovery(self) -> Recovery:
        """What start-up found so far."""
        return self._startup.recovery

    def recovered(self) -> Iterator[list[RecoveredRecord]]:
        """What lay in the directory, segment by segment, parents before children as they were written.

        To be taken to its end before the first put, which otherwise takes the rest: those records are then known to
        `places_in` alone. `recovery` is complete afterwards. A record may be dropped as soon as its list was taken.
        """
        while True:
            with self._in_flight:
                records = self._startup.read_next()
            if records is None:
                return
            if records:
                yield records

    def put(self, records: Sequence[Buffer], *, guaranteed: bool = False, reclaim: bool = False) -> list[int | None]:
        """Append each record, in order; its place, or None: no room, or the daily budget is spent.

        `guaranteed`: counted against the daily budget, but never refused for it. `reclaim`: re-appended to free its
        segment, so that the spare may be used. Raises `CorruptRecordError` or `ValueError` for a buffer that is no
        whole record (nothing is written then), and `TierUnavailableError`: none of the records was stored.
        """
        checked = incoming(records)
        with self._in_flight:
            self._startup.finish()
            try:
                return self._writer.put(checked, guaranteed=guaranteed, reclaim=reclaim)
            except OSError as error:
                self._counts.add(write_failures=1)
                raise _unavailable(error, "writing") from error

    def get(self, places: Sequence[int], into: Sequence[Buffer]) -> list[bool]:
        """Read each record into its buffer; False where it is gone, did not come whole, or could not be read.

        Records side by side come in one call. Raises `ValueError` where a buffer has not its record's length, and
        `TierUnavailableError` where it is not the record but the disk that cannot be read.
        """
        buffers = [bytes_view(buffer) for buffer in into]
        for place, buffer in zip(places, buffers, strict=True):
            if buffer.nbytes != bytes_of(place):
                raise ValueError(f"the record at {place:#x} has {bytes_of(place)} bytes; its buffer {buffer.nbytes}")
        with self._in_flight:
            try:
                return self._reader.get(places, buffers)
            except OSError as error:
                raise _unavailable(error, "reading") from error

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
        with self._in_flight:
            with self._lock:
                segment = self._space.segments.get(segment_id)
                if segment is None:
                    return True
                if segment.busy or segment.phase in (Phase.UNREAD, Phase.FULL):
                    return False
                self._writer.remove(segment)
            try:
                self._space.retire(segment)
            except OSError as error:
                raise _unavailable(error, f"freeing segment {segment_id}") from error
        return True

    def wants_room(self) -> bool:
        """Whether a segment should be freed now, so that puts need not be refused soon."""
        with self._lock:
            if self._writer.wants_segment:
                return True
            return self._space.free_segments() == 0 and self._writer.fullest() > 0.75

    def seal_all(self) -> None:
        """Make all that was put durable: sync and seal every open segment, or raise `TierUnavailableError`.

        A segment to which another thread writes at this moment is sealed at the end of that write, by that thread.
        """
        with self._in_flight:
            with self._lock:
                self._writer.close_all()
                self._sealer.retry_failed()
            if self._sealer.seal_ready():
                raise TierUnavailableError(TierName.SSD, "a segment could not be sealed")

    def resize(self, capacity_bytes: int) -> None:
        """Change the capacity. Less than what is used: blank files go at once, the rest as segments are freed."""
        self._space.check_capacity(capacity_bytes)
        with self._in_flight, self._writer.grow_lock:
            with self._lock:
                self._writer.wants_segment = False
            try:
                self._space.resize(capacity_bytes)
            except OSError as error:
                raise _unavailable(error, "shrinking") from error

    def set_daily_write_bytes(self, daily_write_bytes: int | None) -> None:
        """Change the daily budget; what was spent today stays spent."""
        self._budget.limit_bytes = daily_write_bytes

    def stats(self) -> SsdStats:
        """A snapshot of what was counted."""
        with self._lock:
            segments = list(self._space.segments.values())
            live = sum(segment.live_bytes for segment in segments)
            taken = sum((segment.next_page - 1) * PAGE_BYTES for segment in segments)
            return SsdStats(
                **self._counts.snapshot(), live_records=sum(segment.live_records for segment in segments),
                live_bytes=live, dead_bytes=taken - live, physical_bytes=self._space.used_bytes,
                dropped=sum(self.recovery.dropped.copy().values()), segments=len(segments),
                free_segments=self._space.free_segments(), spent_today_bytes=self._budget.spent_bytes,
            )  # fmt: skip

    def close(self) -> None:
        """Seal what is open and give the directory back; faults are logged. An operation in flight ends first.

        The lock and the files are given back by the last operation in flight, so that no late write can meet the next
        owner. Calling it again does nothing.
        """
        if self._in_flight.closed:
            return
        for finish in (self.seal_all, self._budget.close):
            try:
                finish()
            except (TierUnavailableError, OSError) as error:
                _log.warning("ssd tier: closing %s: %s", self.directory, error)
        self._in_flight.close()

    def _give_back(self) -> None:
        self._space.descriptors.close_all()
        self._directory_lock.release()


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

"""The directory's bytes: which segment files there are, and whether another may be made. Keeps the capacity bound.

Everything counts with its full size from before it exists until after it is gone: segments, *blanks* (files of freed
segments, waiting to be used again), *litter* (files that could not be removed yet), and 16 KiB for the small files. One
segment's worth is the spare: only a reclaim may take it.

**Why freed files are recycled.** Measured on ext4 (virtio disk, O_DIRECT, 256 MiB segments): writing into fresh space
from `posix_fallocate` runs at about half the speed of overwriting a used file (2 MiB writes: 3.1 against 5.5 GB/s; 256
KiB: 1.4 against 2.9), for each write turns unwritten extents into written ones in the journal; and an unlink takes 30
ms, where blanking a header takes 0.1 ms. Records of the file's earlier life are told apart by the segment's tag (see
`segment`).

State is touched under the lock that the tier passes in; methods that do I/O say so, take it themselves, and are called
by one thread at a time, but `retire`, which any thread may call.
"""

import logging
import re
import secrets
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.errors import ConfigError
from kvpool.tiers.ssd.daily_budget import BUDGET_NAME
from kvpool.tiers.ssd.descriptors import Descriptors
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.ledger import Phase, Segment
from kvpool.tiers.ssd.lock import LOCK_NAME
from kvpool.tiers.ssd.marker import MARKER_NAME
from kvpool.tiers.ssd.place import MAX_RECORD_PAGES, MAX_SEGMENT_PAGES, SEGMENT_IDS
from kvpool.tiers.ssd.scratch import Scratch
from kvpool.tiers.ssd.segment import FIRST_RECORD_PAGE, NO_FINGERPRINT, Header, encode_header, footer_pages
from kvpool.tiers.ssd.segment_file import SegmentFile
from kvpool.tiers.ssd.small_file import TEMPORARY_SUFFIX

SMALL_FILES_BYTES = 4 * PAGE_BYTES
MIN_SEGMENT_BYTES = 4 * PAGE_BYTES
MAX_DEFAULT_SEGMENT_BYTES = 256 << 20
_FEW_SEGMENTS, _MANY_SEGMENTS, _SMALL_SEGMENT_BYTES = 8, 64, 8 << 20
_RECORDS_PER_SEGMENT = 4
_SEGMENT_NAME = re.compile(r"([0-9a-f]{6})\.segment")
_OUR_NAMES = {LOCK_NAME, MARKER_NAME, BUDGET_NAME}
_log = logging.getLogger(__name__)


class Blank(NamedTuple):
    """A file of a segment's size that holds nothing."""

    path: Path
    file_bytes: int


def default_segment_bytes(capacity_bytes: int) -> int:
    """Some 64 segments of 8 to 256 MiB; fewer and smaller ones where the capacity is small, more where it is large."""
    room = capacity_bytes - SMALL_FILES_BYTES
    nbytes = min(
        max(room // _MANY_SEGMENTS, min(room // _FEW_SEGMENTS, _SMALL_SEGMENT_BYTES)), MAX_DEFAULT_SEGMENT_BYTES
    )
    return max(nbytes // PAGE_BYTES * PAGE_BYTES, MIN_SEGMENT_BYTES)


class Space:
    """Makes, blanks and removes segment files, within `capacity_bytes`."""

    def __init__(
        self, disk: Disk, directory: Path, lock: threading.Lock, capacity_bytes: int, segment_bytes: int | None,
        *, direct: bool, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.segments: dict[int, Segment] = {}
        self.descriptors = Descriptors(disk, direct=direct)
        self.scratch = Scratch()
        self.capacity_bytes = capacity_bytes
        self._disk = disk
        self._directory = directory
        self._lock = lock
        self._direct = direct
        self._clock = clock
        self._fixed_segment_bytes = segment_bytes
        self._blanks: list[Blank] = []
        self._empty: set[Segment] = set()
        self._sizes: Counter[int] = Counter()
        self._litter: dict[Path, int] = {}
        self._foreign_ids: set[int] = set()
        self._last_id = 0
        self._used_bytes = SMALL_FILES_BYTES
        self.check_capacity(capacity_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, spare and blank ones included."""
        return self._used_bytes

    @property
    def segment_bytes(self) -> int:
        """The size of the next segment, unless its first record needs a larger one."""
        return self._fixed_segment_bytes or default_segment_bytes(self.capacity_bytes)

    def check_capacity(self, capacity_bytes: int) -> None:
        """Raise `ConfigError` where the tier cannot work within so few bytes."""
        segment = self._fixed_segment_bytes or default_segment_bytes(capacity_bytes)
        if segment % PAGE_BYTES or not MIN_SEGMENT_BYTES <= segment <= MAX_SEGMENT_PAGES * PAGE_BYTES:
            raise ConfigError(f"ssd segment_bytes is {segment}; it must be whole pages of 4 KiB, from 16 KiB to 64 GiB")
        least = SMALL_FILES_BYTES + 2 * segment
        if capacity_bytes < least:
            raise ConfigError(
                f"ssd capacity is {capacity_bytes} bytes; it must be at least {least}: two segments of {segment}"
            )

    def file(self, segment: Segment) -> SegmentFile:
        """The open file of a segment that the caller uses. Does I/O; raises `OSError`."""
        fd = self.descriptors.of(segment)
        return SegmentFile(self._disk, fd, segment.header.tag, self._direct, self.scratch)

    def discover(self) -> tuple[list[Segment], int, int]:
        """Register the files that lie in the directory, least recently written first, before anything else is done.

        Returns the segments to be read, the number of foreign files, and the number of segment files that had to go
        because all of them together were over the capacity (the oldest). Does I/O; raises `OSError`.
        """
        found: list[tuple[int, Segment]] = []
        foreign = 0
        for name in sorted(self._disk.names(self._directory)):
            path = self._directory / name
            match = _SEGMENT_NAME.fullmatch(name)
            status = self._disk.stat(path)
            regular = stat.S_ISREG(status.st_mode)
            if match and regular and int(match[1], 16) < SEGMENT_IDS:
                found.append((status.st_mtime_ns, Segment(int(match[1], 16), path, status.st_size)))
            elif name.removesuffix(TEMPORARY_SUFFIX) in _OUR_NAMES and regular:
                if name.endswith(TEMPORARY_SUFFIX):
                    self._disk.unlink(path)
            else:
                foreign += 1
                self._foreign_ids.update([int(match[1], 16)] if match else [])
                _log.warning("ssd tier: %s is not ours; it is left alone, and not counted", path)
        segments = [segment for _, segment in sorted(found, key=lambda item: (item[0], item[1].id))]
        too_many = self._register(segments)
        return segments[too_many:], foreign, too_many

    def may_add(self, file_bytes: int, *, reclaim: bool) -> bool:
        """Whether a segment of this size may be made, with blanks given up for it. Under the lock."""
        return file_bytes + (0 if reclaim else self._spare_bytes(file_bytes)) <= self._available_bytes()

    def can_hold(self, pages: int, variable_bytes: int) -> bool:
        """Whether a record of this size finds room once everything else is gone. Under the lock."""
        file_bytes = self._size_for(pages, variable_bytes)
        return pages <= MAX_RECORD_PAGES and SMALL_FILES_BYTES + 2 * file_bytes <= self.capacity_bytes

    def free_segments(self) -> int:
        """Segments that may yet be made without the spare; sealed ones without records count. Under the lock."""
        dead = sum(segment.file_bytes for segment in self.dead_segments())
        free = self._available_bytes() + dead - self._spare_bytes(0)
        return max(0, free // self.segment_bytes)

    def dead_segments(self) -> list[Segment]:
        """Segments in which nothing lives and nothing happens. Under the lock."""
        return [
            segment
            for segment in self._empty
            if segment.live_records == 0
            and not segment.busy
            and (segment.phase is Phase.SEALED or (segment.phase is Phase.OPEN and segment.places))
        ]

    def create(self, fingerprint: Fingerprint, pages: int, variable_bytes: int, *, reclaim: bool) -> Segment | None:
        """An open, empty segment for records of this size, of which the caller is counted a writer; None: no room.

        Does I/O; raises `OSError`.
        """
        with self._lock:
            file_bytes = self._size_for(pages, variable_bytes)
            allowed = self.may_add(file_bytes, reclaim=reclaim)
            needs_spare = allowed and not self.may_add(file_bytes, reclaim=False)
        if not allowed:
            return None
        blank = self._take_blank(file_bytes) or self._allocate(file_bytes)
        segment = self._begin(blank, fingerprint)
        segment.for_reclaim = needs_spare
        return segment

    def remove(self, segment: Segment) -> None:
        """Forget a segment that nobody uses, and every record in it. Under the lock; `retire` its file afterwards."""
        del self.segments[segment.id]
        self._empty.discard(segment)
        self._sizes -= Counter([segment.file_bytes])
        segment.forget_all()

    def note_records(self, segment: Segment) -> None:
        """Records went from, or came to, this segment: remember it while nothing lives there. Under the lock."""
        if segment.live_records == 0:
            self._empty.add(segment)
        else:
            self._empty.discard(segment)

    def retire(self, segment: Segment) -> None:
        """Make the file of a removed segment a blank, or unlink it. Does I/O.

        Raises `OSError` where neither can be done; the file then counts until a later call can unlink it.
        """
        reusable = self._used_bytes <= self.capacity_bytes and self._blank(segment)
        if reusable:
            self.descriptors.close(segment)
        else:
            self.discard(segment)
        with self._lock:
            if reusable:
                self._blanks.append(Blank(segment.path, segment.file_bytes))
            self._return_spare()

    def discard(self, segment: Segment) -> None:
        """Unlink the file of a removed segment. Does I/O; raises `OSError`, and counts the file until it can be."""
        self.descriptors.close(segment)
        self._unlink(segment.path, segment.file_bytes)

    def keep_blank(self, segment: Segment) -> None:
        """Start-up found that the file holds nothing: it can be used again. Does I/O."""
        self.descriptors.close(segment)
        with self._lock:
            self.remove(segment)
            self._blanks.append(Blank(segment.path, segment.file_bytes))

    def sync_names(self) -> None:
        """Return once every segment's name is durable. Does I/O; raises `OSError`."""
        self._disk.sync_directory(self._directory)

    def resize(self, capacity_bytes: int) -> None:
        """Change the capacity, and unlink blanks while there is more than it allows. Does I/O; raises `OSError`."""
        with self._lock:
            self.capacity_bytes = capacity_bytes
            self._return_spare()
        while (blank := self._pop_blank_if_over(self.capacity_bytes)) is not None:
            self._unlink(*blank)

    def _register(self, segments: list[Segment]) -> int:
        """Count the files; the number of the first ones that were unlinked to keep within the capacity."""
        self._used_bytes += sum(segment.file_bytes for segment in segments)
        self._last_id = max((segment.id for segment in segments), default=SEGMENT_IDS - 1)
        too_many = 0
        while self._used_bytes > self.capacity_bytes and too_many < len(segments):
            self._unlink(segments[too_many].path, segments[too_many].file_bytes)
            too_many += 1
        for segment in segments[too_many:]:
            self._include(segment)
        return too_many

    def _include(self, segment: Segment) -> None:
        self.segments[segment.id] = segment
        self._sizes[segment.file_bytes] += 1

    def _spare_bytes(self, file_bytes: int) -> int:
        """One whole segment of the largest size that may have to be appended again."""
        return max(file_bytes, self.segment_bytes, *self._sizes)

    def _available_bytes(self) -> int:
        return self.capacity_bytes - self._used_bytes + sum(blank.file_bytes for blank in self._blanks)

    def _size_for(self, pages: int, variable_bytes: int) -> int:
        """The usual size, or room for a few records of this one where the usual size has none. Under the lock."""
        usual = self.segment_bytes
        wanted = (FIRST_RECORD_PAGE + 1 + _RECORDS_PER_SEGMENT * pages) * PAGE_BYTES
        if wanted <= usual:
            return usual
        least = (FIRST_RECORD_PAGE + pages + footer_pages(1, variable_bytes)) * PAGE_BYTES
        quarter = (self.capacity_bytes - SMALL_FILES_BYTES) // 4 // PAGE_BYTES * PAGE_BYTES
        return max(usual, least, min(wanted, quarter))

    def _return_spare(self) -> None:
        """Once there is a spare again, the segment that was made of the last one is like any other. Under the lock."""
        if self._spare_bytes(0) <= self._available_bytes():
            for segment in self.segments.values():
                segment.for_reclaim = False

    def _pop_blank_if_over(self, allowed_bytes: int) -> Blank | None:
        with self._lock:
            return self._blanks.pop(0) if self._blanks and self._used_bytes > allowed_bytes else None

    def _take_blank(self, file_bytes: int) -> Blank | None:
        with self._lock:
            blank = next((blank for blank in self._blanks if blank.file_bytes == file_bytes), None)
            if blank is not None:
                self._blanks.remove(blank)
            return blank

    def _allocate(self, file_bytes: int) -> Blank:
        """A new file, its space taken. Does I/O; raises `OSError`, and nothing is left behind or uncounted."""
        self._clear_litter()
        while (blank := self._pop_blank_if_over(self.capacity_bytes - file_bytes)) is not None:
            self._unlink(*blank)
        with self._lock:
            path = self._path(self._next_id())
            self._used_bytes += file_bytes
        try:
            self._make_file(path, file_bytes)
        except FileExistsError:  # somebody else's: the next try takes another name
            with self._lock:
                self._used_bytes -= file_bytes
            raise
        except OSError:
            with suppress(OSError):  # counted as litter then
                self._unlink(path, file_bytes)
            raise
        return Blank(path, file_bytes)

    def _make_file(self, path: Path, file_bytes: int) -> None:
        fd = self._disk.open(path, create=True, direct=self._direct)
        try:
            self._disk.fallocate(fd, file_bytes)
        finally:
            self._disk.close(fd)

    def _begin(self, blank: Blank, fingerprint: Fingerprint) -> Segment:
        """Turn a blank into an open segment under a new id. Does I/O; raises `OSError`, the blank is gone then.

        A blank whose first page cannot be written must not be tried again and again.
        """
        path = blank.path
        with self._lock:
            segment_id = self._next_id()
        created = int(self._clock() * 1e9)
        header = Header(segment_id, secrets.randbits(64), fingerprint, blank.file_bytes, created)
        segment = Segment(segment_id, self._path(segment_id), blank.file_bytes, Phase.OPEN, header, writers=1)
        try:
            self._disk.rename(path, segment.path)
            path = segment.path
            self.file(segment).write_pages(encode_header(header), 0)
        except OSError:
            self.descriptors.close(segment)
            with suppress(OSError):  # counted as litter then
                self._unlink(path, blank.file_bytes)
            raise
        with self._lock:
            self._include(segment)
        return segment

    def _blank(self, segment: Segment) -> bool:
        """Make the file say that it holds nothing: the footer goes first, or a damaged header would bring it back."""
        header = Header(segment.id, secrets.randbits(64), NO_FINGERPRINT, segment.file_bytes, 0, blank=True)
        segment.writers = 1  # so that its descriptor stays
        try:
            file = self.file(segment)
            file.write_pages(bytes(PAGE_BYTES), segment.file_bytes - PAGE_BYTES)
            file.write_pages(encode_header(header), 0)
        except OSError as error:
            _log.warning("ssd tier: blanking %s: %s; it is unlinked instead", segment.path.name, error)
            return False
        return True

    def _clear_litter(self) -> None:
        """Try again to unlink what could not be unlinked."""
        for path, nbytes in list(self._litter.items()):
            with suppress(OSError):
                self._unlink(path, nbytes)

    def _unlink(self, path: Path, file_bytes: int) -> None:
        """Unlink a counted file. Does I/O; raises `OSError`, the file then stays counted, as litter."""
        try:
            with suppress(FileNotFoundError):
                self._disk.unlink(path)
        except OSError as error:
            _log.warning("ssd tier: removing %s: %s", path.name, error)
            with self._lock:
                self._litter[path] = file_bytes
            raise
        with self._lock:
            self._litter.pop(path, None)
            self._used_bytes -= file_bytes

    def _path(self, segment_id: int) -> Path:
        return self._directory / f"{segment_id:06x}.segment"

    def _next_id(self) -> int:
        """Ids go round; one that is in use, or named so by somebody else, is passed over. Under the lock."""
        used = {blank.path for blank in self._blanks} | set(self._litter)
        while True:
            self._last_id = (self._last_id + 1) % SEGMENT_IDS
            taken = self._last_id in self.segments or self._last_id in self._foreign_ids
            if not taken and self._path(self._last_id) not in used:
                return self._last_id

"""What waits for the database, on disk: batches in the order in which they came, within a limit of bytes.

    <number>.journal   8 bytes magic "kvpool\\0J", then entries: 4 bytes mark, 4 bytes length of the payload, 4 bytes
                       rows in it, 8 bytes xxh3-64 of length, rows and payload; the payload. Numbers are little-endian.

A batch is on disk for good when `append` returns: every entry is synced, since this is written while the database is
away, in the background, some times a second. A file is removed when all of it was taken, so a crash brings back
batches that were written already; who takes them must tell. An entry that is torn or damaged is skipped, and the rest
read. When the limit is reached the oldest file goes, and its rows are counted. One thread uses a journal, and one
process its directory: the pool's lock sees to that.
"""

import logging
import os
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

MAGIC = b"kvpool\0J"
MARK = b"kvJ\xe5"
SUFFIX = ".journal"
SEGMENT_BYTES = 8 << 20
PAGE_BYTES = 4096
_SIZES = struct.Struct("<II")
_SUM = struct.Struct("<Q")
_ENTRY_BYTES = len(MARK) + _SIZES.size + _SUM.size
_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What was appended."""

    payload: bytes
    rows: int


@dataclass(slots=True)
class _Segment:
    """A file, and what of it is not taken yet."""

    path: Path
    nbytes: int
    rows: int
    """Of entries not taken yet."""

    @property
    def occupied_bytes(self) -> int:
        return -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES


class Journal:
    """A queue on disk. Call `open` before anything else. Raises `OSError` where it says so, and nothing else."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 8)
        self._segments: deque[_Segment] = deque()
        self._active_fd: int | None = None
        self._reading: deque[Entry] | None = None
        """What is left of the first segment, once it is being taken."""
        self._next_number = 0
        self.dropped_rows = 0
        """Rows that the limit cost."""
        self._told_rows = 0
        self.left_files = False
        """A file could not be removed: what was taken from it comes back in the next process."""
        self.damaged_bytes = 0
        """Bytes that could not be read as entries."""

    @property
    def nbytes(self) -> int:
        """What the files occupy."""
        return sum(segment.occupied_bytes for segment in self._segments)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return sum(segment.rows for segment in self._segments)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._segments

    def open(self) -> None:
        """Find what an earlier process left, and read it once. Raises `OSError`."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            data = path.read_bytes()
            rows = sum(entry.rows for entry in entries_of(data))
            self._segments.append(_Segment(path, len(data), rows))
            self._next_number = max(self._next_number, _number(path) + 1)
        self._make_room(0)

    def append(self, payload: bytes, rows: int) -> bool:
        """Put an entry at the end, durably; False, and counted, where it is larger than the whole journal may be.

        Raises `OSError` where the disk is full or fails; the journal is as before then, or a bit shorter.
        """
        sizes = _SIZES.pack(len(payload), rows)
        checksum = xxhash.xxh3_64(sizes)
        checksum.update(payload)
        entry = b"".join((MARK, sizes, _SUM.pack(checksum.intdigest()), payload))
        if len(MAGIC) + len(entry) + PAGE_BYTES > self._max_bytes:
            self.dropped_rows += rows
            return False
        if self._active_fd is not None and self._segments[-1].nbytes + len(entry) > self._segment_bytes:
            self._seal()
        self._make_room(len(entry) + len(MAGIC) + PAGE_BYTES)
        fd = self._active_fd if self._active_fd is not None else self._begin()
        self._write(fd, self._segments[-1], entry)
        self._segments[-1].rows += rows
        return True

    def first(self) -> Entry | None:
        """The oldest entry, which stays until `take`; None: nothing waits. A file that cannot be read is dropped."""
        while self._segments:
            if self._reading is None:
                self._reading = self._read_first()
            if self._reading:
                return self._reading[0]
            self._remove_first()
        return None

    def take(self) -> None:
        """Forget the entry that `first` returned."""
        if self._reading:
            self._segments[0].rows -= self._reading.popleft().rows
            if not self._reading:
                self._remove_first()

    def close(self) -> None:
        """Give the open file back."""
        self._seal()

    def _read_first(self) -> deque[Entry]:
        """All entries of the oldest file, which is not written any more from now on."""
        segment = self._segments[0]
        if len(self._segments) == 1:
            self._seal()
        try:
            data = segment.path.read_bytes()
        except OSError as error:
            _log.warning("%s cannot be read (%s): its %d rows are dropped", segment.path, error, segment.rows)
            self.dropped_rows += segment.rows
            return deque()
        found = deque(entries_of(data))
        segment.rows = sum(entry.rows for entry in found)
        lost = len(data) - len(MAGIC) - sum(_ENTRY_BYTES + len(entry.payload) for entry in found)
        if lost > 0:
            self.damaged_bytes += lost
            _log.warning("%s: %d bytes are damaged and skipped", segment.path, lost)
        return found

    def _make_room(self, nbytes: int) -> None:
        while self._segments and self.nbytes + nbytes > self._max_bytes:
            rows = self._segments[0].rows
            self._remove_first()
            self.dropped_rows += rows
            if self.dropped_rows >= 2 * self._told_rows:  # not for every file
                self._told_rows = self.dropped_rows
                _log.warning("the journal is full: its oldest rows are dropped, %d so far", self.dropped_rows)

    def _remove_first(self) -> None:
        if len(self._segments) == 1:
            self._seal()
        path = self._segments.popleft().path
        self._reading = None
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self.left_files = True
            _log.warning("%s cannot be removed: %s", path, error)

    def _begin(self) -> int:
        path = self._directory / f"{self._next_number:016d}{SUFFIX}"
        self._next_number += 1
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, MAGIC)
            _sync_directory(self._directory)
        except OSError:
            os.close(fd)
            with suppress(OSError):
                path.unlink()
            raise
        self._segments.append(_Segment(path, len(MAGIC), 0))
        self._active_fd = fd
        return fd

    def _write(self, fd: int, segment: _Segment, entry: bytes) -> None:
        try:
            _write_all(fd, entry)
            os.fdatasync(fd)
        except OSError:
            self._cut(fd, segment)
            raise
        segment.nbytes += len(entry)

    def _cut(self, fd: int, segment: _Segment) -> None:
        """Take a part of an entry off the end again; where even that fails, go on in another file."""
        try:
            os.ftruncate(fd, segment.nbytes)
        except OSError:
            with suppress(OSError):
                segment.nbytes = os.fstat(fd).st_size
                self._seal()

    def _seal(self) -> None:
        fd, self._active_fd = self._active_fd, None
        if fd is not None:
            with suppress(OSError):  # every entry in it was synced
                os.close(fd)


def entries_of(data: bytes) -> Iterator[Entry]:
    """The whole entries in a file's bytes, in order; what is torn or damaged between them is passed over."""
    at = 0
    while (at := data.find(MARK, at)) >= 0:
        entry = _entry_at(data, at)
        if entry is None:
            at += 1
        else:
            yield entry
            at += _ENTRY_BYTES + len(entry.payload)


def _entry_at(data: bytes, at: int) -> Entry | None:
    payload_at = at + _ENTRY_BYTES
    if payload_at > len(data):
        return None
    sizes_at = at + len(MARK)
    length, rows = _SIZES.unpack_from(data, sizes_at)
    if payload_at + length > len(data):
        return None
    payload = data[payload_at : payload_at + length]
    checksum = xxhash.xxh3_64(data[sizes_at : sizes_at + _SIZES.size])
    checksum.update(payload)
    if checksum.intdigest() != _SUM.unpack_from(data, sizes_at + _SIZES.size)[0]:
        return None
    return Entry(payload, rows)


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() else 0


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

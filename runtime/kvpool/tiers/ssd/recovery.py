"""What a segment file still holds after a restart. Reads only; the tier decides what becomes of the file.

A sealed segment is taken at its footer's word: one read, and no record is touched (each is verified when it is read).
Anything else is scanned: from page to page for a head that carries the tag of this life of the file, then the payload's
checksum. A record whose payload is damaged is passed over by its whole length, for its head says what it had reserved.
A damaged or missing head is a gap, and the search goes on at the next page. What the tag does not fit, leftovers of an
earlier life or bytes inside of a payload, is not seen at all.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import MAGIC, Corruption, CorruptRecordError, Head, read_head
from kvpool.tiers.ssd.scratch import SCRATCH_BYTES, Bytes, aligned
from kvpool.tiers.ssd.segment import (
    FIRST_RECORD_PAGE,
    TRAILER_BYTES,
    Entry,
    Header,
    RecoveredRecord,
    SegmentFormatError,
    Trailer,
    decode_footer,
    decode_header,
    decode_trailer,
    encode_entry,
    recovered_record,
    split_footer,
)
from kvpool.tiers.ssd.segment_file import SegmentFile, toggle_tag

_TAIL_BYTES = 64 << 10
"""Read first from a file's end: enough for the footer of a segment of large records."""
_MAGIC_WORD = int.from_bytes(MAGIC, "little")
_WORDS_PER_PAGE = PAGE_BYTES // 8


class Found(NamedTuple):
    """What one file holds. `footer`: a footer vouched for it; else `entries` are what the next footer needs."""

    header: Header
    records: list[RecoveredRecord]
    next_page: int
    variable_bytes: int
    footer: bool
    entries: Sequence[Entry] = ()


@dataclass(slots=True)
class Recovery:
    """What start-up found, filled as `recovered()` goes on. `dropped` counts records and files by reason."""

    records: int = 0
    segments: int = 0
    foreign_files: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)


def read_segment(file: SegmentFile, segment_id: int, file_bytes: int, dropped: Counter[str]) -> Found:
    """What the file of this name and size holds; damaged records are counted in `dropped`.

    Raises `SegmentFormatError` where it is none of ours, and `OSError`.
    """
    header, tail = _read_header(file, file_bytes), _Tail(file, file_bytes)
    trailer = tail.trailer()
    if isinstance(header, Header):
        _check(header, segment_id, file_bytes)
        if header.blank:
            return Found(header, [], FIRST_RECORD_PAGE, 0, footer=False)
        if trailer is not None and trailer.header != header:
            trailer = None  # left by an earlier life of the file
    elif trailer is None:
        raise header
    else:
        header = trailer.header
        _check(header, segment_id, file_bytes)
    records = tail.records(trailer) if trailer else None
    if trailer and records is not None:
        return Found(header, records, trailer.next_page, trailer.variable_bytes, footer=True)
    return _scan(file._replace(tag=header.tag), header, dropped)


def read_entries(file: SegmentFile, header: Header) -> list[Entry]:
    """The entries of a sealed segment's footer, for the footer that will replace it. Raises as `read_segment` does."""
    tail = _Tail(file, header.file_bytes)
    trailer = tail.trailer()
    if trailer is None or trailer.header != header or tail.records(trailer) is None:
        raise SegmentFormatError("footer")
    return split_footer(trailer, tail.footer(trailer))


def _check(header: Header, segment_id: int, file_bytes: int) -> None:
    if header.file_bytes != file_bytes:
        raise SegmentFormatError("size")
    if header.segment_id != segment_id and not header.blank:
        raise SegmentFormatError("foreign")


def _read_header(file: SegmentFile, file_bytes: int) -> Header | SegmentFormatError | OSError:
    """The header, or why there is none: the footer may make up for it."""
    if file_bytes < 2 * PAGE_BYTES:
        return SegmentFormatError("size")
    with file.scratch.lend() as piece:
        page = piece[:PAGE_BYTES]
        try:
            if file.read_into(page, 0) != PAGE_BYTES:
                return SegmentFormatError("size")
            return decode_header(page)
        except (SegmentFormatError, OSError) as error:
            return error


class _Tail:
    """The end of a segment file, where its footer is if it has one. Files are whole pages, or have none."""

    def __init__(self, file: SegmentFile, file_bytes: int) -> None:
        self._file = file
        self._file_bytes = file_bytes
        whole_pages = file_bytes > 0 and file_bytes % PAGE_BYTES == 0
        self._bytes = self._read(min(_TAIL_BYTES, file_bytes)) if whole_pages else None

    def trailer(self) -> Trailer | None:
        """The trailer, or None where there is none to be trusted."""
        if self._bytes is None or self._bytes.nbytes < TRAILER_BYTES:
            return None
        try:
            return decode_trailer(self._bytes)
        except SegmentFormatError:
            return None

    def records(self, trailer: Trailer) -> list[RecoveredRecord] | None:
        """The records of the footer, or None where it is damaged."""
        try:
            return decode_footer(trailer, self.footer(trailer))
        except SegmentFormatError:
            return None

    def footer(self, trailer: Trailer) -> Bytes:
        """The whole footer; `decode_trailer` saw to it that it is no longer than the file."""
        if self._bytes is None or self._bytes.nbytes < trailer.footer_bytes:
            self._bytes = self._read(trailer.footer_bytes)
        if self._bytes is None:
            raise SegmentFormatError("footer")
        return self._bytes[self._bytes.nbytes - trailer.footer_bytes :]

    def _read(self, nbytes: int) -> Bytes | None:
        buffer = aligned(nbytes)
        try:
            whole = self._file.read_into(buffer, self._file_bytes - nbytes) == nbytes
        except OSError:  # a page that cannot be read has no footer on it; the scan finds what can be read
            return None
        return buffer if whole else None


def _scan(file: SegmentFile, header: Header, dropped: Counter[str]) -> Found:
    records: list[RecoveredRecord] = []
    entries: list[Entry] = []
    next_page = FIRST_RECORD_PAGE
    with file.scratch.lend() as piece:
        window = _Window(file, piece, header.file_bytes // PAGE_BYTES - 1)
        for page, head in window.heads():
            end_page = page + head.record_bytes // PAGE_BYTES
            if head.fingerprint != header.fingerprint or end_page > window.end_page:
                continue
            if window.payload_is_whole(page, head):
                records.append(recovered_record(head, header.segment_id, page))
                entries.append(encode_entry(head, page))
            else:
                dropped[Corruption.PAYLOAD_CHECKSUM] += 1
            window.page = next_page = end_page
    variable_bytes = sum(len(entry.variable) for entry in entries)
    return Found(header, records, next_page, variable_bytes, footer=False, entries=entries)


class _Window:
    """A piece of a segment file in memory that moves over it; constant memory whatever a record's length."""

    def __init__(self, file: SegmentFile, piece: Bytes, end_page: int) -> None:
        self.page = FIRST_RECORD_PAGE
        self.end_page = end_page
        self._file = file
        self._piece = piece
        self._first = self._end = 0

    def heads(self) -> Iterator[tuple[int, Head]]:
        """Every page from `page` on that is a head of this life, with its index. The caller may move `page` on."""
        while self.page < self.end_page:
            found = self._next_magic()
            if found is None:
                continue
            self.page = found + 1
            head = self._head(found)
            if head is not None:
                yield found, head

    def payload_is_whole(self, page: int, head: Head) -> bool:
        """Whether the payload behind the head at `page` is the one that it was sealed with."""
        digest = xxhash.xxh3_64()
        left = head.payload_bytes
        page += 1
        while left:
            view = self._view(page)
            if view is None:
                return False
            digest.update(view[:left].data)
            left -= min(left, view.nbytes)
            page += view.nbytes // PAGE_BYTES
        return digest.intdigest() == head.checksum

    def _next_magic(self) -> int | None:
        """The next page that begins as a record does; None, with `page` moved on, where this piece has none."""
        view = self._view(self.page)
        if view is None:
            self.page += 1
            return None
        hits = np.flatnonzero(view.view("<u8")[::_WORDS_PER_PAGE] == _MAGIC_WORD)
        if hits.size:
            return self.page + int(hits[0])
        self.page += view.nbytes // PAGE_BYTES
        return None

    def _head(self, page: int) -> Head | None:
        view = self._view(page)
        if view is None:
            return None
        copy = view[:PAGE_BYTES].copy()
        toggle_tag(copy, self._file.tag)
        try:
            return read_head(copy)
        except CorruptRecordError:
            return None

    def _view(self, page: int) -> Bytes | None:
        """What is in memory from `page` on, at least one page; read if it must be, None if it cannot be."""
        if not self._first <= page < self._end:
            self._first = self._end = page
            self._end += self._load(page, min(SCRATCH_BYTES, (self.end_page - page) * PAGE_BYTES))
        if page >= self._end:
            return None
        return self._piece[(page - self._first) * PAGE_BYTES : (self._end - self._first) * PAGE_BYTES]

    def _load(self, page: int, nbytes: int) -> int:
        """Read pages into the piece; how many came. One bad page must not hide its neighbours."""
        for size in (nbytes, PAGE_BYTES):
            try:
                return self._file.read_into(self._piece[:size], page * PAGE_BYTES) // PAGE_BYTES
            except OSError:
                continue
        return 0

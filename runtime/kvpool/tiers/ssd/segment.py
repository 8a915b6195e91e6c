"""The format of a segment file; pure. A segment holds records of one model (fingerprint), side by side, in whole pages.

    page 0        header: identity of the segment, in its first 512 bytes, so that a write of it is never torn
    page 1 ..     records, in the order of their reservation; a failed write leaves a gap that holds no valid head
    last pages    footer, once the segment is sealed: table, variable bytes, zeros, and a trailer as the last bytes

    header   8s magic "kvpool\\0S", H format, H record version, I state (0 blank, 1 in use), I segment id, I zero,
             Q tag, 32s fingerprint, Q file bytes, Q created (unix ns), Q xxh3-64 of the bytes before
    table    per live record: 16s key, 16s parent, 16s tenant, Q epoch, I depth, I page, H pages, H codec,
             H length of the token ids, H length of the extra keys; strictly ascending by page
    variable token ids and extra keys of each record, in table order
    trailer  8s magic "kvpool\\0F", H format, H record version, I segment id, Q tag, 32s fingerprint, Q file bytes,
             Q created, I records, I variable bytes, I next free page, I zero, Q xxh3-64 of table and variable bytes,
             Q xxh3-64 of the trailer's bytes before

**The tag.** Each life of a segment file has a random 64-bit tag. On disk, the last 8 bytes of a record's head page (the
head's checksum) are XORed with it. So no head of an earlier life of the file, of another segment, or inside of a
payload is ever taken for a record of this life, although the record's own bytes are untouched and need no room for the
tag.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest
from kvpool.blocks.layout import PAGE_BYTES, padded
from kvpool.blocks.record import VERSION as RECORD_VERSION
from kvpool.blocks.record import Buffer, Head
from kvpool.tiers.ssd.place import packed

FORMAT_VERSION = 1
FIRST_RECORD_PAGE = 1
NO_FINGERPRINT = Fingerprint(bytes(32))

_HEADER_MAGIC = b"kvpool\0S"
_TRAILER_MAGIC = b"kvpool\0F"
_BLANK, _IN_USE = 0, 1
_HEADER = struct.Struct("<8sHHIIIQ32sQQ")
_ENTRY = struct.Struct("<16s16s16sQIIHHHH")
_TRAILER = struct.Struct("<8sHHIQ32sQQIIIIQ")
_SUM = struct.Struct("<Q")
TRAILER_BYTES = _TRAILER.size + _SUM.size
HEAD_SUM_AT = PAGE_BYTES - _SUM.size
"""Where the tag is XORed into a record's head page."""


class SegmentFormatError(Exception):
    """Bytes that are no header or footer of this format; `reason` is a label for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """Who a segment is, in this life of its file. A blank one holds nothing and waits to be used again."""

    segment_id: int
    tag: int
    fingerprint: Fingerprint
    file_bytes: int
    created_ns: int
    blank: bool = False


class Entry(NamedTuple):
    """One record's part of the footer, as bytes."""

    row: bytes
    variable: bytes


class RecoveredRecord(NamedTuple):
    """What lay on the disk: all that the prefix index needs to know of a record, and its place."""

    key: BlockKey
    parent: BlockKey
    fingerprint: Fingerprint
    tenant: TenantDigest
    epoch: int
    depth: int
    tokens: bytes
    extra: bytes
    codec: int
    place: int
    record_bytes: int


class Trailer(NamedTuple):
    """The last bytes of a sealed segment: whose footer it is, and where its parts end."""

    header: Header
    records: int
    variable_bytes: int
    next_page: int
    checksum: int

    @property
    def footer_bytes(self) -> int:
        """Bytes of the whole footer: whole pages, up to the file's end."""
        return footer_pages(self.records, self.variable_bytes) * PAGE_BYTES


def footer_pages(records: int, variable_bytes: int) -> int:
    """Pages that the footer of so many records takes at the end of the file."""
    return padded(records * _ENTRY.size + variable_bytes + TRAILER_BYTES) // PAGE_BYTES


def encode_header(header: Header) -> bytes:
    """The header page."""
    page = _HEADER.pack(
        _HEADER_MAGIC, FORMAT_VERSION, RECORD_VERSION, _BLANK if header.blank else _IN_USE, header.segment_id, 0,
        header.tag, header.fingerprint, header.file_bytes, header.created_ns,
    )  # fmt: skip
    return (page + _checksum(page)).ljust(PAGE_BYTES, b"\0")


def decode_header(page: Buffer) -> Header:
    """Return the header in the first bytes of `page`, or raise `SegmentFormatError`."""
    view = memoryview(page)
    magic, version, record, state, segment_id, _, tag, fingerprint, file_bytes, created = _HEADER.unpack_from(view)
    if magic != _HEADER_MAGIC:
        raise SegmentFormatError("foreign" if any(magic) else "unfinished")
    if (version, record) != (FORMAT_VERSION, RECORD_VERSION):
        raise SegmentFormatError("version")
    if view[_HEADER.size : _HEADER.size + _SUM.size] != _checksum(view[: _HEADER.size]):
        raise SegmentFormatError("header")
    return Header(segment_id, tag, Fingerprint(fingerprint), file_bytes, created, blank=state == _BLANK)


def encode_entry(head: Head, page: int) -> Entry:
    """The footer's part for the record `head` that starts at `page`."""
    row = _ENTRY.pack(
        head.key, head.parent, head.tenant, head.epoch, head.depth, page, head.record_bytes // PAGE_BYTES, head.codec,
        len(head.tokens), len(head.extra),
    )  # fmt: skip
    return Entry(row, head.tokens + head.extra)


def encode_footer(header: Header, entries: Sequence[Entry], next_page: int) -> bytes:
    """The footer of these records, in order of their pages: whole pages, to be written so that they end the file."""
    body = b"".join([entry.row for entry in entries] + [entry.variable for entry in entries])
    variable_bytes = len(body) - len(entries) * _ENTRY.size
    trailer = _TRAILER.pack(
        _TRAILER_MAGIC, FORMAT_VERSION, RECORD_VERSION, header.segment_id, header.tag, header.fingerprint,
        header.file_bytes, header.created_ns, len(entries), variable_bytes, next_page, 0,
        xxhash.xxh3_64_intdigest(body),
    )  # fmt: skip
    trailer += _checksum(trailer)
    total = footer_pages(len(entries), variable_bytes) * PAGE_BYTES
    return body.ljust(total - TRAILER_BYTES, b"\0") + trailer


def decode_trailer(tail: Buffer) -> Trailer:
    """Return the trailer that ends `tail`, the last bytes of a file, or raise `SegmentFormatError`."""
    view = memoryview(tail)[-TRAILER_BYTES:]
    (
        magic, version, record, segment_id, tag, fingerprint, file_bytes, created, records, variable_bytes, next_page,
        zero, checksum,
    ) = _TRAILER.unpack_from(view)  # fmt: skip
    if magic != _TRAILER_MAGIC or zero:
        raise SegmentFormatError("footer")
    if (version, record) != (FORMAT_VERSION, RECORD_VERSION):
        raise SegmentFormatError("version")
    if view[-_SUM.size :] != _checksum(view[: _TRAILER.size]):
        raise SegmentFormatError("footer")
    header = Header(segment_id, tag, Fingerprint(fingerprint), file_bytes, created)
    trailer = Trailer(header, records, variable_bytes, next_page, checksum)
    if PAGE_BYTES * next_page + trailer.footer_bytes > file_bytes:
        raise SegmentFormatError("footer")
    return trailer


def decode_footer(trailer: Trailer, footer: Buffer) -> list[RecoveredRecord]:
    """Return the records of a whole footer, `trailer.footer_bytes` long, or raise `SegmentFormatError`."""
    view = memoryview(footer)[: trailer.records * _ENTRY.size + trailer.variable_bytes]
    if xxhash.xxh3_64_intdigest(view) != trailer.checksum:
        raise SegmentFormatError("footer")
    table, variable = view[: trailer.records * _ENTRY.size], bytes(view[trailer.records * _ENTRY.size :])
    return list(_records(trailer, table, variable))


def split_footer(trailer: Trailer, footer: Buffer) -> list[Entry]:
    """The entries of a footer that `decode_footer` accepted, so that a later one can hold them again."""
    rows = bytes(memoryview(footer)[: trailer.records * _ENTRY.size])
    variable = bytes(memoryview(footer)[len(rows) : len(rows) + trailer.variable_bytes])
    entries: list[Entry] = []
    at = 0
    for start in range(0, len(rows), _ENTRY.size):
        row = rows[start : start + _ENTRY.size]
        *_, tokens_len, extra_len = _ENTRY.unpack(row)
        entries.append(Entry(row, variable[at : at + tokens_len + extra_len]))
        at += tokens_len + extra_len
    return entries


def recovered_record(head: Head, segment_id: int, page: int) -> RecoveredRecord:
    """The record `head`, found at `page` by reading the segment itself."""
    return RecoveredRecord(
        head.key, head.parent, head.fingerprint, head.tenant, head.epoch, head.depth, head.tokens, head.extra,
        head.codec, packed(segment_id, page, head.record_bytes // PAGE_BYTES), head.record_bytes,
    )  # fmt: skip


def _records(trailer: Trailer, table: memoryview, variable: bytes) -> Iterator[RecoveredRecord]:
    segment_id, fingerprint = trailer.header.segment_id, trailer.header.fingerprint
    free_from = FIRST_RECORD_PAGE
    at = 0
    known: dict[bytes, bytes] = {}  # parents and tenants repeat: one object each spares half of the memory
    for row in _ENTRY.iter_unpack(table):
        key, parent, tenant, epoch, depth, page, pages, codec, tokens_len, extra_len = row
        if not pages or page < free_from or page + pages > trailer.next_page:
            raise SegmentFormatError("footer")
        free_from = page + pages
        tokens_end = at + tokens_len
        extra_end = tokens_end + extra_len
        yield RecoveredRecord(
            BlockKey(known.setdefault(key, key)), BlockKey(known.setdefault(parent, parent)), fingerprint,
            TenantDigest(known.setdefault(tenant, tenant)), epoch, depth, variable[at:tokens_end],
            variable[tokens_end:extra_end], codec, packed(segment_id, page, pages), pages * PAGE_BYTES,
        )  # fmt: skip
        at = extra_end
    if at != trailer.variable_bytes:
        raise SegmentFormatError("footer")


def _checksum(data: Buffer) -> bytes:
    return _SUM.pack(xxhash.xxh3_64_intdigest(data))

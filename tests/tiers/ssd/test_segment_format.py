"""Fixed bytes of a segment file. If one fails, directories that exist could not be read any more: raise the version."""

from __future__ import annotations

import hashlib
import struct

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import given

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.place import (
    MAX_RECORD_PAGES,
    MAX_SEGMENT_PAGES,
    SEGMENT_IDS,
    bytes_of,
    end_page_of,
    offset_of,
    packed,
    segment_of,
)
from kvpool.tiers.ssd.scratch import Bytes
from kvpool.tiers.ssd.segment import (
    Header,
    SegmentFormatError,
    decode_footer,
    decode_header,
    decode_trailer,
    encode_entry,
    encode_footer,
    encode_header,
    split_footer,
)
from kvpool.tiers.ssd.segment_file import toggle_tag

from .records import fingerprint, head, record

HEADER = Header(0x0A0B0C, 0x1122334455667788, fingerprint(3), 10 * PAGE_BYTES, 1_700_000_000_000_000_000)
ENTRIES = [encode_entry(head(number, model=3), page) for number, page in ((1, 1), (2, 3), (5, 7))]
FOOTER = encode_footer(HEADER, ENTRIES, 9)


def test_a_header_is_written_so() -> None:
    page = encode_header(HEADER)
    assert page[:88].hex() == (
        "6b76706f6f6c0053" "0100" "0100" "01000000" "0c0b0a00" "00000000" "8877665544332211"
        "6d6f64656c2d3300000000000000000000000000000000000000000000000000"
        "00a0000000000000" "00002a36fe9c9717" "2fd4c1c578f1e072"
    )  # fmt: skip
    assert page[88:] == bytes(PAGE_BYTES - 88)
    assert decode_header(page) == HEADER


def test_a_footer_is_written_so() -> None:
    assert len(FOOTER) == PAGE_BYTES
    assert ENTRIES[1].row.hex() == (
        "28c9dc81ecc6751fdf76ba053f8f5fbd" "0e209f6611fd754d8cafdc8df35f7bd9"
        "74656e616e742d6f662d746573747321" "0100000000000000" "02000000" "03000000" "0200" "0000" "1000" "0200"
    )  # fmt: skip
    assert ENTRIES[1].variable.hex() == "020000000300000004000000050000007878"
    body = b"".join(entry.row for entry in ENTRIES) + b"".join(entry.variable for entry in ENTRIES)
    assert FOOTER.startswith(body + bytes(PAGE_BYTES - len(body) - 104))
    assert FOOTER[-104:].hex() == (
        "6b76706f6f6c0046" "0100" "0100" "0c0b0a00" "8877665544332211"
        "6d6f64656c2d3300000000000000000000000000000000000000000000000000"
        "00a0000000000000" "00002a36fe9c9717" "03000000" "35000000" "09000000" "00000000" "0e17483fb90f403f"
        "834b8a1309f18dd0"
    )  # fmt: skip


def test_a_footer_is_read_so() -> None:
    trailer = decode_trailer(FOOTER)
    found = decode_footer(trailer, FOOTER)
    assert trailer.header == HEADER
    assert trailer.next_page == 9
    for said, (number, page) in zip(found, ((1, 1), (2, 3), (5, 7)), strict=True):
        true = head(number, model=3)
        assert (said.key, said.parent, said.tenant, said.epoch) == (true.key, true.parent, true.tenant, true.epoch)
        assert (said.fingerprint, said.depth, said.tokens, said.extra) == (
            true.fingerprint, number, true.tokens, true.extra,
        )  # fmt: skip
        assert (segment_of(said.place), offset_of(said.place)) == (0x0A0B0C, page * PAGE_BYTES)
        assert said.record_bytes == bytes_of(said.place) == 2 * PAGE_BYTES
    assert split_footer(trailer, FOOTER) == ENTRIES


def test_a_record_s_head_on_disk_carries_the_tag_in_its_checksum() -> None:
    plain = record(1)
    tagged: Bytes = plain.copy()
    toggle_tag(tagged, 0x1122334455667788)
    changed = [at for at in range(len(plain)) if plain[at] != tagged[at]]
    assert changed == list(range(4088, 4096))
    assert bytes(a ^ b for a, b in zip(plain[4088:4096], tagged[4088:4096], strict=True)).hex() == "8877665544332211"


def test_a_flipped_byte_in_a_header_is_found() -> None:
    for at in range(88):
        page = bytearray(encode_header(HEADER))
        page[at] ^= 0x40
        with pytest.raises(SegmentFormatError):
            decode_header(page)


def test_a_flipped_byte_in_a_footer_is_found() -> None:
    body_bytes = sum(len(entry.row) + len(entry.variable) for entry in ENTRIES)
    for at in [*range(body_bytes), *range(PAGE_BYTES - 104, PAGE_BYTES)]:
        footer = bytearray(FOOTER)
        footer[at] ^= 0x40
        with pytest.raises(SegmentFormatError):
            read_footer(footer)


def read_footer(footer: bytearray) -> None:
    decode_footer(decode_trailer(footer), footer)


@pytest.mark.parametrize("pages", [(1, 2), (0, 3), (3, 1), (8, 9)])
def test_a_footer_whose_records_overlap_or_leave_the_file_is_refused(pages: tuple[int, int]) -> None:
    entries = [encode_entry(head(number, model=3), page) for number, page in enumerate(pages)]
    with pytest.raises(SegmentFormatError):
        read_footer(bytearray(encode_footer(HEADER, entries, 9)))


@pytest.mark.parametrize("field", ["records", "variable_bytes", "next_page"])
@pytest.mark.parametrize("claim", [2**16, 2**32 - 1])
def test_a_trailer_that_claims_more_than_its_file_is_refused_before_memory_is_taken(field: str, claim: int) -> None:
    footer = bytearray(FOOTER)
    at = len(footer) - 104 + {"records": 72, "variable_bytes": 76, "next_page": 80}[field]
    footer[at : at + 4] = struct.pack("<I", claim)
    footer[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(footer[-104:-8])))
    with pytest.raises(SegmentFormatError, match="footer"):
        decode_trailer(footer)


@given(
    segment=st.integers(0, SEGMENT_IDS - 1), page=st.integers(0, MAX_SEGMENT_PAGES - 1),
    pages=st.integers(1, MAX_RECORD_PAGES),
)  # fmt: skip
def test_a_place_says_segment_page_and_length_in_63_bits(segment: int, page: int, pages: int) -> None:
    place = packed(segment, page, pages)
    assert 0 < place < 2**63
    assert (segment_of(place), offset_of(place), bytes_of(place), end_page_of(place)) == (
        segment, page * PAGE_BYTES, pages * PAGE_BYTES, page + pages,
    )  # fmt: skip


def test_the_place_s_bits_are_where_they_always_were() -> None:
    assert packed(0x0A0B0C, 0x010203, 0x0405) == 0x0A0B0C_010203_0405


def test_the_whole_file_of_a_segment_is_as_it_always_was() -> None:
    """Header, tagged records and footer together."""
    data = bytearray(10 * PAGE_BYTES)
    data[:PAGE_BYTES] = encode_header(HEADER)
    for number, page in ((1, 1), (2, 3), (5, 7)):
        tagged: Bytes = record(number, model=3).copy()
        toggle_tag(tagged, HEADER.tag)
        data[page * PAGE_BYTES : (page + 2) * PAGE_BYTES] = tagged.tobytes()
    data[-PAGE_BYTES:] = FOOTER
    assert hashlib.sha256(data).hexdigest() == "aee923d5017c936f53e611620fb3789c023a831c3347d3c65c7dfa37a1530564"

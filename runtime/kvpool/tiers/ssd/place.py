"""A place on the ssd tier: segment, page and length packed into one integer below 2**63.

    bits 40..62  segment id (23)      bits 16..39  page index within the segment (24)      bits 0..15  pages (16)

Places sort by segment, then by page, so that sorting them finds records that lie side by side.
"""

from kvpool.blocks.layout import PAGE_BYTES

SEGMENT_BITS, PAGE_BITS, PAGES_BITS = 23, 24, 16
SEGMENT_IDS = 1 << SEGMENT_BITS
MAX_SEGMENT_PAGES = 1 << PAGE_BITS
MAX_RECORD_PAGES = (1 << PAGES_BITS) - 1

_PAGE_SHIFT = PAGES_BITS
_SEGMENT_SHIFT = PAGES_BITS + PAGE_BITS
_PAGE_MASK = MAX_SEGMENT_PAGES - 1


def packed(segment_id: int, page: int, pages: int) -> int:
    """The place of a record of `pages` pages from `page` on."""
    return segment_id << _SEGMENT_SHIFT | page << _PAGE_SHIFT | pages


def segment_of(place: int) -> int:
    """The id of the segment that holds `place`."""
    return place >> _SEGMENT_SHIFT


def offset_of(place: int) -> int:
    """Where the record starts in its segment file, in bytes."""
    return (place >> _PAGE_SHIFT & _PAGE_MASK) * PAGE_BYTES


def bytes_of(place: int) -> int:
    """The record's length, in bytes."""
    return (place & MAX_RECORD_PAGES) * PAGE_BYTES


def end_page_of(place: int) -> int:
    """The page after the record's last."""
    return (place >> _PAGE_SHIFT & _PAGE_MASK) + (place & MAX_RECORD_PAGES)

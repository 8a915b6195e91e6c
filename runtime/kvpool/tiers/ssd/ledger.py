"""What the tier knows of one segment in memory: which pages are taken, and which records live there.

No I/O, no lock: every call is made under the tier's lock. A record costs 9 bytes here; the segment that is being filled
keeps its footer's entries as well. Records are in order of their pages, the order of their reservation.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.place import MAX_RECORD_PAGES, bytes_of, end_page_of, packed
from kvpool.tiers.ssd.segment import FIRST_RECORD_PAGE, NO_FINGERPRINT, Entry, Header, footer_pages

_PENDING, _LIVE, _DEAD = 0, 1, 2


class Phase(Enum):
    """The life of a segment, in order. Only an open one takes records; only a sealed one has a footer to trust."""

    UNREAD = auto()
    OPEN = auto()
    FULL = auto()
    SEALED = auto()
    GONE = auto()


class SegmentInfo(NamedTuple):
    """A segment as the engine sees it, to choose which to free. `created` is in unix seconds."""

    id: int
    sealed: bool
    records: int
    live_bytes: int
    file_bytes: int
    fingerprint: Fingerprint
    readers: int
    created: float


@dataclass(slots=True, eq=False)
class Segment:
    """One segment file. `readers` and `writers` are operations in flight: while there are any, the file stays."""

    id: int
    path: Path
    file_bytes: int
    phase: Phase = Phase.UNREAD
    header: Header = field(default=Header(0, 0, NO_FINGERPRINT, 0, 0))
    next_page: int = FIRST_RECORD_PAGE
    live_bytes: int = 0
    live_records: int = 0
    variable_bytes: int = 0
    readers: int = 0
    writers: int = 0
    last_write: int = 0
    footer_written: bool = False
    for_reclaim: bool = False
    places: "array[int]" = field(default_factory=lambda: array("Q"))
    states: bytearray = field(default_factory=bytearray)
    entries: list[Entry] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether anybody reads or writes it now."""
        return self.readers > 0 or self.writers > 0

    @property
    def info(self) -> SegmentInfo:
        """The public view."""
        return SegmentInfo(
            self.id, self.phase is Phase.SEALED, self.live_records, self.live_bytes, self.file_bytes,
            self.header.fingerprint, self.readers, self.header.created_ns / 1e9,
        )  # fmt: skip

    def has_room(self, pages: int, variable_bytes: int) -> bool:
        """Whether a record of so many pages fits, with all that the footer will then take."""
        if pages > MAX_RECORD_PAGES:
            return False
        footer = footer_pages(len(self.places) + 1, self.variable_bytes + variable_bytes)
        return (self.next_page + pages + footer) * PAGE_BYTES <= self.file_bytes

    def reserve(self, pages: int, entry: Entry) -> int:
        """Take the next pages; the place of the new record, which is neither live nor dead until its write ended."""
        place = packed(self.id, self.next_page, pages)
        self.places.append(place)
        self.states.append(_PENDING)
        self.entries.append(entry)
        self.variable_bytes += len(entry.variable)
        self.next_page += pages
        return place

    def publish(self, place: int) -> None:
        """The write of the record reserved at `place` ended: from now on it can be read."""
        self._end_reservation(place, _LIVE)
        self.live_bytes += bytes_of(place)
        self.live_records += 1

    def abandon(self, place: int) -> None:
        """The write of the record reserved at `place` failed: its pages are a gap."""
        self._end_reservation(place, _DEAD)

    def adopt(self, header: Header, places: Iterable[int], next_page: int, variable_bytes: int) -> None:
        """Take over what recovery found, in order of pages."""
        self.header = header
        self.variable_bytes = variable_bytes
        self.places = array("Q", places)
        self.states = bytearray([_LIVE]) * len(self.places)
        self.live_bytes = sum(map(bytes_of, self.places))
        self.live_records = len(self.places)
        self.next_page = max([next_page, *map(end_page_of, self.places[-1:])])

    def is_live(self, place: int) -> bool:
        """Whether `place` can be read."""
        index = self._index(place)
        return index is not None and self.states[index] == _LIVE

    def resume(self, entries: list[Entry]) -> None:
        """Take records again: `entries` are those of the footer, in the order in which its records were adopted."""
        self.entries = entries
        self.footer_written = False

    def drop(self, place: int) -> None:
        """Forget a live record, or raise `ValueError`."""
        index = self._index(place)
        if index is None or self.states[index] != _LIVE:
            raise ValueError(f"place {place:#x} holds no record")
        self.states[index] = _DEAD
        self.live_bytes -= bytes_of(place)
        self.live_records -= 1

    def live_places(self) -> list[int]:
        """Every place that can be read, in order of pages."""
        return [place for place, state in zip(self.places, self.states, strict=True) if state == _LIVE]

    def live_entries(self) -> list[Entry]:
        """The footer's parts of all records that can be read."""
        return [entry for entry, state in zip(self.entries, self.states, strict=True) if state == _LIVE]

    def forget_all(self) -> None:
        """Every record is gone, and the segment with them."""
        self.phase = Phase.GONE
        self.places, self.states, self.entries = array("Q"), bytearray(), []
        self.live_bytes = self.live_records = 0

    def _end_reservation(self, place: int, state: int) -> None:
        index = self._index(place)
        assert index is not None
        assert self.states[index] == _PENDING
        self.states[index] = state

    def _index(self, place: int) -> int | None:
        index = bisect_left(self.places, place)
        return index if index < len(self.places) and self.places[index] == place else None

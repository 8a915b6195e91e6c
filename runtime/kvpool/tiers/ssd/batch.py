"""The records of one call: what is to be written or read, and which of it lies side by side."""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer, Head, read_head
from kvpool.tiers.ssd.ledger import Segment
from kvpool.tiers.ssd.place import offset_of
from kvpool.tiers.ssd.scratch import Bytes, bytes_view
from kvpool.tiers.ssd.segment_file import MAX_RUN_BYTES, MAX_RUN_RECORDS


class Incoming(NamedTuple):
    """A record that is to be written. `position` is its index in the call."""

    position: int
    record: Bytes
    head: Head

    @property
    def pages(self) -> int:
        """Pages that it takes in a segment."""
        return self.record.nbytes // PAGE_BYTES

    @property
    def variable_bytes(self) -> int:
        """Bytes that it takes in a footer beside its row."""
        return len(self.head.tokens) + len(self.head.extra)


class Part(NamedTuple):
    """A record's bytes in memory, and where they lie or are to lie. `position` is its index in the call."""

    position: int
    buffer: Bytes
    place: int
    segment: Segment


class Run(NamedTuple):
    """Records that lie side by side in one segment: one call to the disk."""

    segment: Segment
    offset: int
    parts: list[Part]

    @property
    def buffers(self) -> list[Bytes]:
        """The records' memory, in the order of their pages."""
        return [part.buffer for part in self.parts]


def incoming(records: Sequence[Buffer]) -> list[Incoming]:
    """The records with their heads. Raises `CorruptRecordError` or `ValueError` where one is no whole record."""
    return [_incoming(position, bytes_view(record)) for position, record in enumerate(records)]


def runs(parts: Sequence[Part]) -> Iterator[Run]:
    """Put what lies side by side together, as much as one call takes."""
    run: Run | None = None
    end = size = 0
    for part in sorted(parts, key=attrgetter("place")):
        offset, nbytes = offset_of(part.place), part.buffer.nbytes
        adjacent = run is not None and part.segment is run.segment and offset == end
        if run is None or not adjacent or len(run.parts) == MAX_RUN_RECORDS or size + nbytes > MAX_RUN_BYTES:
            if run is not None:
                yield run
            run, size = Run(part.segment, offset, []), 0
        run.parts.append(part)
        size += nbytes
        end = offset + nbytes
    if run is not None:
        yield run


def _incoming(position: int, record: Bytes) -> Incoming:
    head = read_head(record)
    if head.record_bytes != record.nbytes:
        raise ValueError(f"the record has {head.record_bytes} bytes; its buffer {record.nbytes}")
    return Incoming(position, record, head)

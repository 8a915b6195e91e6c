"""Moves records between buffers and a segment file: adjacent ones in one call, straight, tagged as they pass.

An open descriptor and where to begin is all that these functions need; who may touch which pages is decided above. In
*direct* mode every buffer, offset and length is whole pages: what is not goes through scratch memory, piece by piece.
"""

import errno
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.scratch import SCRATCH_BYTES, Bytes, Scratch, is_aligned
from kvpool.tiers.ssd.segment import HEAD_SUM_AT

MAX_RUN_RECORDS = SCRATCH_BYTES // PAGE_BYTES
"""Records of one call: a head page of scratch each, and two of the 1,024 buffers that one call takes."""
MAX_RUN_BYTES = 64 << 20
_log = logging.getLogger(__name__)


class SegmentFile(NamedTuple):
    """An open segment file, and the tag of its present life."""

    disk: Disk
    fd: int
    tag: int
    direct: bool
    scratch: Scratch

    def write_records(self, records: Sequence[Bytes], offset: int) -> int:
        """Write whole records side by side from `offset` on; the calls it took. Raises `OSError`."""
        calls = 0
        straight: list[Bytes] = []
        for record in records:
            if self.direct and not is_aligned(record):
                calls += self._write_straight(straight, offset)
                offset += sum(part.nbytes for part in straight)
                straight = []
                calls += self._write_bounced(record, offset)
                offset += record.nbytes
            else:
                straight.append(record)
        return calls + self._write_straight(straight, offset)

    def read_records(self, buffers: Sequence[Bytes], offset: int) -> list[bool]:
        """Read records that lie side by side from `offset` on; False where a record did not come whole."""
        if not self.direct or all(map(is_aligned, buffers)):
            arrived = self._read_straight(buffers, offset)
        else:
            arrived = self._read_one_by_one(buffers, offset)
        for buffer, came in zip(buffers, arrived, strict=True):
            if came:
                toggle_tag(buffer, self.tag)
        return arrived

    def write_pages(self, data: bytes, offset: int) -> None:
        """Write whole pages of metadata. Raises `OSError`."""
        with self.scratch.lend() as piece:
            for start in range(0, len(data), SCRATCH_BYTES):
                part = np.frombuffer(data, np.uint8)[start : start + SCRATCH_BYTES]
                np.copyto(piece[: part.nbytes], part)
                self._write_all([piece[: part.nbytes]], offset + start)

    def read_into(self, buffer: Bytes, offset: int) -> int:
        """Read whole pages into aligned memory until it is full or the file ends; the bytes that came."""
        done = 0
        while done < buffer.nbytes:
            count = self.disk.preadv(self.fd, [buffer[done:]], offset + done)
            if count == 0 or count % PAGE_BYTES:
                return done + count
            done += count
        return done

    def _write_straight(self, records: Sequence[Bytes], offset: int) -> int:
        if not records:
            return 0
        with self.scratch.lend() as piece:
            heads = piece[: len(records) * PAGE_BYTES].reshape(-1, PAGE_BYTES)
            parts: list[Bytes] = []
            for head, record in zip(heads, records, strict=True):
                head[:] = record[:PAGE_BYTES]
                parts.append(head)
                if record.nbytes > PAGE_BYTES:
                    parts.append(record[PAGE_BYTES:])
            heads[:, HEAD_SUM_AT:] ^= _tag_bytes(self.tag)
            return self._write_all(parts, offset)

    def _write_bounced(self, record: Bytes, offset: int) -> int:
        calls = 0
        with self.scratch.lend() as piece:
            for start in range(0, record.nbytes, SCRATCH_BYTES):
                part = record[start : start + SCRATCH_BYTES]
                np.copyto(piece[: part.nbytes], part)
                if start == 0:
                    toggle_tag(piece, self.tag)
                calls += self._write_all([piece[: part.nbytes]], offset + start)
        return calls

    def _write_all(self, parts: list[Bytes], offset: int) -> int:
        """One call as a rule; a short write goes on where it stopped."""
        calls = 0
        while parts:
            count = self.disk.pwritev(self.fd, parts, offset)
            calls += 1
            if count <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if self.direct:  # going on at half a page is refused: write that page again
                count -= count % PAGE_BYTES
                if count == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            offset += count
            parts = _rest(parts, count)
        return calls

    def _read_straight(self, buffers: Sequence[Bytes], offset: int) -> list[bool]:
        try:
            count = self.disk.preadv(self.fd, buffers, offset)
        except OSError as error:
            _log.warning("ssd tier: reading %d records at %d: %s", len(buffers), offset, error)
            count = 0
        if count == sum(buffer.nbytes for buffer in buffers):
            return [True] * len(buffers)
        if len(buffers) == 1:
            return [False]
        return self._read_one_by_one(buffers, offset)

    def _read_one_by_one(self, buffers: Sequence[Bytes], offset: int) -> list[bool]:
        arrived: list[bool] = []
        for buffer in buffers:
            if self.direct and not is_aligned(buffer):
                arrived.append(self._read_bounced(buffer, offset))
            else:
                arrived.extend(self._read_straight([buffer], offset))
            offset += buffer.nbytes
        return arrived

    def _read_bounced(self, buffer: Bytes, offset: int) -> bool:
        with self.scratch.lend() as piece:
            for start in range(0, buffer.nbytes, SCRATCH_BYTES):
                part = buffer[start : start + SCRATCH_BYTES]
                if self._read_straight([piece[: part.nbytes]], offset + start) != [True]:
                    return False
                np.copyto(part, piece[: part.nbytes])
        return True


def toggle_tag(record: Bytes, tag: int) -> None:
    """Put the tag on a record's head page, or take it off."""
    record[HEAD_SUM_AT:PAGE_BYTES] ^= _tag_bytes(tag)


def _tag_bytes(tag: int) -> Bytes:
    return np.frombuffer(tag.to_bytes(8, "little"), np.uint8)


def _rest(parts: Sequence[Bytes], done: int) -> list[Bytes]:
    rest: list[Bytes] = []
    for part in parts:
        if done < part.nbytes:
            rest.append(part[done:])
        done = max(0, done - part.nbytes)
    return rest

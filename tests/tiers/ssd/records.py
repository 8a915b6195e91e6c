"""Records whose every byte follows from a model and a number, so that whatever comes back can be judged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Head, seal
from kvpool.tiers.ssd.place import bytes_of
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.ssd.segment import RecoveredRecord
from kvpool.tiers.ssd.tier import SsdTier

Bytes = npt.NDArray[np.uint8]

TENANT = TenantDigest(b"tenant-of-tests!")
PAGES = 2
"""Pages of a record unless a test says otherwise: a head and one page of payload."""


def fingerprint(model: int) -> Fingerprint:
    return Fingerprint(b"model-%d" % model + bytes(25))


def key(number: int, model: int = 0) -> BlockKey:
    return BlockKey(hashlib.blake2b(b"%d/%d" % (model, number), digest_size=16).digest())


@lru_cache(1024)
def head(number: int, *, model: int = 0, pages: int = PAGES) -> Head:
    nbytes = (pages - 1) * PAGE_BYTES - number % 8 * 4 if pages > 1 else 0
    return Head(
        key=key(number, model), parent=key(number - 1, model), fingerprint=fingerprint(model), tenant=TENANT, epoch=1,
        depth=number, tokens=np.arange(number, number + 4, dtype=np.int32).tobytes(), extra=b"x" * (number % 3),
        payload_bytes=nbytes, raw_bytes=nbytes,
    )  # fmt: skip


def record(number: int, *, model: int = 0, pages: int = PAGES) -> Bytes:
    """A sealed record in memory of its own, on a page boundary."""
    buffer = aligned(pages * PAGE_BYTES)
    words = buffer[PAGE_BYTES:].view("<u8")
    words[:] = np.arange(words.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number * 64 + model)
    seal(buffer, head(number, model=model, pages=pages))
    return buffer


def records(numbers: Sequence[int] | range, *, model: int = 0, pages: int = PAGES) -> list[Bytes]:
    return [record(number, model=model, pages=pages) for number in numbers]


def put(tier: SsdTier, numbers: Sequence[int] | range, *, model: int = 0, pages: int = PAGES, **how: Any) -> list[int]:
    """Store these, all of which must find room; their places."""
    places = tier.put(records(numbers, model=model, pages=pages), **how)
    found = [place for place in places if place is not None]
    assert len(found) == len(places), "the test's tier is too small"
    return found


def put_although_full(tier: SsdTier, number: int, *, model: int = 0, pages: int = PAGES) -> int:
    """Store this one, as an engine does: where there is no room, segments are freed until there is. Its place."""
    for _ in range(8):
        (place,) = tier.put([record(number, model=model, pages=pages)])
        if place is not None:
            return place
        assert tier.wants_room()
        assert tier.free_segment(next(info.id for info in tier.segments() if info.sealed))
    raise AssertionError("no room, although segments were freed")


def read(tier: SsdTier, place: int) -> Bytes | None:
    """The record at `place`, or None where it does not come."""
    buffer = aligned(bytes_of(place))
    return buffer if tier.get([place], [buffer]) == [True] else None


def is_record(buffer: Bytes | None, number: int, *, model: int = 0, pages: int = PAGES) -> bool:
    return buffer is not None and buffer.tobytes() == _bytes_of_record(number, model, pages)


@lru_cache(256)
def _bytes_of_record(number: int, model: int, pages: int) -> bytes:
    return record(number, model=model, pages=pages).tobytes()


def all_recovered(tier: SsdTier) -> list[RecoveredRecord]:
    return [found for segment in tier.recovered() for found in segment]


def sound(tier: SsdTier, found: Sequence[RecoveredRecord], *, pages: int = PAGES) -> list[tuple[int, int]]:
    """(model, number) of those that come back as they were stored; none may say that it is what it is not.

    What a footer or head says must be true of the record as it was stored, whether or not its bytes still come whole.
    """
    whole = []
    for said in found:
        model, number = int(said.fingerprint[6:7]), said.depth
        true = head(number, model=model, pages=said.record_bytes // PAGE_BYTES)
        assert (said.key, said.parent, said.tenant, said.epoch) == (true.key, true.parent, true.tenant, true.epoch)
        assert (said.tokens, said.extra, said.codec) == (true.tokens, true.extra, true.codec)
        if is_record(read(tier, said.place), number, model=model, pages=said.record_bytes // PAGE_BYTES):
            whole.append((model, number))
    return whole

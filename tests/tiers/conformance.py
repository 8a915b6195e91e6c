"""What every local tier must do, whatever it is made of.

A tier joins by a subclass of `TierConformance` in `test_conformance` whose fixture `make_tier` makes an empty tier of a
capacity. Nothing here knows a tier's own names: a rule that needs them belongs into that tier's own tests, as do faults
of its I/O.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest

from kvpool.api.codec import Codec
from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest
from kvpool.blocks.layout import PAGE_BYTES, Dtype, KVLayout
from kvpool.blocks.record import Buffer, CorruptRecordError, Head, check_payload, read_head, seal, sealed_as
from kvpool.codecs import codec_for, codec_of
from kvpool.tiers.tier import LocalTier, TierName, TierUnavailableError

Bytes = npt.NDArray[np.uint8]

CAPACITY_BYTES = 16 << 20
PAYLOAD_BYTES = [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 60_000, 1 << 18, (1 << 20) + 5]
"""Of records of all sorts: with and without padding, none of them with a payload that is nothing but padding."""


class MakeTier(Protocol):
    """Makes an empty tier; the suite closes it."""

    def __call__(self, capacity_bytes: int) -> LocalTier: ...


def head_of(number: int, payload_bytes: int) -> Head:
    """The head of record `number`, which belongs to one of two models."""
    return Head(
        key=BlockKey(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()),
        parent=BlockKey(bytes(16)), fingerprint=Fingerprint(bytes([number % 2]) * 32), tenant=TenantDigest(bytes(16)),
        epoch=0, depth=number, tokens=np.arange(number, number + 64, dtype=np.int32).tobytes(),
        extra=b"x" * (number % 3), payload_bytes=payload_bytes, raw_bytes=payload_bytes,
    )  # fmt: skip


def record_of(number: int, payload_bytes: int) -> Bytes:
    """Record `number`, sealed: every byte follows from its number and its length."""
    head = head_of(number, payload_bytes)
    record = np.full(head.record_bytes, 0xEE, np.uint8)
    words = np.arange(-(-payload_bytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number)
    record[PAGE_BYTES : PAGE_BYTES + payload_bytes] = words.view(np.uint8)[:payload_bytes]
    seal(record, head)
    return record


def records_of(count: int, payload_bytes: int, first: int = 0) -> list[Bytes]:
    return [record_of(number, payload_bytes) for number in range(first, first + count)]


def encoded_record_of(number: int, layout: KVLayout, codec: Codec) -> Bytes:
    """Record `number` of a block of normally distributed values, encoded where that saves something, and sealed."""
    values = np.random.Generator(np.random.PCG64(number)).standard_normal(layout.payload_bytes // 4, np.float32)
    payload = values.view(np.uint8)
    if layout.dtype is Dtype.BFLOAT16:  # the upper halves of twice as many floats
        values = np.concatenate([values, values])
        payload = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    encoder = codec_for(layout, codec) if codec is not Codec.NONE else None
    record_bytes = encoder.record_bytes if encoder else layout.record_bytes
    record = np.full(record_bytes, 0xEE, np.uint8)
    head = head_of(number, layout.payload_bytes)
    if encoder is None:
        record[PAGE_BYTES : PAGE_BYTES + layout.payload_bytes] = payload
        seal(record, head)
    else:
        assert encoder.encode(payload, record[PAGE_BYTES : PAGE_BYTES + encoder.encoded_bytes]) is None
        sealed_as(record, head, encoder.number, encoder.params, encoder.encoded_bytes)
    return record


def decoded(record: Bytes, layout: KVLayout) -> Bytes:
    """The payload of a record, as its head says it is encoded."""
    head = read_head(record)
    check_payload(record, head)
    encoded = record[PAGE_BYTES : PAGE_BYTES + head.payload_bytes]
    if not head.codec:
        return encoded
    payload = np.empty(layout.payload_bytes, np.uint8)
    codec_of(layout, head.codec, head.codec_params).decode(encoded, payload)
    return payload


def is_sealed(record: Bytes) -> bool:
    """Whether these bytes are a whole record: what the engine asks of all that it reads."""
    try:
        check_payload(record, read_head(record))
    except CorruptRecordError:
        return False
    return True


def read(tier: LocalTier, place: int, record_bytes: int) -> Bytes | None:
    """The record at `place`, or None where it is not to be had."""
    buffer = np.full(record_bytes, 0x55, np.uint8)
    return buffer if tier.get([place], [buffer]) == [True] else None


def holds(tier: LocalTier, place: int, record: Bytes) -> bool:
    found = read(tier, place, record.nbytes)
    return found is not None and np.array_equal(found, record)


def put(tier: LocalTier, records: Sequence[Buffer]) -> list[int]:
    """Store these, all of which must find room; their places."""
    places = tier.put(records)
    assert tier.used_bytes <= tier.capacity_bytes
    assert len(places) == len(records)
    assert None not in places, "the test's tier is too small"
    return [place for place in places if place is not None]


def fill(tier: LocalTier, payload_bytes: int, first: int = 0) -> dict[int, Bytes]:
    """Store records until one of each model finds no room; what is where."""
    stored: dict[int, Bytes] = {}
    refused: set[int] = set()
    number = first
    while len(refused) < 2:
        if number % 2 not in refused:
            record = record_of(number, payload_bytes)
            [place] = tier.put([record])
            assert tier.used_bytes <= tier.capacity_bytes
            if place is None:
                refused.add(number % 2)
            else:
                assert place not in stored
                stored[place] = record
        number += 1
    return stored


class TierConformance:
    """The rules. A subclass gives the fixture `make_tier`."""

    @pytest.fixture
    def tier(self, make_tier: MakeTier) -> Iterator[LocalTier]:
        tier = make_tier(CAPACITY_BYTES)
        yield tier
        tier.close()

    # --- empty -------------------------------------------------------------------------------------------------------

    def test_an_empty_tier_has_a_name_a_capacity_and_room(self, tier: LocalTier) -> None:
        assert tier.name in set(TierName)
        assert tier.capacity_bytes == CAPACITY_BYTES
        assert 0 <= tier.used_bytes < CAPACITY_BYTES

    def test_a_batch_of_nothing_does_nothing(self, tier: LocalTier) -> None:
        used_bytes = tier.used_bytes
        assert tier.put([]) == []
        assert tier.get([], []) == []
        tier.drop([])
        assert tier.used_bytes == used_bytes

    # --- what is put comes back --------------------------------------------------------------------------------------

    def test_a_record_comes_back_byte_by_byte(self, tier: LocalTier) -> None:
        record = record_of(1, 60_000)
        [place] = put(tier, [record])
        assert holds(tier, place, record)
        assert holds(tier, place, record)

    def test_records_of_all_sizes_come_back_byte_by_byte(self, tier: LocalTier) -> None:
        records = [record_of(number, payload_bytes) for number, payload_bytes in enumerate(PAYLOAD_BYTES)]
        places = put(tier, records)
        assert len(set(places)) == len(places)
        assert all(holds(tier, place, record) for place, record in zip(places, records, strict=True))

    @pytest.mark.parametrize("codec", list(Codec))
    @pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
    def test_records_of_every_codec_come_back_byte_by_byte_and_decode_to_the_same(
        self, tier: LocalTier, codec: Codec, dtype: Dtype
    ) -> None:
        layout = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=dtype, block_tokens=32)
        records = [encoded_record_of(number, layout, codec) for number in range(5)]
        places = put(tier, records)
        for place, record in zip(places, records, strict=True):
            found = read(tier, place, record.nbytes)
            assert found is not None
            assert np.array_equal(decoded(found, layout), decoded(record, layout))
            assert read_head(found) == read_head(record)

    def test_a_batch_of_thousands_comes_back_in_any_order(self, make_tier: MakeTier) -> None:
        tier = make_tier(64 << 20)
        records = records_of(3000, PAGE_BYTES)
        places = put(tier, records)
        order = Random(1).sample(range(len(places)), len(places))
        buffers = [np.empty(2 * PAGE_BYTES, np.uint8) for _ in order]
        assert tier.get([places[at] for at in order], buffers) == [True] * len(order)
        assert all(np.array_equal(buffer, records[at]) for buffer, at in zip(buffers, order, strict=True))
        tier.drop([places[at] for at in order])
        assert tier.get(places, buffers) == [False] * len(places)
        tier.close()

    def test_one_record_can_be_put_twice_and_read_twice_at_once(self, tier: LocalTier) -> None:
        record = record_of(3, 5000)
        first, second = put(tier, [record, record])
        assert first != second
        buffers = [np.empty(record.nbytes, np.uint8) for _ in range(3)]
        assert tier.get([first, second, first], buffers) == [True] * 3
        assert all(np.array_equal(buffer, record) for buffer in buffers)
        tier.drop([first])
        assert holds(tier, second, record)

    def test_any_contiguous_buffer_will_do_aligned_or_not(self, tier: LocalTier) -> None:
        record = record_of(5, 20_000)
        shifted = np.empty(record.nbytes + 1, np.uint8)[1:]
        shifted[:] = record
        sources: list[Buffer] = [
            record.tobytes(),
            bytearray(record),
            memoryview(record.tobytes()),
            record.reshape(-1, 2),
            shifted,
        ]
        places = put(tier, sources)
        bare = bytearray(record.nbytes)
        odd = np.empty(record.nbytes + 3, np.uint8)[3:]
        targets: list[Buffer] = [bare, memoryview(bytearray(record.nbytes)), odd]
        for place in places:
            for target in targets:
                assert tier.get([place], [target]) == [True]
                assert bytes(target) == record.tobytes()

    def test_what_happens_to_a_buffer_after_the_call_changes_nothing(self, tier: LocalTier) -> None:
        record = record_of(7, 60_000)
        mine = record.copy()
        [place] = put(tier, [mine])
        mine[:] = 0
        found = read(tier, place, record.nbytes)
        assert found is not None
        found[:] = 0
        assert holds(tier, place, record)

    # --- full --------------------------------------------------------------------------------------------------------

    def test_a_full_tier_refuses_and_evicts_nothing(self, tier: LocalTier) -> None:
        stored = fill(tier, 60_000)
        assert sum(record.nbytes for record in stored.values()) > CAPACITY_BYTES / 2
        assert tier.put(records_of(2, 60_000, first=10_000)) == [None, None]
        assert all(holds(tier, place, record) for place, record in stored.items())

    def test_a_batch_that_does_not_fit_is_stored_as_far_as_there_is_room(self, tier: LocalTier) -> None:
        records = records_of(CAPACITY_BYTES // 60_000 + 10, 60_000)
        places = tier.put(records)
        assert len(places) == len(records)
        stored = {place: record for place, record in zip(places, records, strict=True) if place is not None}
        assert CAPACITY_BYTES // 2 < sum(record.nbytes for record in stored.values()) <= CAPACITY_BYTES
        assert all(holds(tier, place, record) for place, record in stored.items())
        assert tier.used_bytes <= tier.capacity_bytes

    def test_a_record_larger_than_the_tier_is_refused_and_the_rest_of_its_batch_is_not(self, tier: LocalTier) -> None:
        large, small = record_of(1, CAPACITY_BYTES), record_of(2, 5000)
        no_place, place = tier.put([large, small])
        assert no_place is None
        assert place is not None
        assert holds(tier, place, small)

    # --- dropped -----------------------------------------------------------------------------------------------------

    def test_what_was_dropped_is_absent_and_its_neighbours_are_not(self, tier: LocalTier) -> None:
        records = records_of(9, 5000)
        places = put(tier, records)
        tier.drop(places[::2])
        for index, (place, record) in enumerate(zip(places, records, strict=True)):
            assert holds(tier, place, record) == bool(index % 2)
            assert (read(tier, place, record.nbytes) is None) == (index % 2 == 0)

    def test_an_absent_record_leaves_the_rest_of_its_batch_alone(self, tier: LocalTier) -> None:
        records = records_of(3, 5000)
        places = put(tier, records)
        tier.drop(places[1:2])
        buffers = [np.empty(record.nbytes, np.uint8) for record in records]
        assert tier.get(places, buffers) == [True, False, True]
        assert np.array_equal(buffers[0], records[0])
        assert np.array_equal(buffers[2], records[2])

    def test_dropping_an_unknown_place_is_an_error(self, tier: LocalTier) -> None:
        place, other = put(tier, records_of(2, 5000))
        tier.drop([place])
        with pytest.raises(ValueError, match=r".+"):
            tier.drop([place])
        with pytest.raises(ValueError, match=r".+"):
            tier.drop([other, other])
        assert tier.used_bytes <= tier.capacity_bytes

    def test_what_was_dropped_makes_room_for_records_of_other_sizes_again_and_again(self, tier: LocalTier) -> None:
        stored: dict[int, Bytes] = {}
        for turn, payload_bytes in enumerate((60_000, 5000, 1 << 18, 60_000, 1 << 19, 9000)):
            tier.drop(list(stored))
            stored = fill(tier, payload_bytes, first=10_000 * turn)
            assert sum(record.nbytes for record in stored.values()) > CAPACITY_BYTES / 4
            assert all(holds(tier, place, record) for place, record in stored.items())

    # --- errors of the caller ----------------------------------------------------------------------------------------

    def test_a_buffer_that_is_no_whole_record_is_refused_with_its_batch(self, tier: LocalTier) -> None:
        whole, cut = record_of(1, 5000), record_of(3, 5000)[:-1]
        used_bytes = tier.used_bytes
        with pytest.raises(ValueError, match="bytes"):
            tier.put([whole, cut])
        assert tier.used_bytes == used_bytes

    @pytest.mark.parametrize("difference", [-PAGE_BYTES, -1, 1, PAGE_BYTES])
    def test_a_buffer_of_another_length_is_refused_and_not_written(self, tier: LocalTier, difference: int) -> None:
        record = record_of(1, 5000)
        place, other = put(tier, [record, record_of(3, 5000)])
        buffers = [np.full(record.nbytes, 9, np.uint8), np.full(record.nbytes + difference, 9, np.uint8)]
        with pytest.raises(ValueError, match="its buffer"):
            tier.get([place, other], buffers)
        assert all((buffer == 9).all() for buffer in buffers)
        with pytest.raises(ValueError, match="shorter"):
            tier.get([place, other], buffers[:1])

    # --- threads -----------------------------------------------------------------------------------------------------

    def test_readers_and_writers_at_once_meet_whole_records_or_none(self, tier: LocalTier) -> None:
        traffic = Traffic(tier)
        with ThreadPoolExecutor(6) as pool:
            writers = [pool.submit(traffic.write, seed, 60) for seed in range(3)]
            readers = [pool.submit(traffic.read, seed) for seed in range(3)]
            for writer in writers:
                writer.result()
            traffic.ended.set()
            assert all(reader.result() for reader in readers)
        assert all(holds(tier, place, record_of(*named)) for place, named in traffic.known.items())
        assert traffic.known

    def test_records_that_are_put_at_once_never_meet_in_one_place(self, tier: LocalTier) -> None:
        with ThreadPoolExecutor(4) as pool:
            batches = list(pool.map(lambda first: put(tier, records_of(20, 60_000, first=first)), range(0, 160, 20)))
        places = [place for batch in batches for place in batch]
        assert len(set(places)) == 160
        assert all(holds(tier, place, record_of(number, 60_000)) for number, place in enumerate(places))

    # --- closed ------------------------------------------------------------------------------------------------------

    def test_a_closed_tier_says_that_it_is_out_and_may_be_closed_again(self, tier: LocalTier) -> None:
        record = record_of(1, 5000)
        [place] = put(tier, [record])
        tier.close()
        tier.close()
        with pytest.raises(TierUnavailableError, match="closed"):
            tier.put([record])
        with pytest.raises(TierUnavailableError, match="closed"):
            tier.get([place], [np.empty(record.nbytes, np.uint8)])

    def test_closing_while_others_read_and_write_hurts_nobody(self, make_tier: MakeTier) -> None:
        tier = make_tier(CAPACITY_BYTES)
        traffic = Traffic(tier)
        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(traffic.write, seed, 1 << 20) for seed in range(2)]
            readers = [pool.submit(traffic.read, seed) for seed in range(2)]
            traffic.some_known.wait(timeout=30)
            tier.close()
            failures = [writer.exception(timeout=30) for writer in writers]
            failures += [reader.exception(timeout=30) for reader in readers]
        assert all(isinstance(failure, TierUnavailableError) for failure in failures), failures


class Traffic:
    """Threads that put, read and drop records of one tier; `known` says which record each place holds."""

    def __init__(self, tier: LocalTier) -> None:
        self.tier = tier
        self.known: dict[int, tuple[int, int]] = {}
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.some_known = threading.Event()

    def write(self, seed: int, batches: int) -> None:
        """Put batches of records; drop some of this thread's own now and then, and whenever there is no room."""
        random = Random(seed)
        mine: list[int] = []
        for batch in range(batches):
            first = (seed * batches + batch) * 4
            named = [(number, random.choice(PAYLOAD_BYTES[1:7])) for number in range(first, first + 4)]
            places = self.tier.put([record_of(*name) for name in named])
            assert self.tier.used_bytes <= CAPACITY_BYTES
            with self.lock:
                for place, name in zip(places, named, strict=True):
                    if place is not None:
                        assert place not in self.known, "two records in one place"
                        self.known[place] = name
                        mine.append(place)
            self.some_known.set()
            if None in places or random.random() < 0.3:
                random.shuffle(mine)
                self.drop([mine.pop() for _ in range(len(mine) // 2)])

    def drop(self, places: list[int]) -> None:
        with self.lock:
            for place in places:
                del self.known[place]
        self.tier.drop(places)

    def read(self, seed: int) -> int:
        """Read until `ended`, and something at least; how many records were met."""
        random = Random(seed)
        met = 0
        while not (met and self.ended.is_set()):
            with self.lock:
                chosen = random.sample(list(self.known.items()), min(4, len(self.known)))
            buffers = [np.empty(head_of(*name).record_bytes, np.uint8) for _, name in chosen]
            arrived = self.tier.get([place for place, _ in chosen], buffers)
            assert self.tier.used_bytes <= CAPACITY_BYTES
            with self.lock:
                kept = [self.known.get(place) == name for place, name in chosen]
            for (_, name), buffer, came, was_kept in zip(chosen, buffers, arrived, kept, strict=True):
                met += self.judge(name, buffer, came=came, was_kept=was_kept)
        return met

    @staticmethod
    def judge(name: tuple[int, int], buffer: Bytes, *, came: bool, was_kept: bool) -> bool:
        """What was there all the while must have come; what was dropped meanwhile may be anything but wrong."""
        if was_kept:
            assert came
            assert np.array_equal(buffer, record_of(*name))
        elif came and is_sealed(buffer):
            head = read_head(buffer)
            end = PAGE_BYTES + head.payload_bytes
            assert np.array_equal(buffer[:end], record_of(head.depth, head.payload_bytes)[:end])
        return came

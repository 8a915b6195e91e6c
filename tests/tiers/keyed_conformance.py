"""What every keyed tier must do, whatever it is made of.

A tier joins by a subclass of `KeyedConformance` whose fixture `make_tier` makes a client of one store, empty at first;
called again it makes another client of the same store. Nothing here knows a tier's own names: a rule that needs them
belongs into that tier's own tests, as do its faults.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from random import Random
from typing import Protocol

import numpy as np
import pytest

from kvpool.api.codec import Codec
from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.layout import PAGE_BYTES, Dtype, KVLayout
from kvpool.blocks.record import CODEC_NONE, Buffer, read_head
from kvpool.tiers.tier import Found, KeyedTier, Moved, Sealed, TierName, TierUnavailableError
from tests.tiers.conformance import Bytes, decoded, encoded_record_of, head_of, is_sealed, record_of

PAYLOAD_BYTES = [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 60_000, 1 << 18, (1 << 20) + 5]
OTHER_CODEC = 3


class MakeKeyedTier(Protocol):
    """Makes a client of the store; the suite closes it."""

    def __call__(self) -> KeyedTier: ...


def tree_of(number: int = 0, *, tenant: int = 0, epoch: int = 0) -> TreeId:
    """The tree of a model and a tenant."""
    return TreeId(Fingerprint(bytes([number]) * 32), TenantDigest(bytes([tenant]) * 16), epoch)


def sealed_of(number: int, payload_bytes: int, codec: int = CODEC_NONE) -> Sealed:
    return Sealed(head_of(number, payload_bytes).key, codec, record_of(number, payload_bytes))


def chain(count: int, payload_bytes: int = 5000, first: int = 0) -> list[Sealed]:
    """Records of consecutive blocks."""
    return [sealed_of(number, payload_bytes) for number in range(first, first + count)]


def keys_of(records: Sequence[Sealed]) -> list[BlockKey]:
    return [sealed.key for sealed in records]


def found_of(sealed: Sealed) -> Found:
    """What `find` is to say of a record that is there."""
    return Found(sealed.key, sealed.codec, len(memoryview(sealed.record).cast("B")))


def put(tier: KeyedTier, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey] = ()) -> None:
    """Store these, all of which must be taken."""
    assert tier.put(tree, records, ancestors) == Moved([True] * len(records))


def read(tier: KeyedTier, tree: TreeId, found: Found) -> Bytes | None:
    """A record, or None where it is not to be had."""
    buffer = np.full(found.record_bytes, 0x55, np.uint8)
    return buffer if tier.get(tree, [found], [buffer]) == Moved([True]) else None


def holds(tier: KeyedTier, tree: TreeId, sealed: Sealed) -> bool:
    """Whether the tier says that it has this record, and gives it back as it was."""
    if tier.find(tree, [sealed.key], [sealed.codec]) != [found_of(sealed)]:
        return False
    came = read(tier, tree, found_of(sealed))
    return came is not None and np.array_equal(came, np.frombuffer(sealed.record, np.uint8))


class KeyedConformance:
    """The rules. A subclass gives the fixture `make_tier`."""

    @pytest.fixture
    def tier(self, make_tier: MakeKeyedTier) -> Iterator[KeyedTier]:
        tier = make_tier()
        yield tier
        tier.close()

    # --- empty -------------------------------------------------------------------------------------------------------

    def test_an_empty_tier_has_a_name_and_no_block(self, tier: KeyedTier) -> None:
        assert tier.name in set(TierName)
        assert tier.find(tree_of(), keys_of(chain(3)), [CODEC_NONE, OTHER_CODEC]) == [None] * 3

    def test_a_batch_of_nothing_does_nothing(self, tier: KeyedTier) -> None:
        assert tier.find(tree_of(), [], [CODEC_NONE]) == []
        assert tier.get(tree_of(), [], []) == Moved([])
        assert tier.put(tree_of(), [], []) == Moved([])
        tier.touch(tree_of(), [], [CODEC_NONE])
        tier.drop(tree_of(), [])

    def test_it_says_how_full_it_is(self, tier: KeyedTier) -> None:
        put(tier, tree_of(), chain(4, 1 << 18))
        used_bytes, capacity_bytes = tier.usage()
        assert used_bytes >= 4 << 18
        assert capacity_bytes == 0 or capacity_bytes >= used_bytes

    # --- what is put comes back --------------------------------------------------------------------------------------

    def test_a_record_comes_back_byte_by_byte(self, tier: KeyedTier) -> None:
        sealed = sealed_of(1, 60_000)
        put(tier, tree_of(), [sealed])
        assert holds(tier, tree_of(), sealed)
        assert holds(tier, tree_of(), sealed)

    def test_records_of_all_sizes_come_back_byte_by_byte(self, tier: KeyedTier) -> None:
        records = [sealed_of(number, payload_bytes) for number, payload_bytes in enumerate(PAYLOAD_BYTES)]
        put(tier, tree_of(), records)
        found = tier.find(tree_of(), keys_of(records), [CODEC_NONE])
        assert found == [found_of(sealed) for sealed in records]
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in records]
        assert tier.get(tree_of(), [found_of(sealed) for sealed in records], buffers) == Moved([True] * len(records))
        assert all(np.array_equal(buffer, sealed.record) for buffer, sealed in zip(buffers, records, strict=True))

    @pytest.mark.parametrize("codec", list(Codec))
    @pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
    def test_records_of_every_codec_come_back_byte_by_byte_and_decode_to_the_same(
        self, tier: KeyedTier, codec: Codec, dtype: Dtype
    ) -> None:
        layout = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=dtype, block_tokens=32)
        encoded = [encoded_record_of(number, layout, codec) for number in range(5)]
        records = [Sealed(read_head(record).key, read_head(record).codec, record) for record in encoded]
        put(tier, tree_of(), records)
        codecs = sorted({sealed.codec for sealed in records})
        for sealed, found in zip(records, tier.find(tree_of(), keys_of(records), codecs), strict=True):
            assert found == found_of(sealed)
            came = read(tier, tree_of(), found)
            assert came is not None
            assert np.array_equal(decoded(came, layout), decoded(sealed.record, layout))
            assert read_head(came) == read_head(sealed.record)

    def test_what_one_client_puts_another_finds(self, tier: KeyedTier, make_tier: MakeKeyedTier) -> None:
        records = chain(3)
        put(tier, tree_of(), records)
        other = make_tier()
        assert all(holds(other, tree_of(), sealed) for sealed in records)
        other.drop(tree_of(), [found_of(records[0])])
        other.close()
        assert tier.find(tree_of(), keys_of(records), [CODEC_NONE])[0] is None
        assert holds(tier, tree_of(), records[1])

    def test_a_batch_of_thousands_comes_back_in_any_order(self, tier: KeyedTier) -> None:
        records = chain(2000, PAGE_BYTES)
        put(tier, tree_of(), records)
        wanted = Random(1).sample(records, len(records))
        assert tier.find(tree_of(), keys_of(wanted), [CODEC_NONE]) == [found_of(sealed) for sealed in wanted]
        buffers = [np.empty(2 * PAGE_BYTES, np.uint8) for _ in wanted]
        assert tier.get(tree_of(), [found_of(sealed) for sealed in wanted], buffers) == Moved([True] * len(wanted))
        assert all(np.array_equal(buffer, sealed.record) for buffer, sealed in zip(buffers, wanted, strict=True))
        tier.drop(tree_of(), [found_of(sealed) for sealed in wanted])
        assert tier.find(tree_of(), keys_of(records), [CODEC_NONE]) == [None] * len(records)

    def test_any_contiguous_buffer_will_do_aligned_or_not(self, tier: KeyedTier) -> None:
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
        records = [Sealed(head_of(number, 0).key, CODEC_NONE, source) for number, source in enumerate(sources)]
        put(tier, tree_of(), records)
        odd = np.empty(record.nbytes + 3, np.uint8)[3:]
        targets: list[Buffer] = [bytearray(record.nbytes), memoryview(bytearray(record.nbytes)), odd]
        for sealed in records:
            for target in targets:
                assert tier.get(tree_of(), [found_of(sealed)], [target]) == Moved([True])
                assert bytes(target) == record.tobytes()

    def test_what_happens_to_a_buffer_after_the_call_changes_nothing(self, tier: KeyedTier) -> None:
        sealed = sealed_of(7, 60_000)
        mine = sealed.record.copy()
        put(tier, tree_of(), [sealed._replace(record=mine)])
        mine[:] = 0
        came = read(tier, tree_of(), found_of(sealed))
        assert came is not None
        came[:] = 0
        assert holds(tier, tree_of(), sealed)

    def test_one_record_can_be_read_twice_at_once(self, tier: KeyedTier) -> None:
        sealed = sealed_of(3, 5000)
        put(tier, tree_of(), [sealed])
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for _ in range(2)]
        assert tier.get(tree_of(), [found_of(sealed)] * 2, buffers) == Moved([True, True])
        assert all(np.array_equal(buffer, sealed.record) for buffer in buffers)

    # --- which of them -----------------------------------------------------------------------------------------------

    def test_the_first_codec_that_is_asked_for_and_there_is_found(self, tier: KeyedTier) -> None:
        plain, small = sealed_of(1, 60_000), sealed_of(1, 20_000, OTHER_CODEC)
        put(tier, tree_of(), [plain])
        put(tier, tree_of(), [small])
        key = plain.key
        assert tier.find(tree_of(), [key], [CODEC_NONE, OTHER_CODEC]) == [found_of(plain)]
        assert tier.find(tree_of(), [key], [OTHER_CODEC, CODEC_NONE]) == [found_of(small)]
        tier.drop(tree_of(), [found_of(plain)])
        assert tier.find(tree_of(), [key], [CODEC_NONE, OTHER_CODEC]) == [found_of(small)]
        assert tier.find(tree_of(), [key], [CODEC_NONE]) == [None]
        assert holds(tier, tree_of(), small)

    def test_a_question_can_be_asked_first_and_answered_later(self, tier: KeyedTier) -> None:
        records = chain(3)
        tree, absent = tree_of(), keys_of(chain(3, first=10))
        put(tier, tree, records[:2])
        with closing(tier.inquire(tree, keys_of(records), [CODEC_NONE])) as first:
            with closing(tier.inquire(tree, absent, [OTHER_CODEC, CODEC_NONE])) as second:
                assert second.answer() == [None] * 3
            assert first.answer() == [found_of(records[0]), found_of(records[1]), None]

    def test_a_question_may_be_given_up(self, tier: KeyedTier) -> None:
        records = chain(2)
        put(tier, tree_of(), records)
        for _ in range(30):  # more than it has connections
            tier.inquire(tree_of(), keys_of(records), [CODEC_NONE]).close()
        assert tier.find(tree_of(), keys_of(records), [CODEC_NONE]) == [found_of(record) for record in records]

    def test_what_is_there_already_is_taken_again_and_stays(self, tier: KeyedTier) -> None:
        records = chain(4)
        put(tier, tree_of(), records[:2])
        put(tier, tree_of(), records)
        assert all(holds(tier, tree_of(), sealed) for sealed in records)

    def test_blocks_whose_ancestors_are_not_there_are_stored(self, tier: KeyedTier) -> None:
        records = chain(6)
        put(tier, tree_of(), records[4:], keys_of(records[:4]))
        found = tier.find(tree_of(), keys_of(records), [CODEC_NONE])
        assert [block is not None for block in found] == [False] * 4 + [True] * 2

    def test_what_is_touched_need_not_be_there(self, tier: KeyedTier) -> None:
        records = chain(3)
        put(tier, tree_of(), records[:2])
        tier.touch(tree_of(), keys_of(records), [CODEC_NONE, OTHER_CODEC])
        assert all(holds(tier, tree_of(), sealed) for sealed in records[:2])
        assert tier.find(tree_of(), keys_of(records[2:]), [CODEC_NONE]) == [None]

    # --- gone, or another --------------------------------------------------------------------------------------------

    def test_what_was_dropped_is_absent_and_its_neighbours_are_not(self, tier: KeyedTier) -> None:
        records = chain(9)
        put(tier, tree_of(), records)
        tier.drop(tree_of(), [found_of(sealed) for sealed in records[::2]])
        for at, sealed in enumerate(records):
            assert holds(tier, tree_of(), sealed) == bool(at % 2)
        tier.drop(tree_of(), [found_of(sealed) for sealed in records[::2]])

    def test_an_absent_record_leaves_the_rest_of_its_batch_alone(self, tier: KeyedTier) -> None:
        records = chain(3)
        put(tier, tree_of(), [records[0], records[2]])
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in records]
        assert tier.get(tree_of(), [found_of(sealed) for sealed in records], buffers) == Moved([True, False, True])
        assert np.array_equal(buffers[0], records[0].record)
        assert np.array_equal(buffers[2], records[2].record)

    @pytest.mark.parametrize("payload_bytes", [20_000, 1 << 20])
    @pytest.mark.parametrize("difference", [-PAGE_BYTES, PAGE_BYTES])
    def test_a_record_of_another_length_than_was_found_does_not_come(
        self, tier: KeyedTier, payload_bytes: int, difference: int
    ) -> None:
        first, other, last = chain(3, payload_bytes)
        put(tier, tree_of(), [first, other, last])
        wanted = [found_of(first), found_of(other), found_of(last)]
        wanted[1] = wanted[1]._replace(record_bytes=wanted[1].record_bytes + difference)
        buffers = [np.empty(found.record_bytes, np.uint8) for found in wanted]
        assert tier.get(tree_of(), wanted, buffers) == Moved([True, False, True])
        assert np.array_equal(buffers[0], first.record)
        assert np.array_equal(buffers[2], last.record)

    @pytest.mark.parametrize("difference", [-PAGE_BYTES, -1, 1, PAGE_BYTES])
    def test_a_buffer_of_another_length_is_refused_and_not_written(self, tier: KeyedTier, difference: int) -> None:
        records = chain(2)
        put(tier, tree_of(), records)
        wanted = [found_of(sealed) for sealed in records]
        buffers = [
            np.full(wanted[0].record_bytes, 9, np.uint8),
            np.full(wanted[1].record_bytes + difference, 9, np.uint8),
        ]
        with pytest.raises(ValueError, match="bytes"):
            tier.get(tree_of(), wanted, buffers)
        with pytest.raises(ValueError, match="shorter"):
            tier.get(tree_of(), wanted, buffers[:1])
        with pytest.raises(ValueError, match="bytes"):
            tier.get(tree_of(), wanted[:1], [bytes(wanted[0].record_bytes)])
        assert all((buffer == 9).all() for buffer in buffers)

    # --- erased ------------------------------------------------------------------------------------------------------

    def test_erasing_a_tenant_takes_all_of_its_earlier_epochs_and_nothing_else(self, tier: KeyedTier) -> None:
        trees = {
            "old": tree_of(1, tenant=1, epoch=3), "older": tree_of(2, tenant=1, epoch=2),
            "new": tree_of(1, tenant=1, epoch=4), "other": tree_of(1, tenant=2, epoch=3),
        }  # fmt: skip
        records = {name: chain(5, first=10 * at) for at, name in enumerate(trees)}
        for name, tree in trees.items():
            put(tier, tree, records[name])
        assert tier.erase(trees["old"].tenant, 4) == 10
        for name, tree in trees.items():
            kept = name in ("new", "other")
            assert all(holds(tier, tree, sealed) == kept for sealed in records[name]), name
        assert tier.erase(trees["old"].tenant, 4) == 0

    def test_forgetting_a_model_takes_all_of_its_records_and_nothing_else(self, tier: KeyedTier) -> None:
        trees = {
            "mine": tree_of(1, tenant=1, epoch=3),
            "too": tree_of(1, tenant=2),
            "other": tree_of(2, tenant=1, epoch=3),
        }
        records = {name: chain(5, first=10 * at) for at, name in enumerate(trees)}
        for name, tree in trees.items():
            put(tier, tree, records[name])
        assert tier.forget_model(trees["mine"].fingerprint) == 10
        for name, tree in trees.items():
            assert all(holds(tier, tree, sealed) == (name == "other") for sealed in records[name]), name

    def test_thousands_are_erased_while_others_are_put(self, tier: KeyedTier, make_tier: MakeKeyedTier) -> None:
        doomed, kept = tree_of(1, tenant=1), tree_of(1, tenant=2)
        put(tier, doomed, chain(3000, PAGE_BYTES))
        other, ended = make_tier(), threading.Event()

        def store() -> list[Sealed]:
            stored: list[Sealed] = []
            while not ended.is_set() and len(stored) < 2000:
                batch = chain(10, PAGE_BYTES, first=10_000 + len(stored))
                put(other, kept, batch)
                stored += batch
            return stored

        with ThreadPoolExecutor(1) as pool:
            storing = pool.submit(store)
            try:
                assert tier.erase(doomed.tenant, 1) == 3000
            finally:
                ended.set()
            stored = storing.result()
        assert tier.find(kept, keys_of(stored), [CODEC_NONE]) == [found_of(sealed) for sealed in stored]
        other.close()

    # --- threads -----------------------------------------------------------------------------------------------------

    def test_readers_and_writers_at_once_meet_whole_records_or_none(self, tier: KeyedTier) -> None:
        traffic = Traffic(tier)
        with ThreadPoolExecutor(6) as pool:
            writers = [pool.submit(traffic.write, seed, 30) for seed in range(3)]
            readers = [pool.submit(traffic.read, seed) for seed in range(3)]
            try:
                for writer in writers:
                    writer.result()
            finally:
                traffic.ended.set()
            assert all(reader.result() for reader in readers)

    # --- closed ------------------------------------------------------------------------------------------------------

    def test_a_closed_tier_says_that_it_is_out_and_may_be_closed_again(self, tier: KeyedTier) -> None:
        sealed = sealed_of(1, 5000)
        put(tier, tree_of(), [sealed])
        tier.close()
        tier.close()
        with pytest.raises(TierUnavailableError, match="closed"):
            tier.find(tree_of(), [sealed.key], [CODEC_NONE])
        with pytest.raises(TierUnavailableError, match="closed"):
            tier.put(tree_of(), [sealed], [])
        with pytest.raises(TierUnavailableError, match="closed"):
            tier.get(tree_of(), [found_of(sealed)], [np.empty(sealed.record.nbytes, np.uint8)])

    def test_closing_while_others_read_and_write_hurts_nobody(self, tier: KeyedTier) -> None:
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
    """Threads that put, read and drop records of one tree; a record is a function of its number."""

    def __init__(self, tier: KeyedTier) -> None:
        self.tier = tier
        self.tree = tree_of(5, tenant=5)
        self.ended = threading.Event()
        self.some_known = threading.Event()
        self.known: dict[int, int] = {}
        """The payload's length of every record that was ever put, by its number."""

    def write(self, seed: int, batches: int) -> None:
        """Put batches of records, and drop some of this thread's own."""
        random = Random(seed)
        for batch in range(batches):
            first = seed * 100_000_000 + batch * 4
            named = {first + at: random.choice(PAYLOAD_BYTES[:6]) for at in range(4)}
            records = [sealed_of(number, payload_bytes) for number, payload_bytes in named.items()]
            moved = self.tier.put(self.tree, records, [])
            if moved.fault:
                raise TierUnavailableError(self.tier.name, moved.fault)
            assert all(moved.done)
            self.known |= named
            self.some_known.set()
            if random.random() < 0.3:
                self.tier.drop(self.tree, [found_of(sealed) for sealed in random.sample(records, 2)])

    def read(self, seed: int) -> int:
        """Read until `ended`, and something at least; how many records were met."""
        random = Random(seed)
        met = 0
        while not (met and self.ended.is_set()):
            known = list(self.known.copy().items())
            chosen = random.sample(known, min(4, len(known)))
            wanted = [found_of(sealed_of(*named)) for named in chosen]
            buffers = [np.empty(found.record_bytes, np.uint8) for found in wanted]
            moved = self.tier.get(self.tree, wanted, buffers)
            if moved.fault:
                raise TierUnavailableError(self.tier.name, moved.fault)
            for named, buffer, came in zip(chosen, buffers, moved.done, strict=True):
                assert not came or (is_sealed(buffer) and np.array_equal(buffer, record_of(*named)))
                met += came
        return met

"""A record comes back as it was stored, or not at all."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import xxhash
from hypothesis import given

from kvpool.blocks.identity import MAX_EXTRA_KEY_BYTES, BlockKey, Fingerprint, TenantDigest
from kvpool.blocks.layout import MAX_BLOCK_TOKENS, PAGE_BYTES, Dtype, KVLayout
from kvpool.blocks.record import (
    MAX_VARIABLE_BYTES,
    Corruption,
    CorruptRecordError,
    Head,
    check_payload,
    open_record,
    read_head,
    seal,
)
from kvpool.errors import InputError

from .samples import LAYOUT, head_of, payload_of, sealed

_SUM_AT = PAGE_BYTES - 8
CODEC_AT, PARAMS_LENGTH_AT, TOKENS_LENGTH_AT, EXTRA_LENGTH_AT, ZERO_AT = 10, 12, 108, 112, 116
PAYLOAD_LENGTH_AT, RAW_LENGTH_AT = 120, 128


def reason_of(record: Any, expected: Head) -> Corruption | None:
    try:
        open_record(record, expected)
    except CorruptRecordError as error:
        return error.reason
    return None


def rewritten(record: bytearray, at: int, packed: bytes) -> bytearray:
    """The record with this written into its head, and the head's checksum made right again."""
    copy = bytearray(record)
    copy[at : at + len(packed)] = packed
    copy[_SUM_AT:PAGE_BYTES] = xxhash.xxh3_64_intdigest(copy[:_SUM_AT]).to_bytes(8, "little")
    return copy


@pytest.mark.parametrize("latent", [False, True], ids=["keys-values", "latent"])
@pytest.mark.parametrize("dtype", Dtype)
def test_a_record_comes_back_as_it_was_sealed(dtype: Dtype, latent: bool) -> None:
    layout = (
        KVLayout(layers=3, kv_heads=1, head_size=144, dtype=dtype, block_tokens=16, value_head_size=0)
        if latent
        else KVLayout(layers=3, kv_heads=2, head_size=24, dtype=dtype, block_tokens=16, value_head_size=16)
    )
    head = head_of(layout)
    record = sealed(head)
    found = open_record(record, head)
    assert dataclasses.replace(found, checksum=0) == head
    assert record[PAGE_BYTES : PAGE_BYTES + layout.payload_bytes] == payload_of(layout.payload_bytes).tobytes()
    assert len(record) == layout.record_bytes == found.record_bytes


@given(
    key=st.binary(min_size=16, max_size=16).map(BlockKey), parent=st.binary(min_size=16, max_size=16).map(BlockKey),
    fingerprint=st.binary(min_size=32, max_size=32).map(Fingerprint),
    tenant=st.binary(min_size=16, max_size=16).map(TenantDigest), epoch=st.integers(0, 2**64 - 1),
    depth=st.integers(0, 2**32 - 1), tokens=st.binary(max_size=2048), extra=st.binary(max_size=1024),
    params=st.binary(max_size=400), codec=st.integers(1, 2**16 - 1), payload=st.binary(max_size=9000),
    raw_bytes=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_any_head_and_payload_come_back(
    key: BlockKey, parent: BlockKey, fingerprint: Fingerprint, tenant: TenantDigest, epoch: int, depth: int,
    tokens: bytes, extra: bytes, params: bytes, codec: int, payload: bytes, raw_bytes: int,
) -> None:  # fmt: skip
    head = Head(
        key=key, parent=parent, fingerprint=fingerprint, tenant=tenant, epoch=epoch, depth=depth, tokens=tokens,
        extra=extra, payload_bytes=len(payload), raw_bytes=raw_bytes, codec=codec, codec_params=params,
        checksum=xxhash.xxh3_64_intdigest(payload),
    )  # fmt: skip
    record = bytearray(b"\xee") * head.record_bytes
    record[PAGE_BYTES : PAGE_BYTES + len(payload)] = payload
    seal(record, head)
    assert open_record(record, head) == head
    assert record[PAGE_BYTES:].rstrip(b"\0") == payload.rstrip(b"\0")


def test_every_kind_of_buffer_gives_the_same_record() -> None:
    head = head_of()
    expected = sealed(head)
    backing = bytearray(expected)
    for buffer in (backing, memoryview(backing), np.frombuffer(backing, np.uint8)):
        backing[:PAGE_BYTES] = bytes(PAGE_BYTES)
        seal(buffer, head)
        assert backing == expected
        assert open_record(buffer, head).checksum


def test_every_flipped_byte_is_found() -> None:
    head = head_of()
    record = sealed(head)
    assert head.payload_bytes % PAGE_BYTES, "the record must have padding, for that is tested too"
    for at in range(len(record)):
        record[at] ^= 1 << at % 8
        assert reason_of(record, head) is not None, f"byte {at}"
        record[at] ^= 1 << at % 8
    assert reason_of(record, head) is None


@pytest.mark.parametrize("size", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES - 1])
def test_a_truncated_record_is_no_record(size: int) -> None:
    head = head_of()
    assert reason_of(sealed(head)[:size], head) is Corruption.TRUNCATED


def test_what_lies_behind_a_record_is_not_looked_at() -> None:
    head = head_of()
    assert reason_of(sealed(head) + b"next", head) is None


@pytest.mark.parametrize("version", [0, 2, 3, 65535])
def test_an_unknown_version_is_a_miss_whatever_else_the_head_holds(version: int) -> None:
    head = head_of()
    record = sealed(head)
    record[8:10] = version.to_bytes(2, "little")
    record[12:PAGE_BYTES] = bytes(PAGE_BYTES - 12)  # another version may lay all of this out otherwise
    with pytest.raises(CorruptRecordError) as caught:
        read_head(record)
    assert caught.value.reason is Corruption.VERSION


@pytest.mark.parametrize("magic", [bytes(8), b"kvpool\0S", b"kvpool\0F", b"KVPOOL\0R"])
def test_what_begins_otherwise_is_no_record(magic: bytes) -> None:
    record = sealed(head_of())
    record[:8] = magic
    assert reason_of(record, head_of()) is Corruption.MAGIC


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("fingerprint", Fingerprint(bytes(32)), Corruption.FINGERPRINT),
        ("tenant", TenantDigest(bytes(16)), Corruption.TENANT),
        ("epoch", 4, Corruption.EPOCH),
        ("key", BlockKey(bytes(16)), Corruption.KEY),
        ("parent", BlockKey(bytes(16)), Corruption.KEY),
        ("depth", 2, Corruption.KEY),
        ("tokens", bytes(LAYOUT.token_bytes), Corruption.TOKENS),
        ("tokens", bytes(LAYOUT.token_bytes - 1), Corruption.TOKENS),
        ("extra", b"", Corruption.TOKENS),
        ("extra", b"image-digesu", Corruption.TOKENS),
    ],
)
def test_a_whole_record_of_another_block_is_not_the_one_asked_for(field: str, value: Any, reason: Corruption) -> None:
    asked = head_of()
    record = sealed(dataclasses.replace(asked, **{field: value}))
    assert reason_of(record, dataclasses.replace(asked, **{field: value})) is None
    assert reason_of(record, asked) is reason


def test_the_boundary_between_tokens_and_extra_key_is_compared() -> None:
    head = head_of()
    joined = head.tokens + head.extra
    shifted = dataclasses.replace(head, tokens=joined[:-4], extra=joined[-4:])
    assert reason_of(sealed(shifted), head) is Corruption.TOKENS


def test_an_unencoded_payload_has_the_length_that_the_engine_had() -> None:
    head = head_of(payload_bytes=LAYOUT.payload_bytes - 1)
    assert reason_of(sealed(head), head) is Corruption.LENGTH
    encoded = dataclasses.replace(head, codec=7)
    assert reason_of(sealed(encoded), encoded) is None


@pytest.mark.parametrize("at", [PARAMS_LENGTH_AT, TOKENS_LENGTH_AT, EXTRA_LENGTH_AT, ZERO_AT])
@pytest.mark.parametrize("length", [MAX_VARIABLE_BYTES + 1, 2**31, 2**32 - 1])
def test_a_head_that_claims_more_than_a_page_is_refused_before_memory_is_taken(at: int, length: int) -> None:
    record = rewritten(sealed(head_of()), at, struct.pack("<I", length))
    tracemalloc.start()
    try:
        reason = reason_of(record, head_of())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reason is Corruption.LENGTH
    assert peak < 64 << 10


@pytest.mark.parametrize("codec", [0, 7])
@pytest.mark.parametrize("length", [LAYOUT.payload_bytes + PAGE_BYTES, 2**32, 2**63, 2**64 - 1])
def test_a_head_that_claims_a_huge_payload_is_refused_before_memory_is_taken(codec: int, length: int) -> None:
    record = rewritten(sealed(head_of()), CODEC_AT, struct.pack("<H", codec))
    record = rewritten(record, PAYLOAD_LENGTH_AT, struct.pack("<Q", length))
    tracemalloc.start()
    try:
        reason = reason_of(record, head_of())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reason is (Corruption.TRUNCATED if codec else Corruption.LENGTH)
    assert peak < 64 << 10


@pytest.mark.parametrize("length", [0, LAYOUT.payload_bytes - 1, 2**64 - 1])
def test_another_raw_length_is_refused(length: int) -> None:
    record = rewritten(sealed(head_of()), RAW_LENGTH_AT, struct.pack("<Q", length))
    assert reason_of(record, head_of()) is Corruption.LENGTH


@given(st.binary(min_size=_SUM_AT, max_size=_SUM_AT) | st.binary(max_size=200))
def test_a_page_of_anything_is_refused_or_read_without_another_error(noise: bytes) -> None:
    record = rewritten(bytearray(b"kvpool\0R\1\0" + noise).ljust(PAGE_BYTES, b"\0")[:PAGE_BYTES], 0, b"")
    assert reason_of(record, head_of()) is not None


def test_the_largest_block_has_room_for_its_tokens_extra_keys_and_some_parameters() -> None:
    assert 4 * MAX_BLOCK_TOKENS + MAX_EXTRA_KEY_BYTES + 512 <= MAX_VARIABLE_BYTES


def test_a_head_without_room_is_refused_and_the_buffer_left_alone() -> None:
    head = head_of(codec_params=bytes(MAX_VARIABLE_BYTES))
    record = bytearray(head.record_bytes)
    with pytest.raises(InputError, match="has room for"):
        seal(record, head)
    assert record == bytearray(head.record_bytes)


def test_padding_is_zeroed_so_that_nobody_else_s_bytes_leave_with_a_record() -> None:
    head = head_of()
    assert (
        sealed(head)[PAGE_BYTES + head.payload_bytes :].count(0) == head.record_bytes - PAGE_BYTES - head.payload_bytes
    )


def test_a_payload_is_checked_by_itself() -> None:
    head = head_of()
    record = sealed(head)
    found = read_head(record)
    check_payload(record, found)
    record[-1] ^= 1  # in the padding
    with pytest.raises(CorruptRecordError, match="payload-checksum"):
        check_payload(record, found)

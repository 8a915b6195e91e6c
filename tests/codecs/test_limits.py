"""Clip limits: learnt from blocks, kept as bytes that cannot be damaged unseen, and only ever narrowing a range."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import Calibrator, ClipLimits, DamagedLimitsError
from kvpool.codecs.calibration import MAX_KEPT_BYTES
from kvpool.errors import IncompatibleDataError, InputError

from .payloads import (
    FLOATS,
    INT_CODECS,
    Bytes,
    Floats,
    floats_for,
    layouts,
    made,
    normal,
    payload_of,
    planes,
    relative_error,
    there_and_back,
    values_of,
)  # fmt: skip

LAYOUT = KVLayout(layers=2, kv_heads=2, head_size=16, dtype=Dtype.FLOAT32, block_tokens=16, value_head_size=8)


def some_limits(layout: KVLayout = LAYOUT, *, seed: int = 1) -> ClipLimits:
    rng = np.random.default_rng(seed)
    shape = layout.layers, layout.kv_heads
    of_keys, of_values = (rng.random((*shape, dim), np.float32) + 0.5 for dim in (layout.head_size, layout.value_dim))
    return ClipLimits(of_keys, of_values, 1000, 99.99)


def calibrated(layout: KVLayout, payloads: list[Bytes], percentile: float) -> ClipLimits:
    calibrator = Calibrator(layout, len(payloads), percentile)
    for payload in payloads:
        assert not calibrator.done
        calibrator.observe(payload)
    assert calibrator.done
    return calibrator.limits()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(FLOATS),
    st.sampled_from([0, 8, None]),
    st.integers(1, 12),
    st.sampled_from([51, 75, 90, 99, 99.9, 99.99, 100]),
    st.integers(0, 2**32 - 1),
)
def test_a_limit_is_the_percentile_of_a_channels_absolute_values_in_all_blocks(
    dtype: Dtype, value_head_size: int | None, blocks: int, percentile: float, seed: int
) -> None:
    layout = KVLayout(layers=2, kv_heads=2, head_size=16, dtype=dtype, block_tokens=16, value_head_size=value_head_size)
    payloads = [payload_of(layout, normal(layout, seed + at)) for at in range(blocks)]
    limits = calibrated(layout, payloads, percentile)
    for number, found in enumerate((limits.keys, limits.values)[: 2 if layout.value_dim else 1]):
        seen = [planes(layout, values_of(layout, payload))[number] for payload in payloads]
        together = np.abs(np.concatenate(seen, axis=2))
        assert (found == np.percentile(together, percentile, axis=2, method="higher")).all()
    assert (limits.blocks, limits.percentile) == (blocks, percentile)


def test_limits_before_the_last_block_are_those_of_the_blocks_so_far() -> None:
    payloads = [payload_of(LAYOUT, normal(LAYOUT, seed)) for seed in range(4)]
    calibrator = Calibrator(LAYOUT, 100, 95)
    for payload in payloads:
        calibrator.observe(payload)
    assert not calibrator.done
    assert calibrator.limits().to_bytes() == calibrated(LAYOUT, payloads, 95).to_bytes()


def test_blocks_after_the_last_change_nothing() -> None:
    calibrator = Calibrator(LAYOUT, 1, 99)
    calibrator.observe(payload_of(LAYOUT, normal(LAYOUT)))
    before = calibrator.limits().to_bytes()
    calibrator.observe(payload_of(LAYOUT, normal(LAYOUT) * 100))
    assert calibrator.limits().to_bytes() == before


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_teaches_nothing(wrong: float) -> None:
    values = normal(LAYOUT) * 100
    values[-1] = wrong
    calibrator = Calibrator(LAYOUT, 2, 99)
    calibrator.observe(payload_of(LAYOUT, values))
    assert calibrator.seen == 0
    with pytest.raises(InputError, match="no block"):
        calibrator.limits()


def test_a_channel_that_was_always_zero_is_not_limited() -> None:
    values = normal(LAYOUT)
    planes(LAYOUT, values)[0][0, 1, :, 3] = 0
    limits = calibrated(LAYOUT, [payload_of(LAYOUT, values)], 100)
    assert np.isinf(limits.keys[0, 1, 3])
    assert np.isfinite(limits.keys).sum() == limits.keys.size - 1


def test_memory_is_bounded_by_taking_fewer_blocks() -> None:
    layout = KVLayout(layers=32, kv_heads=8, head_size=128, dtype=Dtype.BFLOAT16)
    assert Calibrator(layout, 1000, 99.99).samples == 1000
    fewer = Calibrator(layout, 1000, 90)
    assert 1 <= fewer.samples < 1000
    assert sum(kept.nbytes for kept in fewer._largest) <= MAX_KEPT_BYTES


@pytest.mark.parametrize(("samples", "percentile"), [(0, 99), (1, 50), (1, 100.1)])
def test_calibration_needs_blocks_and_a_percentile(samples: int, percentile: float) -> None:
    with pytest.raises(InputError):
        Calibrator(LAYOUT, samples, percentile)


def test_only_float_payloads_are_calibrated_and_only_whole_ones() -> None:
    with pytest.raises(InputError, match="float8_e4m3"):
        Calibrator(KVLayout(layers=1, kv_heads=1, head_size=8, dtype=Dtype.FLOAT8_E4M3), 1, 99)
    with pytest.raises(InputError, match="exactly"):
        Calibrator(LAYOUT, 1, 99).observe(np.zeros(LAYOUT.payload_bytes - 4, np.uint8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), layouts(), st.sampled_from(INT_CODECS), st.sampled_from(Granularity), st.integers(0, 2**32 - 1))
def test_limits_only_ever_shrink_a_range(
    data: st.DataObject, layout: KVLayout, codec: Codec, granularity: Granularity, seed: int
) -> None:
    """Scales with limits are no larger than without, and what comes back is within a step of the limited range."""
    payload = payload_of(layout, data.draw(floats_for(layout)))
    codec_made, limits = made(layout, codec, granularity), some_limits(layout, seed=seed)
    scales = []
    for these in (None, limits):
        into = np.zeros(codec_made.encoded_bytes, np.uint8)
        assert codec_made.encode(payload, into, these) is None
        scales.append([section_of_scales(codec_made, into, number) for number in range(len(planes_of(codec_made)))])
        back = values_of(layout, decoded_from(codec_made, into))
    for before, after in zip(*scales, strict=True):
        assert (after <= before).all()
    wide, narrow = values_of(layout, payload), back
    largest = float(max(limits.keys.max(), limits.values.max(initial=0)))
    assert np.abs(narrow).max() <= min(np.abs(wide).max(), largest) * 1.2 + 2.0**-24


def planes_of(codec: object) -> tuple[object, ...]:
    return codec.format.planes  # type: ignore[attr-defined, no-any-return]


def section_of_scales(codec: object, into: Bytes, number: int) -> Floats:
    plane = codec.format.planes[number]  # type: ignore[attr-defined]
    count = codec.layout.layers * plane.grouping.groups  # type: ignore[attr-defined]
    bits = into[plane.scales_at : plane.scales_at + 2 * count].copy().view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def decoded_from(codec: object, into: Bytes) -> Bytes:
    back = np.zeros(codec.layout.payload_bytes, np.uint8)  # type: ignore[attr-defined]
    codec.decode(into, back)  # type: ignore[attr-defined]
    return back


def test_limits_that_are_never_reached_change_no_byte() -> None:
    payload = payload_of(LAYOUT, normal(LAYOUT))
    far = ClipLimits(np.full((2, 2, 16), np.inf, np.float32), np.full((2, 2, 8), 100, np.float32), 1, 100)
    for codec in INT_CODECS:
        codec_made = made(LAYOUT, codec)
        encodings = []
        for limits in (None, far):
            into = np.zeros(codec_made.encoded_bytes, np.uint8)
            assert codec_made.encode(payload, into, limits) is None
            encodings.append(into.tobytes())
        assert encodings[0] == encodings[1]


def test_clipping_helps_where_an_outlier_would_have_stretched_the_scale() -> None:
    layout = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=Dtype.FLOAT32)
    limits = calibrated(layout, [payload_of(layout, normal(layout, seed)) for seed in range(20)], 99.99)
    values = normal(layout, 99)
    stretched = values.copy()
    stretched[5] = 1000
    codec, others = made(layout, Codec.INT8_SYMMETRIC, Granularity.BLOCK), np.arange(len(values)) != 5
    without = there_and_back(codec, payload_of(layout, stretched))
    clipped = there_and_back(codec, payload_of(layout, stretched), limits)
    assert relative_error(without[others], values[others]) > 0.1
    assert relative_error(clipped[others], values[others]) < 0.02


@pytest.mark.parametrize("value_head_size", [None, 0, 8])
def test_limits_come_back_from_their_bytes(value_head_size: int | None) -> None:
    layout = KVLayout(layers=2, kv_heads=1, head_size=16, dtype=Dtype.FLOAT32, value_head_size=value_head_size)
    limits = some_limits(layout)
    again = ClipLimits.from_bytes(limits.to_bytes())
    assert (again.keys == limits.keys).all()
    assert (again.values == limits.values).all()
    assert (again.blocks, again.percentile, again.to_bytes()) == (1000, 99.99, limits.to_bytes())
    again.check(layout)


def test_any_damaged_byte_is_refused() -> None:
    whole = some_limits().to_bytes()
    for at in range(len(whole)):
        for flipped in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= flipped
            with pytest.raises(DamagedLimitsError):
                ClipLimits.from_bytes(bytes(damaged))


def test_bytes_that_are_cut_or_go_on_are_refused() -> None:
    whole = some_limits().to_bytes()
    for wrong in (b"", whole[:7], whole[:-1], whole + b"\0", whole[8:], whole * 2):
        with pytest.raises(DamagedLimitsError):
            ClipLimits.from_bytes(wrong)


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def test_limits_of_a_newer_program_are_told_from_damaged_ones() -> None:
    body = bytearray(some_limits().to_bytes()[:-8])
    body[8] = 2
    with pytest.raises(IncompatibleDataError, match="version 2"):
        ClipLimits.from_bytes(sealed(bytes(body)))


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan])
def test_a_limit_is_a_positive_number(wrong: float) -> None:
    limits = some_limits()
    keys = limits.keys.copy()
    keys[1, 1, 1] = wrong
    with pytest.raises(InputError):
        ClipLimits(keys, limits.values, 1, 99)
    body = bytearray(limits.to_bytes()[:-8])
    body[40:44] = np.float32(wrong).tobytes()
    with pytest.raises(DamagedLimitsError):
        ClipLimits.from_bytes(sealed(bytes(body)))


def test_limits_cannot_be_changed_from_outside() -> None:
    keys = np.ones((2, 2, 16), np.float32)
    limits = ClipLimits(keys, np.ones((2, 2, 8), np.float32), 1, 99)
    keys[:] = 5
    assert (limits.keys == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        limits.keys[0] = 2

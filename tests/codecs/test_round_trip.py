"""What comes back of an encoded payload: never further off than half a step, and a payload type's own rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout

from .payloads import (
    FLOATS,
    HALF_ULP,
    INT_CODECS,
    LARGEST,
    SMALLEST,
    Floats,
    decoded,
    encoded,
    floats_for,
    layouts,
    made,
    normal,
    payload_of,
    planes,
    relative_error,
    there_and_back,
    values_of,
    with_outliers,
)  # fmt: skip

Doubles: TypeAlias = NDArray[np.float64]

LEVELS = {Codec.INT8_SYMMETRIC: 127, Codec.INT8_ASYMMETRIC: 255, Codec.INT4_ASYMMETRIC: 15}
LAYOUT = KVLayout(layers=4, kv_heads=4, head_size=64, dtype=Dtype.FLOAT32)
REAL = [
    pytest.param(dtype, codec, granularity, id=f"{dtype}-{codec}-{granularity}")
    for dtype in FLOATS
    for codec in (Codec.INT8_SYMMETRIC, Codec.INT8_ASYMMETRIC)
    for granularity in Granularity
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), layouts(), st.sampled_from(INT_CODECS), st.sampled_from(Granularity))
def test_no_element_is_off_by_more_than_half_a_step(
    data: st.DataObject, layout: KVLayout, codec: Codec, granularity: Granularity
) -> None:
    payload = payload_of(layout, data.draw(floats_for(layout)))
    values = values_of(layout, payload)
    back = there_and_back(made(layout, codec, granularity), payload)
    assert np.isfinite(back).all()
    for number, (before, after) in enumerate(zip(planes(layout, values), planes(layout, back), strict=True)):
        bound = _bound(before, layout.dtype, codec, granularity, is_keys=number == 0)
        off = np.abs(after.astype(np.float64) - before)
        assert (off <= bound).all(), (number, float((off / bound).max()))
        assert np.linalg.norm(off) <= np.linalg.norm(bound)


def _bound(values: Floats, dtype: Dtype, codec: Codec, granularity: Granularity, *, is_keys: bool) -> Doubles:
    """Of each element: half a step of its group, whose scale is rounded up by 2^-7 at most, and the type's rounding."""
    wide = values.astype(np.float64)
    reach = _per_group(wide, codec, granularity, is_keys)
    step = reach / LEVELS[codec] * (1 + 2.0**-7) + 2.0**-126
    own_rounding = HALF_ULP[dtype] * (np.abs(wide) + step) + SMALLEST[dtype] / 2
    arithmetic = 2.0**-22 * (np.abs(wide) + reach)
    bound: Doubles = step / 2 + own_rounding + arithmetic
    return bound


def _per_group(values: Doubles, codec: Codec, granularity: Granularity, is_keys: bool) -> Doubles:
    """How far each element's group reaches, written down once more, from what the documentation says of groups."""
    layers, heads, tokens, dim = values.shape
    small = codec is Codec.INT4_ASYMMETRIC and granularity is Granularity.AUTO
    if granularity is Granularity.BLOCK:
        return _reach(values, codec, (1, 2, 3))
    if is_keys:
        size = _small(tokens) if small else tokens
        return _reach(values.reshape(layers, heads, tokens // size, size, dim), codec, (3,)).reshape(values.shape)
    if granularity is Granularity.CHANNEL:
        return _reach(values, codec, (1, 3))
    size = _small(dim) if small else dim
    return _reach(values.reshape(layers, heads, tokens, dim // size, size), codec, (4,)).reshape(values.shape)


def _small(length: int) -> int:
    return max((size for size in range(16, 33) if length % size == 0), default=length)


def _reach(values: Doubles, codec: Codec, axes: tuple[int, ...]) -> Doubles:
    if codec is Codec.INT8_SYMMETRIC:
        reach = np.abs(values).max(axes, keepdims=True)
    else:
        reach = values.max(axes, keepdims=True) - values.min(axes, keepdims=True)
    return np.broadcast_to(reach, values.shape)


@pytest.mark.parametrize(("dtype", "codec", "granularity"), REAL)
def test_int8_is_within_two_percent_on_normal_data_whatever_shares_a_scale(
    dtype: Dtype, codec: Codec, granularity: Granularity
) -> None:
    layout = KVLayout(layers=4, kv_heads=4, head_size=64, dtype=dtype)
    payload = payload_of(layout, normal(layout))
    back = there_and_back(made(layout, codec, granularity), payload)
    for before, after in zip(planes(layout, values_of(layout, payload)), planes(layout, back), strict=True):
        assert relative_error(after, before) <= 0.02


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", [Codec.INT8_SYMMETRIC, Codec.INT8_ASYMMETRIC])
def test_the_default_granularity_is_within_two_percent_on_data_with_outliers(dtype: Dtype, codec: Codec) -> None:
    layout = KVLayout(layers=8, kv_heads=4, head_size=64, dtype=dtype)
    payload = payload_of(layout, with_outliers(layout))
    back = there_and_back(made(layout, codec), payload)
    for before, after in zip(planes(layout, values_of(layout, payload)), planes(layout, back), strict=True):
        assert relative_error(after, before) <= 0.02


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data(), layouts((Dtype.FLOAT32,)))
def test_fp16_rounds_each_element_to_the_nearest_half(data: st.DataObject, layout: KVLayout) -> None:
    values = np.clip(data.draw(floats_for(layout)), -65504, 65504)
    back = there_and_back(made(layout, Codec.FP16), payload_of(layout, values))
    assert (back == values.astype(np.float16).astype(np.float32)).all()


def test_halves_are_rounded_to_even() -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_size=256, dtype=Dtype.FLOAT32, block_tokens=1, value_head_size=0)
    values = np.full(256, 0.5, np.float32)
    values[:6] = 0, 255, 1.5, 2.5, 3.5, 254.5  # a range of 255: one step is 1
    back = there_and_back(made(layout, Codec.INT8_ASYMMETRIC, Granularity.BLOCK), payload_of(layout, values))
    assert back[:7].tolist() == [0, 255, 2, 2, 4, 254, 0]


@pytest.mark.parametrize("codec", INT_CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("constant", [0.0, -0.0, 3.0, -0.375, 1e-7])
def test_a_constant_channel_comes_back_as_it_was(codec: Codec, dtype: Dtype, constant: float) -> None:
    layout = KVLayout(layers=1, kv_heads=2, head_size=32, dtype=dtype, block_tokens=32)
    payload = payload_of(layout, np.full(2 * 2 * 32 * 32, constant, np.float32))
    back = there_and_back(made(layout, codec), payload)
    exactly = codec is not Codec.INT8_SYMMETRIC or constant == 0
    values = values_of(layout, payload)
    assert (back == values).all() if exactly else relative_error(back, values) <= 0.5 * 1.01 / 127


def test_subnormal_numbers_of_a_type_are_its_steps() -> None:
    """With at most 255 of the smallest numbers in a range, no step is smaller than they are."""
    layout = KVLayout(layers=1, kv_heads=1, head_size=64, dtype=Dtype.FLOAT16, block_tokens=64)
    values = np.random.default_rng(1).integers(-127, 128, 2 * 64 * 64).astype(np.float32) * np.float32(2.0**-24)
    payload = payload_of(layout, values)
    off = np.abs(there_and_back(made(layout, Codec.INT8_ASYMMETRIC), payload) - values)
    assert (off <= 2.0**-24).all()


@pytest.mark.parametrize("codec", INT_CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_finite_payload_comes_back_infinite(codec: Codec, dtype: Dtype) -> None:
    """At the type's end it is refused or comes back finite; which of the two depends on how the scale is rounded."""
    layout = KVLayout(layers=1, kv_heads=1, head_size=64, dtype=dtype, block_tokens=64)
    rng = np.random.default_rng(1)
    outcomes = set()
    for share in np.concatenate((rng.random(40), [0.9, 0.98, 0.99, 0.995, 0.999, 1.0])):
        values = (rng.random(2 * 64 * 64) * 2 - 1).astype(np.float32)
        values[0] = values[64 * 64] = 1
        payload = payload_of(layout, values * np.float32(share * LARGEST[dtype]))
        assert np.isfinite(values_of(layout, payload)).all()
        codec_made = made(layout, codec)
        into = np.zeros(codec_made.encoded_bytes, np.uint8)
        loss = codec_made.encode(payload, into)
        outcomes.add(loss)
        if loss is None:
            assert np.isfinite(values_of(layout, decoded(codec_made, into))).all()
        else:
            assert loss == "out-of-range"
    assert None in outcomes


def test_equal_payloads_have_equal_bytes_in_many_threads_at_once() -> None:
    codec = made(LAYOUT, Codec.INT4_ASYMMETRIC)
    payloads = [payload_of(LAYOUT, normal(LAYOUT, seed)) for seed in range(4)]
    alone = [encoded(codec, payload).tobytes() for payload in payloads]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda at: encoded(codec, payloads[at % 4]).tobytes(), range(40)))
    assert together == alone * 10


def test_every_byte_of_the_target_is_written() -> None:
    for codec in (Codec.FP16, *INT_CODECS):
        codec_made = made(LAYOUT, codec)
        payload = payload_of(LAYOUT, normal(LAYOUT))
        results = []
        for filler in (0x00, 0xFF):
            into, back = np.full(codec_made.encoded_bytes, filler, np.uint8), np.full(len(payload), filler, np.uint8)
            assert codec_made.encode(payload, into) is None
            codec_made.decode(into, back)
            results.append((into.tobytes(), back.tobytes()))
        assert results[0] == results[1]

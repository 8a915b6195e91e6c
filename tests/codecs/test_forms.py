"""The compiled kernels (for any processor, and for this one) and torch, on any device, give the same bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import ClipLimits, PayloadCodec
from kvpool.codecs.cpu import kernels as kernels_module
from kvpool.codecs.cpu.kernels import LIBRARY, Kernels, kernels

from .payloads import INT_CODECS, Bytes, elements, floats_for, layouts, made, normal, payload_of

compiled_here = pytest.mark.skipif(kernels() is None, reason="the kernels were not compiled here: no C compiler")
DAMAGE = [np.nan, np.inf, -np.inf, 3.4e38]


def levels() -> Iterator[Kernels]:
    """The kernels as this processor runs them, and as any does."""
    found = kernels()
    assert found is not None
    yield found
    if found.level != "base":
        yield Kernels(ctypes.CDLL(str(Path(kernels_module.__file__).with_name(LIBRARY))), "base")


def by_torch(
    codec: PayloadCodec, payload: Bytes, limits: ClipLimits | None, device: str = "cpu"
) -> tuple[object, Bytes]:
    into = torch.full((codec.encoded_bytes,), 0xA5, dtype=torch.uint8, device=device)
    loss = codec.encode_tensor(torch.from_numpy(payload).to(device), into, limits)
    return loss, into.cpu().numpy()


def decoded_by_torch(codec: PayloadCodec, encoded: Bytes, device: str = "cpu") -> Bytes:
    into = torch.full((codec.layout.payload_bytes,), 0xA5, dtype=torch.uint8, device=device)
    codec.decode_tensor(torch.from_numpy(encoded).to(device), into)
    return into.cpu().numpy()


@st.composite
def limits_for(draw: st.DrawFn, layout: KVLayout) -> ClipLimits | None:
    if not draw(st.booleans()):
        return None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = layout.layers, layout.kv_heads
    of_keys, of_values = (rng.random((*shape, dim)) * 2 + 0.01 for dim in (layout.head_size, layout.value_dim))
    of_keys[rng.random(of_keys.shape) < 0.2] = np.inf
    return ClipLimits(of_keys.astype(np.float32), of_values.astype(np.float32), 1, 99.0)


@compiled_here
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data(), layouts(), st.sampled_from(INT_CODECS), st.sampled_from(Granularity))
def test_the_kernels_quantize_as_torch_does(
    data: st.DataObject, layout: KVLayout, codec: Codec, granularity: Granularity
) -> None:
    values = data.draw(floats_for(layout))
    if data.draw(st.integers(0, 4)) == 0:
        place = data.draw(st.integers(0, len(values) - 1))
        values[place] = data.draw(st.sampled_from(DAMAGE))
    payload, limits = payload_of(layout, values), data.draw(limits_for(layout))
    codec_made = made(layout, codec, granularity)
    loss, expected = by_torch(codec_made, payload, limits)
    restored = None if loss else decoded_by_torch(codec_made, expected)
    bounds = codec_made._bounds_of(limits)
    for form in levels():
        into, back = np.full_like(expected, 0x5A), np.full_like(payload, 0x5A)
        assert form.quantize(codec_made.format, payload, into, bounds) == loss  # type: ignore[attr-defined]
        if restored is not None:
            assert (into == expected).all()
            form.dequantize(codec_made.format, into, back)  # type: ignore[attr-defined]
            assert (back == restored).all()


@compiled_here
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data(), layouts((Dtype.FLOAT32,)))
def test_the_kernels_halve_as_torch_does(data: st.DataObject, layout: KVLayout) -> None:
    values = np.clip(data.draw(floats_for(layout)), -65504, 65504)
    if data.draw(st.integers(0, 4)) == 0:
        values[data.draw(st.integers(0, len(values) - 1))] = data.draw(st.sampled_from([*DAMAGE, 65504.1]))
    codec, payload = made(layout, Codec.FP16), payload_of(layout, values)
    loss, expected = by_torch(codec, payload, None)
    restored = None if loss else decoded_by_torch(codec, expected)
    for form in levels():
        into, back = np.full_like(expected, 0x5A), np.full_like(payload, 0x5A)
        assert form.to_half(payload, into) == loss
        if restored is not None:
            assert (into == expected).all()
            form.from_half(into, back)
            assert (back == restored).all()


@compiled_here
def test_every_half_is_widened_and_narrowed_as_torch_does() -> None:
    """All float16 numbers, and float32 numbers around each border between two of them."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    finite = halves[np.isfinite(halves.view(np.float16))]
    exact = finite.view(np.float16).astype(np.float32)
    borders = (exact[:-1].astype(np.float64) + exact[1:].astype(np.float64)).astype(np.float32) / 2
    near = np.concatenate(
        [exact, borders, np.nextafter(borders, np.float32(-9e9)), np.nextafter(borders, np.float32(9e9))]
    )
    near = np.ascontiguousarray(near[np.abs(near) <= 65504])
    for form in levels():
        into = np.zeros(2 * len(near), np.uint8)
        assert form.to_half(near.view(np.uint8), into) is None
        assert (into.view(np.uint16) == torch.from_numpy(near).half().view(torch.int16).numpy().view(np.uint16)).all()
        back = np.zeros(4 * len(finite), np.uint8)
        form.from_half(finite.view(np.uint8), back)
        assert (back.view(np.uint32) == exact.view(np.uint32)).all()


@compiled_here
@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.BFLOAT16])
def test_every_16_bit_number_is_restored_as_torch_does(dtype: Dtype) -> None:
    """Zeros of all values and codes of all values: what rounding to 16 bits can meet."""
    layout = KVLayout(layers=1, kv_heads=1, head_size=4096, dtype=dtype, block_tokens=256, value_head_size=0)
    codec = made(layout, Codec.INT8_ASYMMETRIC)
    rng = np.random.default_rng(1)
    for _ in range(4):
        values = rng.standard_normal((256, 4096)).astype(np.float32) * np.exp2(rng.integers(-24, 12, 4096)).astype(
            np.float32
        )
        _, encoded = by_torch(codec, payload_of(layout, values.reshape(-1)), None)
        expected = decoded_by_torch(codec, encoded)
        for form in levels():
            back = np.zeros_like(expected)
            form.dequantize(codec.format, encoded, back)  # type: ignore[attr-defined]
            assert (back == expected).all()


@compiled_here
def test_arrays_are_encoded_by_the_kernels_and_tensors_by_torch_to_the_same_bytes() -> None:
    layout = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=Dtype.BFLOAT16)
    payload = payload_of(layout, normal(layout))
    for codec in INT_CODECS:
        codec_made = made(layout, codec)
        into = np.zeros(codec_made.encoded_bytes, np.uint8)
        assert codec_made.encode(payload, into) is None
        assert (into == by_torch(codec_made, payload, None)[1]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("codec", INT_CODECS)
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16])
def test_a_gpu_gives_the_bytes_of_the_cpu(dtype: Dtype, codec: Codec, granularity: Granularity) -> None:
    layout = KVLayout(layers=4, kv_heads=4, head_size=128, dtype=dtype)
    codec_made = made(layout, codec, granularity)
    shape = layout.layers, layout.kv_heads, layout.head_size
    narrow = ClipLimits(np.full(shape, 1.5, np.float32), np.full(shape, 1.5, np.float32), 1, 99.0)
    for seed in range(10):
        payload = payload_of(layout, normal(layout, seed) * np.float32(10.0 ** (seed - 5)))
        for limits in (None, narrow):
            on_cpu, on_gpu = by_torch(codec_made, payload, limits), by_torch(codec_made, payload, limits, "cuda")
            assert on_cpu[0] == on_gpu[0]
            assert (on_cpu[1] == on_gpu[1]).all()
            assert (decoded_by_torch(codec_made, on_gpu[1], "cuda") == decoded_by_torch(codec_made, on_gpu[1])).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("wrong", DAMAGE)
def test_a_gpu_refuses_what_the_cpu_refuses(wrong: float) -> None:
    layout = KVLayout(layers=2, kv_heads=2, head_size=64, dtype=Dtype.FLOAT32)
    for codec in (Codec.FP16, *INT_CODECS):
        values = normal(layout)
        values[elements(layout) // 2] = wrong
        payload = payload_of(layout, values)
        assert (
            by_torch(made(layout, codec), payload, None, "cuda")[0] == by_torch(made(layout, codec), payload, None)[0]
        )

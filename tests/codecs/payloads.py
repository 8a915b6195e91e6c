"""Layouts, payloads of every dtype as arrays of numbers, and what an encoding does to them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import FORMAT_VERSION, NUMBERS, ClipLimits, PayloadCodec, codec_of

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

FLOATS = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)
INT_CODECS = (Codec.INT8_SYMMETRIC, Codec.INT8_ASYMMETRIC, Codec.INT4_ASYMMETRIC)
LARGEST = {Dtype.FLOAT32: 3.4028235e38, Dtype.FLOAT16: 65504.0, Dtype.BFLOAT16: 3.3895314e38}
HALF_ULP = {Dtype.FLOAT32: 2.0**-24, Dtype.FLOAT16: 2.0**-11, Dtype.BFLOAT16: 2.0**-8}
"""Half of the distance to the next number, as a share of a number: at most that."""
SMALLEST = {Dtype.FLOAT32: 2.0**-149, Dtype.FLOAT16: 2.0**-24, Dtype.BFLOAT16: 2.0**-133}


def made(layout: KVLayout, codec: Codec, granularity: Granularity = Granularity.AUTO) -> PayloadCodec:
    """The codec, even where it would save nothing."""
    params = bytes([FORMAT_VERSION]) + (b"" if codec is Codec.FP16 else bytes([list(Granularity).index(granularity)]))
    return codec_of(layout, NUMBERS[codec], params)


def payload_of(layout: KVLayout, values: Floats) -> Bytes:
    """`values` in the layout's dtype, rounded to nearest, as bytes."""
    if layout.dtype is Dtype.BFLOAT16:
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        return values.astype(np.float32 if layout.dtype is Dtype.FLOAT32 else np.float16).view(np.uint8)


def values_of(layout: KVLayout, payload: Bytes) -> Floats:
    """The numbers of a payload."""
    if layout.dtype is Dtype.BFLOAT16:
        return (payload.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return payload.view(np.float32 if layout.dtype is Dtype.FLOAT32 else np.float16).astype(np.float32)


def normal(layout: KVLayout, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal(elements(layout), np.float32)


def with_outliers(layout: KVLayout, seed: int = 1) -> Floats:
    """1 % of the channels ten times as large, 0.01 % of the values twenty times."""
    rng = np.random.default_rng(seed)
    values = normal(layout, seed)
    for part in planes(layout, values):
        part *= np.where(rng.random((*part.shape[:2], 1, part.shape[3])) < 0.01, 10, 1).astype(np.float32)
        part *= np.where(rng.random(part.shape) < 0.0001, 20, 1).astype(np.float32)
    return values


def elements(layout: KVLayout) -> int:
    return layout.payload_bytes // layout.dtype.itemsize


def planes(layout: KVLayout, values: Floats) -> list[Floats]:
    """Keys, and values unless they are a single latent: views [layers, heads, tokens, dim]."""
    rows = values.reshape(layout.layers, -1)
    split = layout.kv_heads * layout.block_tokens * layout.head_size
    shape = layout.layers, layout.kv_heads, layout.block_tokens
    keys = rows[:, :split].reshape(*shape, layout.head_size)
    return [keys, rows[:, split:].reshape(*shape, layout.value_dim)] if layout.value_dim else [keys]


def encoded(codec: PayloadCodec, payload: Bytes, limits: ClipLimits | None = None) -> Bytes:
    into = np.full(codec.encoded_bytes, 0xA5, np.uint8)
    assert codec.encode(payload, into, limits) is None
    return into


def decoded(codec: PayloadCodec, data: Bytes) -> Bytes:
    into = np.full(codec.layout.payload_bytes, 0xA5, np.uint8)
    codec.decode(data, into)
    return into


def there_and_back(codec: PayloadCodec, payload: Bytes, limits: ClipLimits | None = None) -> Floats:
    return values_of(codec.layout, decoded(codec, encoded(codec, payload, limits)))


def relative_error(back: Floats, values: Floats) -> float:
    """As a Frobenius norm."""
    norm = float(np.linalg.norm(values.astype(np.float64)))
    return float(np.linalg.norm(back.astype(np.float64) - values.astype(np.float64))) / norm if norm else 0.0


@st.composite
def layouts(draw: st.DrawFn, dtypes: tuple[Dtype, ...] = FLOATS) -> KVLayout:
    """Small ones of all kinds: odd sizes, groups that do not divide evenly, latents, values of another width."""
    return KVLayout(
        layers=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        head_size=draw(st.sampled_from([1, 7, 16, 20, 33, 64, 100])),
        dtype=draw(st.sampled_from(dtypes)),
        block_tokens=draw(st.sampled_from([1, 5, 16, 34, 37, 64])),
        value_head_size=draw(st.sampled_from([None, 0, 8, 31, 64])),
    )


@st.composite
def floats_for(draw: st.DrawFn, layout: KVLayout) -> Floats:
    """Numbers of a dtype's whole range, in the layout's own shapes of trouble."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal(elements(layout), np.float32)
    top = LARGEST[layout.dtype] / 8
    scale = draw(st.sampled_from([1.0, 1e-3, 1e-6, 1e-38, 1e-41, top / 8]))
    values *= np.float32(scale)
    for part in planes(layout, values):
        if draw(st.booleans()):  # far from zero, channel by channel
            offset = rng.choice([-1000.0, 0.0, 3.0, 1000.0], (*part.shape[:2], 1, part.shape[3])) * scale
            part += np.clip(offset, -top, top).astype(np.float32)
        if draw(st.booleans()):  # constant channels
            constant = rng.random((*part.shape[:2], 1, part.shape[3])) < 0.3
            part[...] = np.where(constant, part[:, :, :1], part)
        if draw(st.booleans()):
            part[rng.random(part.shape) < 0.2] = -0.0
    return np.clip(values, -top, top).astype(np.float32)

"""Payloads for the codecs' benchmarks: numbers like keys and values, with and without outliers."""

from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.blocks.record import Buffer

Floats = npt.NDArray[np.float32]

CHANNELS_WITH_OUTLIERS, THEIR_SIZE = 0.01, 10
OUTLIERS, SIZE_OF_OUTLIERS = 0.0001, 20


class Data(StrEnum):
    """What the numbers are like."""

    NORMAL = "normal"
    OUTLIERS = "outliers"
    """1 % of the channels ten times as large, and 0.01 % of the numbers twenty times."""


def numbers(layout: KVLayout, data: Data, seed: int = 1) -> Floats:
    """Normally distributed, all elements of a block."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(layout.payload_bytes // layout.dtype.itemsize, np.float32)
    if data is Data.OUTLIERS:
        for plane in planes(layout, values):
            channels = rng.random((*plane.shape[:2], 1, plane.shape[3])) < CHANNELS_WITH_OUTLIERS
            plane *= np.where(channels, np.float32(THEIR_SIZE), np.float32(1))
            plane *= np.where(rng.random(plane.shape) < OUTLIERS, np.float32(SIZE_OF_OUTLIERS), np.float32(1))
    return values


def planes(layout: KVLayout, values: Floats) -> tuple[Floats, Floats]:
    """Views of all keys and all values: [layers, heads, tokens, dim]."""
    rows = values.reshape(layout.layers, -1)
    split = layout.kv_heads * layout.block_tokens * layout.head_size
    shape = layout.layers, layout.kv_heads, layout.block_tokens
    return rows[:, :split].reshape(*shape, layout.head_size), rows[:, split:].reshape(*shape, layout.value_dim)


def payload_of(layout: KVLayout, values: Floats) -> Buffer:
    """The numbers in the layout's dtype, as bytes."""
    if layout.dtype is Dtype.BFLOAT16:
        bits = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(np.uint16).view(np.uint8)
    return values.astype(np.float32 if layout.dtype is Dtype.FLOAT32 else np.float16).view(np.uint8)


def values_of(layout: KVLayout, payload: Buffer) -> Floats:
    """The numbers in a payload."""
    if layout.dtype is Dtype.BFLOAT16:
        wide: Floats = (payload.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    narrow = payload.view(np.float32 if layout.dtype is Dtype.FLOAT32 else np.float16)
    return np.asarray(narrow, np.float32)

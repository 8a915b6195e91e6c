"""What a lossy payload looks like as bytes: which elements share a scale, and where each part of it lies.

A plane of one layer is `heads x tokens x dim` elements. They are cut into groups, and each group has a scale (and a
zero, where the codec is asymmetric). The groups of every layer's plane are the same, so the sections of an encoded
payload are arrays with a layer per row:

    zeros of the keys, zeros of the values      asymmetric codecs only; each the payload's own element type
    scales of the keys, scales of the values    bfloat16
    codes of the keys, codes of the values      a byte each; int4: two in a byte

There is no padding, and all of it is little-endian. Where there are no values (a single latent) their sections are
empty. An int4 byte has element `i` of a layer's plane in its low half and element `i + ceil(n / 2)` in its high half.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout

INT4_GROUP = 32
"""KIVI's: keys per channel in groups of so many tokens, values per token in groups of so many channels."""
SCALE_BYTES = 2


class Grouping(NamedTuple):
    """How a layer's plane is cut into groups: seen as an array of `shape`, the axes `over` run inside of a group."""

    shape: tuple[int, int, int]
    over: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Groups in the plane of one layer."""
        return prod(self.kept)

    @property
    def kept(self) -> tuple[int, int, int]:
        """The shape of the groups' scales, broadcast against `shape`."""
        first, second, third = (1 if axis in self.over else size for axis, size in enumerate(self.shape))
        return first, second, third


class Numeric(NamedTuple):
    """How a codec's codes count: from 0 or around it, and how far."""

    asymmetric: bool
    levels: int
    """The largest code; the smallest is 0, or `-levels`."""
    bits: int


NUMERICS = {
    Codec.INT8_SYMMETRIC: Numeric(False, 127, 8),
    Codec.INT8_ASYMMETRIC: Numeric(True, 255, 8),
    Codec.INT4_ASYMMETRIC: Numeric(True, 15, 4),
}
QUANTIZABLE = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)


@dataclass(frozen=True, slots=True)
class PlaneFormat:
    """The keys, or the values, of all layers: where they lie in the payload, and where their sections are encoded.

    Elements are counted within a layer of the payload; bytes from the start of the encoded payload, all layers of a
    section together.
    """

    grouping: Grouping
    first_element: int
    elements: int
    zeros_at: int
    scales_at: int
    codes_at: int
    code_bytes: int
    """Of one layer."""


@dataclass(frozen=True)
class QuantizedFormat:
    """The sections of an encoded payload of one layout, codec and granularity."""

    layout: KVLayout
    codec: Codec
    granularity: Granularity

    @property
    def numeric(self) -> Numeric:
        """How the codes count."""
        return NUMERICS[self.codec]

    @property
    def layer_elements(self) -> int:
        """Elements of a layer of the payload, keys and values together."""
        return self.layout.payload_bytes // (self.layout.layers * self.layout.dtype.itemsize)

    @cached_property
    def planes(self) -> tuple[PlaneFormat, ...]:
        """The keys and, unless they are a single latent, the values."""
        layers = self.layout.layers
        groupings = [keys_grouping(self.layout, self.codec, self.granularity)]
        if self.layout.value_dim:
            groupings.append(values_grouping(self.layout, self.codec, self.granularity))
        zero_bytes = self.layout.dtype.itemsize if self.numeric.asymmetric else 0
        groups = [layers * grouping.groups for grouping in groupings]
        zeros_at, scales_at = 0, zero_bytes * sum(groups)
        codes_at, first = scales_at + SCALE_BYTES * sum(groups), 0
        planes = []
        for grouping, count in zip(groupings, groups, strict=True):
            elements = prod(grouping.shape)
            code_bytes = -(-elements * self.numeric.bits // 8)
            planes.append(PlaneFormat(grouping, first, elements, zeros_at, scales_at, codes_at, code_bytes))
            zeros_at += zero_bytes * count
            scales_at += SCALE_BYTES * count
            codes_at += layers * code_bytes
            first += elements
        return tuple(planes)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded payload."""
        last = self.planes[-1]
        return last.codes_at + self.layout.layers * last.code_bytes


def keys_grouping(layout: KVLayout, codec: Codec, granularity: Granularity) -> Grouping:
    """Keys: per channel over the block's tokens (int4: over groups of them), or a whole plane."""
    heads, tokens, dim = layout.kv_heads, layout.block_tokens, layout.head_size
    if granularity is Granularity.BLOCK:
        return _whole(heads, tokens, dim)
    size = tokens
    if codec is Codec.INT4_ASYMMETRIC and granularity is Granularity.AUTO:
        size = group_size(tokens)
    return Grouping((heads * tokens // size, size, dim), (1,))


def values_grouping(layout: KVLayout, codec: Codec, granularity: Granularity) -> Grouping:
    """Values: per token and head (int4: in groups of channels), per token, or a whole plane."""
    heads, tokens, dim = layout.kv_heads, layout.block_tokens, layout.value_dim
    if granularity is Granularity.BLOCK:
        return _whole(heads, tokens, dim)
    if granularity is Granularity.CHANNEL:
        return Grouping((heads, tokens, dim), (0, 2))
    size = group_size(dim) if codec is Codec.INT4_ASYMMETRIC else dim
    return Grouping((1, heads * tokens * dim // size, size), (0, 2))


def _whole(heads: int, tokens: int, dim: int) -> Grouping:
    return Grouping((heads * tokens, 1, dim), (0, 2))


def group_size(length: int) -> int:
    """The largest size from 32 down to 16 that divides `length` into equal groups; else all of it is one group."""
    return next((size for size in range(INT4_GROUP, INT4_GROUP // 2 - 1, -1) if length % size == 0), length)

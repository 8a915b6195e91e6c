"""Clip limits: how far from zero a model's keys and values go, but for outliers; per layer, plane, head and channel.

    0    8    magic "kvpoolCL"         8    2   format version         10   2   zero
    12   4    layers                   16   4   heads
    20   4    width of a key head      24   4   width of a value head
    28   4    blocks they are from     32   8   percentile (float64)
    40   ..   limits of the keys: layers x heads x width, float32; then those of the values
    -8   8    xxh3-64 of all bytes before

All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash

from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs.format import Grouping, QuantizedFormat
from kvpool.errors import IncompatibleDataError, InputError

Floats: TypeAlias = "NDArray[np.float32]"

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"kvpoolCL"
VERSION = 1
_HEAD = struct.Struct("<8sHHIIIIId")
_SUM = struct.Struct("<Q")


class DamagedLimitsError(Exception):
    """Bytes that are no clip limits, or not all of them as they were written. Calibrate anew."""


@dataclass(frozen=True, eq=False)
class ClipLimits:
    """The largest absolute value that a block's scale provides for. Immutable; decoding never needs it.

    `keys` is a float32 array [layers, heads, head size], `values` [layers, heads, value size], empty for a single
    latent. Infinity limits nothing. Zero, negative numbers and NaN are refused (`InputError`).
    """

    keys: Floats
    values: Floats
    blocks: int
    """Blocks that they were learnt from."""
    percentile: float

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            array = np.array(getattr(self, name), np.float32)
            if array.ndim != 3 or not (array > 0).all():
                raise InputError(f"ClipLimits.{name} must have three axes and hold positive numbers")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.keys.shape[:2] != self.values.shape[:2]:
            raise InputError("ClipLimits.keys and ClipLimits.values must have as many layers and heads")

    def check(self, layout: KVLayout) -> None:
        """Raise `InputError` unless these are limits for this layout."""
        heads = layout.layers, layout.kv_heads
        wanted = (*heads, layout.head_size), (*heads, layout.value_dim)
        if (self.keys.shape, self.values.shape) != wanted:
            raise InputError(
                f"clip limits of shape {self.keys.shape} and {self.values.shape}; the layout needs {wanted[0]} and "
                f"{wanted[1]}"
            )

    def of_groups(self, fmt: QuantizedFormat) -> tuple[Floats, ...]:
        """For each plane the limits of its groups, as the groups' scales lie: a group's is its channels' largest.

        Rounded up to the payload's type, so that the ends of a limited range are of that type, as any others.
        """
        tokens, dtype = fmt.layout.block_tokens, fmt.layout.dtype
        return tuple(
            _rounded_up(_of_groups(array, tokens, plane.grouping), dtype)
            for array, plane in zip((self.keys, self.values), fmt.planes, strict=False)
        )

    def to_bytes(self) -> bytes:
        """All of it as bytes; see the module."""
        layers, heads, key_dim = self.keys.shape
        head = _HEAD.pack(MAGIC, VERSION, 0, layers, heads, key_dim, self.values.shape[2], self.blocks, self.percentile)
        body = head + self.keys.astype("<f4").tobytes() + self.values.astype("<f4").tobytes()
        return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> ClipLimits:
        """The limits that `to_bytes` wrote.

        Raises `DamagedLimitsError` whichever byte differs, and `IncompatibleDataError` for a whole file of a newer
        program.
        """
        body = data[: -_SUM.size]
        if len(data) < _HEAD.size + _SUM.size or data[-_SUM.size :] != _SUM.pack(xxhash.xxh3_64_intdigest(body)):
            raise DamagedLimitsError("clip limits: the checksum is not that of the bytes")
        magic, version, zero, layers, heads, key_dim, value_dim, blocks, percentile = _HEAD.unpack_from(body)
        if magic != MAGIC or zero:
            raise DamagedLimitsError("these bytes are no clip limits")
        if version != VERSION:
            raise IncompatibleDataError(f"clip limits are of version {version}; this program reads version {VERSION}")
        split = layers * heads * key_dim
        if len(body) != _HEAD.size + 4 * (split + layers * heads * value_dim):
            raise DamagedLimitsError("clip limits: the length is not what the shape says")
        numbers: Any = np.frombuffer(body, "<f4", offset=_HEAD.size)
        try:
            keys = numbers[:split].reshape(layers, heads, key_dim)
            values = numbers[split:].reshape(layers, heads, value_dim)
            return cls(keys, values, blocks, percentile)
        except InputError as error:
            raise DamagedLimitsError(str(error)) from None


def _of_groups(limits: Floats, tokens: int, grouping: Grouping) -> Floats:
    layers, heads, dim = limits.shape
    of_elements = np.broadcast_to(limits[:, :, None, :], (layers, heads, tokens, dim)).reshape(layers, *grouping.shape)
    return np.ascontiguousarray(of_elements.max(tuple(1 + axis for axis in grouping.over), keepdims=True))


def _rounded_up(limits: Floats, dtype: Dtype) -> Floats:
    if dtype is Dtype.BFLOAT16:
        bits = limits.view(np.uint32)
        return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF_0000)).view(np.float32)
    if dtype is Dtype.FLOAT16:
        with np.errstate(over="ignore"):  # infinity limits nothing
            half = limits.astype(np.float16)
        return np.where(half < limits, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)
    return limits

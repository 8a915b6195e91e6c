"""The shape of a block: how the keys and values of `block_tokens` consecutive tokens lie in its payload.

The payload has one canonical order, whatever the engine: layer, plane (keys, then values), head, token, dimension.
Heads before tokens, so that a head's tokens are one contiguous run: the order of most attention kernels' caches, and
the one in which a tensor-parallel rank's heads are a slice. Adapters own the transpose.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kvpool.errors import InputError

PAGE_BYTES = 4096
MAX_BLOCK_TOKENS = 512
"""A block's token ids must fit the record's header page."""


class Dtype(StrEnum):
    """The element types that engines keep keys and values in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3 = "float8_e4m3"
    FLOAT8_E5M2 = "float8_e5m2"
    UINT8 = "uint8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _LONGER_ITEMS.get(self, 1)


_LONGER_ITEMS = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2}


class Plane(NamedTuple):
    """One layer's keys, or its values, within a block: `heads * block_tokens * dim` elements from `offset` bytes on."""

    layer: int
    offset: int
    heads: int
    tokens: int
    dim: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The geometry of one model's blocks on one tensor-parallel rank.

    `value_head_size` is `head_size` unless given. Zero means that a layer keeps a single latent and no values
    (multi-head latent attention): then `kv_heads` is 1 and `head_size` the latent's width.
    """

    layers: int
    kv_heads: int
    head_size: int
    dtype: Dtype
    block_tokens: int = 64
    value_head_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise InputError(f"KVLayout.{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise InputError(f"KVLayout.block_tokens is {self.block_tokens}; it must be 1 to {MAX_BLOCK_TOKENS}")
        if self.value_head_size is not None and self.value_head_size < 0:
            raise InputError(f"KVLayout.value_head_size is {self.value_head_size}; it must be 0 (latent) or more")

    @property
    def value_dim(self) -> int:
        """Width of a value head; 0 for a single latent."""
        return self.head_size if self.value_head_size is None else self.value_head_size

    @property
    def key_plane_bytes(self) -> int:
        """Bytes of one layer's keys in a block."""
        return self.kv_heads * self.block_tokens * self.head_size * self.dtype.itemsize

    @property
    def value_plane_bytes(self) -> int:
        """Bytes of one layer's values in a block."""
        return self.kv_heads * self.block_tokens * self.value_dim * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block's payload, uncompressed and unpadded."""
        return self.layers * (self.key_plane_bytes + self.value_plane_bytes)

    @property
    def record_bytes(self) -> int:
        """Bytes of the block's record under codec `none`: header page plus the payload, padded to whole pages."""
        return PAGE_BYTES + padded(self.payload_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of a block's token ids (int32)."""
        return 4 * self.block_tokens

    def planes(self) -> list[Plane]:
        """Every plane of a payload in canonical order."""
        planes: list[Plane] = []
        offset = 0
        for layer in range(self.layers):
            for dim in (self.head_size, self.value_dim):
                if dim:
                    nbytes = self.kv_heads * self.block_tokens * dim * self.dtype.itemsize
                    planes.append(Plane(layer, offset, self.kv_heads, self.block_tokens, dim, nbytes))
                    offset += nbytes
        return planes


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole 4 KiB pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES

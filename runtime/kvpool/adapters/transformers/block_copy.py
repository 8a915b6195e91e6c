"""Blocks between a pool's memory and the cache's tensors: one copy each way, outside the GIL.

A payload lies in canonical order (layer, keys then values, head, token, dimension); the cache's tensors are [layers,
batch, heads, tokens, dimension]. So a block is a strided copy and no transpose.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch

from kvpool.adapters.transformers.layers import Slab
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer


class CacheSource:
    """A `BlockSource`: one row of a cache, whose first token lies in column `padding`."""

    def __init__(self, layout: KVLayout, slabs: Sequence[Slab], row: int, padding: int) -> None:
        self._layout = layout
        self._slabs = slabs
        self._row = row
        self._padding = padding

    def read_block(self, index: int, into: Buffer) -> None:
        """Copy the keys and values of block `index` into `into`."""
        start = self._padding + index * self._layout.block_tokens
        columns = slice(start, start + self._layout.block_tokens)
        payload = torch.from_numpy(into)
        for slab in self._slabs:
            keys, values = _planes(payload, self._layout, slab)
            keys.copy_(slab.keys[:, self._row, :, columns])
            values.copy_(slab.values[:, self._row, :, columns])


class CacheSink:
    """A `BlockSink`: one row of a cache, from column `padding` to before column `end`; tokens beyond are left out."""

    def __init__(self, layout: KVLayout, slabs: Sequence[Slab], row: int, padding: int, end: int) -> None:
        self._layout = layout
        self._slabs = slabs
        self._row = row
        self._padding = padding
        self._end = end

    def write_block(self, index: int, payload: Buffer) -> None:
        """Copy block `index` to its place."""
        start = self._padding + index * self._layout.block_tokens
        columns = slice(start, min(start + self._layout.block_tokens, self._end))
        tokens = columns.stop - start
        if tokens <= 0:
            return
        source = torch.from_numpy(_writable(payload))
        for slab in self._slabs:
            keys, values = _planes(source, self._layout, slab)
            slab.keys[:, self._row, :, columns].copy_(keys[:, :, :tokens])
            slab.values[:, self._row, :, columns].copy_(values[:, :, :tokens])


def _planes(payload: torch.Tensor, layout: KVLayout, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a payload's keys and values for the slab's layers, each [layers, heads, tokens, dimension]."""
    layers = payload.view(slab.keys.dtype).view(layout.layers, -1)
    layers = layers[slab.first_layer : slab.first_layer + slab.keys.shape[0]]
    split = layout.kv_heads * layout.block_tokens * layout.head_size
    keys = layers[:, :split].view(len(layers), layout.kv_heads, layout.block_tokens, layout.head_size)
    values = layers[:, split:].view(len(layers), layout.kv_heads, layout.block_tokens, layout.value_dim)
    return keys, values


def _writable(payload: Buffer) -> Buffer:
    """The same memory as an array that torch takes without a warning; it is only read."""
    interface = dict(payload.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return np.asarray(SimpleNamespace(__array_interface__=interface))

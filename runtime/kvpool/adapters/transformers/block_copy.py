"""Blocks between a pool's memory and the cache's tensors: one copy each way, outside the GIL.

A payload lies in canonical order (layer, keys then values, head, token, dimension); the cache's tensors are [layers,
batch, heads, tokens, dimension]. So a block is a strided copy and no transpose. Numbers are copied as integers of their
size, whatever they are. On the CPU numpy copies, on the thread that asks: torch would share each copy among its
threads, and where other work keeps a core busy, a hundred blocks wait a hundred times for the last of them (seconds).
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from kvpool.adapters.transformers.layers import Slab
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer

_INTEGERS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}


class _Side(NamedTuple):
    """One row's keys, or its values, of some layers; `held` is [layers, heads, tokens, dim], numpy's on the CPU."""

    held: Any
    first_layer: int
    layers: int
    offset: int
    """Where its numbers begin within a layer of a payload."""
    dim: int

    def of(self, layers: Any, heads: int, block_tokens: int) -> Any:
        """The same numbers in a payload [all layers, numbers], as a view [layers, heads, block tokens, dim]."""
        end = self.offset + heads * block_tokens * self.dim
        part = layers[self.first_layer : self.first_layer + self.layers, self.offset : end]
        return part.reshape(self.layers, heads, block_tokens, self.dim)


class _Row:
    """Where one row of a cache lies, and how it lies in payloads."""

    def __init__(self, layout: KVLayout, slabs: Sequence[Slab], row: int) -> None:
        self._layout = layout
        self._sides = [side for slab in slabs for side in _sides(layout, slab, row)]

    def pairs(self, payload: Buffer) -> list[tuple[Any, Any]]:
        """What is held, and its place in the payload: side by side."""
        layout = self._layout
        numbers = payload.view(_INTEGERS[layout.dtype.itemsize][1]).reshape(layout.layers, -1)
        return [(side.held, side.of(numbers, layout.kv_heads, layout.block_tokens)) for side in self._sides]


class CacheSource:
    """A `BlockSource`: one row of a cache, whose first token lies in column `padding`."""

    def __init__(self, layout: KVLayout, slabs: Sequence[Slab], row: int, padding: int) -> None:
        self._block_tokens = layout.block_tokens
        self._row = _Row(layout, slabs, row)
        self._padding = padding

    def read_block(self, index: int, into: Buffer) -> None:
        """Copy the keys and values of block `index` into `into`."""
        start = self._padding + index * self._block_tokens
        for held, there in self._row.pairs(into):
            _copy(there, held[:, :, start : start + self._block_tokens])


class CacheSink:
    """A `BlockSink`: one row of a cache, from column `padding` to before column `end`; tokens beyond are left out."""

    def __init__(self, layout: KVLayout, slabs: Sequence[Slab], row: int, padding: int, end: int) -> None:
        self._block_tokens = layout.block_tokens
        self._row = _Row(layout, slabs, row)
        self._padding = padding
        self._end = end

    def write_block(self, index: int, payload: Buffer) -> None:
        """Copy block `index` to its place."""
        start = self._padding + index * self._block_tokens
        tokens = min(self._block_tokens, self._end - start)
        if tokens <= 0:
            return
        for held, there in self._row.pairs(_writable(payload)):
            _copy(held[:, :, start : start + tokens], there[:, :, :tokens])


def _sides(layout: KVLayout, slab: Slab, row: int) -> list[_Side]:
    integer = _INTEGERS[layout.dtype.itemsize][0]
    keys_end = layout.kv_heads * layout.block_tokens * layout.head_size
    sides = []
    for tensor, offset, dim in ((slab.keys, 0, layout.head_size), (slab.values, keys_end, layout.value_dim)):
        held = tensor[:, row].detach().view(integer)
        array = held.numpy() if held.device.type == "cpu" else held
        sides.append(_Side(array, slab.first_layer, tensor.shape[0], offset, dim))
    return sides


def _copy(into: Any, source: Any) -> None:
    """Copy between two arrays, or between an array and a tensor on a device."""
    if isinstance(into, torch.Tensor):
        into.copy_(torch.from_numpy(source))
    elif isinstance(source, torch.Tensor):
        torch.from_numpy(into).copy_(source)
    else:
        np.copyto(into, source)


def _writable(payload: Buffer) -> Buffer:
    """The same memory as an array that torch takes without a warning; it is only read."""
    interface = dict(payload.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return np.asarray(SimpleNamespace(__array_interface__=interface))

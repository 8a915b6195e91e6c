"""Blocks between a pool's memory and the cache's tensors: one copy each way, outside the GIL.

A payload lies in canonical order (layer, keys then values, head, token, dimension); the cache's tensors are [layers,
batch, heads, tokens, dimension]. So a block is a strided copy and no transpose. Numbers are copied as integers of their
size, whatever they are. On the CPU numpy copies, on the thread that asks: torch would share each copy among its
threads, and where other work keeps a core busy, a hundred blocks wait a hundred times for the last of them (seconds).

A cache on a GPU is copied to and from the gpu tier there: a kernel for a block's keys and values, queued on the stream
that is current. Blocks of other tiers go by way of the host.
"""

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from kvpool.adapters.transformers.layers import Slab
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer
from kvpool.blocks.transfer import DevicePayload

GPU_TYPES = ("cuda",)
"""The kinds of torch devices whose memory the gpu tier holds."""
_INTEGERS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}


class _Part(NamedTuple):
    """One row's keys, its values, or both, of some layers."""

    held: Any
    """[layers, (keys and values,) heads, tokens, dimension]: an array, or a tensor where it is not on the CPU."""
    tensor: torch.Tensor
    """The same as a tensor, wherever it is."""
    layers: slice
    numbers: slice
    """Where they lie among the numbers of a layer in a payload."""
    shape: tuple[int, ...]
    """As `held`, for the tokens of a block."""


class _Row:
    """Where one row of a cache lies, and how it lies in payloads."""

    def __init__(self, layout: KVLayout, slabs: Sequence[Slab], row: int) -> None:
        self._layers = layout.layers
        self._tensor_integer, self._integer = _INTEGERS[layout.dtype.itemsize]
        self._parts = [part for slab in slabs for part in _parts(layout, slab, row)]

    def pairs(self, payload: Buffer) -> list[tuple[Any, Any]]:
        """What is held, and its place in the payload: side by side."""
        numbers = payload.view(self._integer).reshape(self._layers, -1)
        return [(part.held, numbers[part.layers, part.numbers].reshape(part.shape)) for part in self._parts]

    def device_pairs(self, payload: DevicePayload) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `pairs`, of tensors."""
        numbers = payload.view(self._tensor_integer).view(self._layers, -1)
        return [(part.tensor, numbers[part.layers, part.numbers].unflatten(1, part.shape[1:])) for part in self._parts]


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
            _copy(there, held[..., start : start + self._block_tokens, :])


class DeviceCacheSource(CacheSource):
    """A `DeviceBlockSource`: the same of a cache on the device of the gpu tier."""

    def read_block_on_device(self, index: int, into: DevicePayload) -> None:
        """Queue the copy of block `index` into `into`."""
        start = self._padding + index * self._block_tokens
        for held, there in self._row.device_pairs(into):
            there.copy_(held[..., start : start + self._block_tokens, :])


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
        for held, there in self._row.pairs(payload):
            _copy(held[..., start : start + tokens, :], there[..., :tokens, :])


class DeviceCacheSink(CacheSink):
    """A `DeviceBlockSink`: the same of a cache on the device of the gpu tier."""

    def write_block_from_device(self, index: int, payload: DevicePayload) -> None:
        """Queue the copy of block `index` to its place."""
        start = self._padding + index * self._block_tokens
        tokens = min(self._block_tokens, self._end - start)
        if tokens <= 0:
            return
        for held, there in self._row.device_pairs(payload):
            held[..., start : start + tokens, :].copy_(there[..., :tokens, :])


def cache_source(
    layout: KVLayout, slabs: Sequence[Slab], row: int, padding: int, *, gpu_types: Collection[str] = GPU_TYPES
) -> CacheSource:
    """A source of one row of a cache, for the device if all of it lies on one of a kind that the gpu tier is on."""
    kind = DeviceCacheSource if _lies_on_one(slabs, gpu_types) else CacheSource
    return kind(layout, slabs, row, padding)


def cache_sink(
    layout: KVLayout, slabs: Sequence[Slab], row: int, padding: int, end: int, *, gpu_types: Collection[str] = GPU_TYPES
) -> CacheSink:
    """A sink, as `cache_source`."""
    kind = DeviceCacheSink if _lies_on_one(slabs, gpu_types) else CacheSink
    return kind(layout, slabs, row, padding, end)


def _lies_on_one(slabs: Sequence[Slab], gpu_types: Collection[str]) -> bool:
    devices = {slab.keys.device for slab in slabs}
    return len(devices) == 1 and devices.pop().type in gpu_types


def _parts(layout: KVLayout, slab: Slab, row: int) -> list[_Part]:
    heads, tokens = layout.kv_heads, layout.block_tokens
    keys, values = heads * tokens * layout.head_size, heads * tokens * layout.value_dim
    sides = [(slab.keys, slice(0, keys)), (slab.values, slice(keys, keys + values))]
    if slab.both is not None:
        sides = [(slab.both, slice(0, keys + values))]
    layers = slice(slab.first_layer, slab.first_layer + slab.keys.shape[0])
    parts = []
    for tensor, numbers in sides:
        held = tensor.select(-4, row).detach().view(_INTEGERS[layout.dtype.itemsize][0])
        shape = (*held.shape[:-2], tokens, held.shape[-1])
        parts.append(_Part(held.numpy() if held.device.type == "cpu" else held, held, layers, numbers, shape))
    return parts


def _copy(into: Any, source: Any) -> None:
    """Copy between two arrays, or between an array and a tensor on a device."""
    if isinstance(into, torch.Tensor):
        into.copy_(torch.from_numpy(_writable(source)))
    elif isinstance(source, torch.Tensor):
        torch.from_numpy(into).copy_(source)
    else:
        np.copyto(into, source)


def _writable(payload: Buffer) -> Buffer:
    """The same memory as an array that torch takes without a warning; it is only read."""
    interface = dict(payload.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    return np.asarray(SimpleNamespace(__array_interface__=interface))

"""The cache that a session hands to the model: dynamic layers that grow inside one buffer made beforehand.

`transformers`' own layer concatenates, so every token copies all keys and values before it, and every layer is a tensor
of its own, so a block would be two small copies per layer. Here all layers of a device lie in one tensor: a block is
two copies, whatever the depth of the model. A layer whose tensors somebody replaced (beam search, `crop`, another batch
or dtype) leaves the buffer and goes on as the plain layer that it derives from.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvpool.adapters.transformers.geometry import Geometry
from kvpool.adapters.transformers.host_memory import HostMemory
from kvpool.errors import InputError

ROOM_TOKENS = 256
"""How many tokens a buffer grows by at least."""


class Slab(NamedTuple):
    """Consecutive layers on one device; tensors are [layers, batch, heads, tokens, head size]."""

    first_layer: int
    keys: torch.Tensor
    values: torch.Tensor
    both: torch.Tensor | None = None
    """Where keys and values lie side by side, as in a block: [layers, 2, batch, heads, tokens, head size]."""


class KVBuffer:
    """The keys and values of a batch, all layers, with room to grow; beyond a layer's length it holds anything."""

    def __init__(self, geometry: Geometry, batch: int, capacity: int, memory: HostMemory) -> None:
        self._geometry = geometry
        self._memory = memory
        self._batch = batch
        self.capacity = capacity
        self.slabs = self._allocate(capacity)
        self._places = [(slab, layer) for slab, held in enumerate(self.slabs) for layer in range(held.keys.shape[0])]

    def layer(self, index: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` tokens of one layer's keys and values, as views."""
        number, layer = self._places[index]
        slab = self.slabs[number]
        return slab.keys[layer, :, :, :length], slab.values[layer, :, :, :length]

    def holds(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether new keys and values are such as lie here."""
        geometry = self._geometry
        here = (self._batch, geometry.kv_heads, geometry.dtype)
        return (
            (keys.shape[0], keys.shape[1], keys.dtype) == here
            and (values.shape[0], values.shape[1], values.dtype) == here
            and (keys.shape[3], values.shape[3]) == (geometry.key_dim, geometry.value_dim)
        )

    def make_room(self, tokens: int) -> None:
        """Grow to hold `tokens`, by a quarter at least, so that growing token by token copies little."""
        if tokens <= self.capacity:
            return
        capacity = max(tokens + ROOM_TOKENS, self.capacity + self.capacity // 4)
        grown = self._allocate(capacity)
        for old, new in zip(self.slabs, grown, strict=True):
            new.keys[:, :, :, : self.capacity].copy_(old.keys)
            new.values[:, :, :, : self.capacity].copy_(old.values)
        self.slabs, self.capacity = grown, capacity

    def clear(self, row: int, tokens: int) -> None:
        """Zero the first `tokens` of a row: padding is masked, but what is masked must be finite."""
        for slab in self.slabs:
            slab.keys[:, row, :, :tokens].zero_()
            slab.values[:, row, :, :tokens].zero_()

    @torch.inference_mode(False)
    def _allocate(self, capacity: int) -> list[Slab]:
        devices = self._geometry.devices
        ends = [
            layer for layer in range(1, len(devices) + 1) if devices[layer - 1 : layer] != devices[layer : layer + 1]
        ]
        return [self._slab(first, end, capacity) for first, end in zip([0, *ends], ends, strict=False)]

    def _slab(self, first: int, end: int, capacity: int) -> Slab:
        geometry, batch = self._geometry, self._batch
        planes = [end - first, 2, batch, geometry.kv_heads, capacity]
        count = end - first, batch, geometry.kv_heads, capacity
        numbers = self._empty(prod(count) * (geometry.key_dim + geometry.value_dim), geometry.devices[first])
        if geometry.key_dim == geometry.value_dim:
            both = numbers.view(*planes, geometry.key_dim)
            return Slab(first, both[:, 0], both[:, 1], both)
        keys = prod(count) * geometry.key_dim
        return Slab(
            first, numbers[:keys].view(*count, geometry.key_dim), numbers[keys:].view(*count, geometry.value_dim)
        )

    def _empty(self, numbers: int, device: torch.device) -> torch.Tensor:
        dtype = self._geometry.dtype
        if device.type == "cpu":
            return self._memory.take(numbers * dtype.itemsize).view(dtype)
        return torch.empty(numbers, dtype=dtype, device=device)


class PooledLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values inside a `KVBuffer`."""

    keys: Any
    values: Any

    def __init__(self, buffer: KVBuffer, index: int, length: int, awaited: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffer = buffer
        self._index = index
        self._awaited = awaited
        self._pooled: tuple[Any, Any] = (None, None)
        self.lazy_initialization(*buffer.layer(index, 0))
        self._show(length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new keys and values; returns all of them. Copies the earlier ones only when there is no room left."""
        self._check_awaited(key_states)
        wants_gradient = key_states.requires_grad or value_states.requires_grad
        if wants_gradient or not self.is_pooled or not self.buffer.holds(key_states, value_states):
            return self._update_plainly(key_states, value_states, *args, **kwargs)
        length = self.keys.shape[-2]
        end = length + key_states.shape[-2]
        self.buffer.make_room(end)
        keys, values = self.buffer.layer(self._index, end)
        keys[:, :, length:].copy_(key_states)
        values[:, :, length:].copy_(value_states)
        self._show(end)
        return keys, values

    @property
    def is_pooled(self) -> bool:
        """Whether the layer still is what the buffer holds, and nobody has replaced its tensors."""
        keys, values = self._pooled
        return keys is not None and self.keys is keys and self.values is values

    def _check_awaited(self, keys: torch.Tensor) -> None:
        """Some ways to generate ignore what is in the cache; their answers would be wrong without a word."""
        awaited, tokens = self._awaited, keys.shape[-2]
        if not awaited:
            return
        self._awaited = awaited - tokens
        if tokens > awaited:
            raise InputError(
                f"the model ran {tokens} tokens after the {self.get_seq_length()} in the cache, and the session's "
                f"prompt has {awaited} more: assisted decoding and the like begin anew, whatever is in the cache"
            )
        if keys.shape[0] != self.keys.shape[0]:
            raise InputError(
                f"the model ran {keys.shape[0]} rows, and the session's prompt has {self.keys.shape[0]}: "
                "beams and several sequences per prompt cannot start from a loaded cache"
            )

    def _show(self, length: int) -> None:
        self._pooled = self.keys, self.values = self.buffer.layer(self._index, length)

    def _update_plainly(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized and self.get_seq_length() == 0:
            self.lazy_initialization(keys, values)  # an empty view has a batch and dtype, which may be others
        self._pooled = (None, None)
        return super().update(keys, values, *args, **kwargs)


def pooled_cache(buffer: KVBuffer, layers: int, length: int, awaited: int | None = None) -> DynamicCache:
    """A `DynamicCache` whose layers hold the first `length` tokens of `buffer`.

    `awaited`: how many tokens the model may run at most when it first goes on from there; more raise `InputError`.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = None  # all layers are there
    cache.layers = [PooledLayer(buffer, index, length, awaited) for index in range(layers)]
    return cache


def slabs_of(cache: Any, geometry: Geometry, batch: int) -> tuple[list[Slab], int]:
    """What the cache holds now, and for how many tokens; `InputError` where it is no longer what it was made as."""
    layers = cache.layers
    lengths = {layer.get_seq_length() for layer in layers}
    if len(lengths) != 1 or len(layers) != len(geometry.devices):
        raise InputError(f"the cache has {len(layers)} layers of {sorted(lengths)} tokens, not those of a prompt")
    length = lengths.pop()
    if length == 0:
        return [], 0
    for index, layer in enumerate(layers):
        _check_layer(index, layer, geometry, batch)
    if all(isinstance(layer, PooledLayer) and layer.is_pooled for layer in layers):
        return layers[0].buffer.slabs, length
    return [
        Slab(index, layer.keys.unsqueeze(0), layer.values.unsqueeze(0)) for index, layer in enumerate(layers)
    ], length


def _check_layer(index: int, layer: Any, geometry: Geometry, batch: int) -> None:
    if type(layer) not in (PooledLayer, DynamicLayer):
        raise InputError(f"layer {index} of the cache became a {type(layer).__name__}, which cannot be stored")
    keys, values = layer.keys, layer.values
    found = (keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
    wanted = (batch, geometry.kv_heads, geometry.key_dim, geometry.value_dim, geometry.dtype)
    if found != wanted or keys.dtype != values.dtype:
        raise InputError(
            f"layer {index} of the cache holds (batch, heads, key size, value size, type) {found}; the prompt and the "
            f"registered model have {wanted}: beams, several sequences per prompt and autocast cannot be stored"
        )

"""The layers that grow in place hold what transformers' own layers would."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpool.adapters.transformers.geometry import Geometry
from kvpool.adapters.transformers.host_memory import HostMemory
from kvpool.adapters.transformers.layers import KVBuffer, pooled_cache, slabs_of
from kvpool.errors import InputError
from tests.adapters.tiny import llama

LAYERS, HEADS, KEY, VALUE = 3, 2, 16, 16
GEOMETRY = Geometry(HEADS, KEY, VALUE, torch.float32, (torch.device("cpu"),) * LAYERS)


def both(capacity: int = 8, batch: int = 1) -> tuple[Any, Any]:
    return pooled_cache(KVBuffer(GEOMETRY, batch, capacity, HostMemory()), LAYERS, 0), DynamicCache(
        config=llama().config
    )


def feed(caches: tuple[Any, ...], tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Give all caches the same new keys and values; what they return must be equal."""
    for layer in range(LAYERS):
        keys = torch.randn(batch, HEADS, tokens, KEY).to(dtype)
        values = torch.randn(batch, HEADS, tokens, VALUE).to(dtype)
        returned = [cache.update(keys, values, layer) for cache in caches]
        for other in returned[1:]:
            assert torch.equal(returned[0][0], other[0])
            assert torch.equal(returned[0][1], other[1])


def equal(one: Any, other: Any) -> bool:
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


def pooled(cache: Any) -> bool:
    return all(layer.is_pooled for layer in cache.layers)


def test_growing_token_by_token_and_beyond_the_room_gives_the_same_as_concatenating() -> None:
    caches = both(capacity=8)
    for tokens in (5, 1, 1, 1, 1, 700, 1, 3):
        feed(caches, tokens)
    assert equal(*caches)
    assert pooled(caches[0])
    assert caches[0].get_seq_length() == 713


def test_earlier_tokens_stay_where_they_are_while_there_is_room() -> None:
    cache, _ = both(capacity=64)
    feed((cache,), 5)
    place = cache.layers[0].keys.data_ptr()
    feed((cache,), 1)
    assert cache.layers[0].keys.data_ptr() == place


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.reset(),
    ],
    ids=["crop", "reorder", "repeat", "select", "reset"],
)
def test_a_cache_that_was_changed_from_outside_goes_on_as_a_plain_one(change: Any) -> None:
    caches = both(batch=2, capacity=64)
    feed(caches, 6, batch=2)
    for cache in caches:
        change(cache)
    batch = caches[1].layers[0].keys.shape[0] if caches[1].get_seq_length() else 2
    feed(caches, 3, batch=batch)
    assert equal(*caches)


def test_an_empty_cache_takes_another_batch_and_dtype_as_a_plain_one_does() -> None:
    caches = both()
    feed(caches, 4, batch=3, dtype=torch.bfloat16)
    assert equal(*caches)
    assert not pooled(caches[0])


def test_a_copy_has_its_own_tensors() -> None:
    cache, _ = both(capacity=64)
    feed((cache,), 6)
    twin = copy.deepcopy(cache)
    before = twin.layers[0].keys.clone()
    feed((cache,), 2)
    assert torch.equal(twin.layers[0].keys, before)
    feed((twin,), 1)
    assert twin.get_seq_length() == 7
    assert cache.get_seq_length() == 8
    assert pooled(twin)


def test_gradients_flow_as_through_a_plain_layer() -> None:
    cache, _ = both()
    keys = torch.randn(1, HEADS, 2, KEY, requires_grad=True)
    cache.update(keys, torch.randn(1, HEADS, 2, VALUE), 0)[0].sum().backward()
    assert keys.grad is not None


def test_a_buffer_made_in_inference_mode_can_grow_outside_of_it() -> None:
    with torch.inference_mode():
        cache, _ = both()
    feed((cache,), 3)
    assert pooled(cache)


def test_layers_of_several_devices_lie_in_a_slab_each() -> None:
    devices = (torch.device("cpu"), torch.device("meta"), torch.device("meta"))
    slabs = KVBuffer(GEOMETRY._replace(devices=devices), 1, 8, HostMemory()).slabs
    assert [(slab.first_layer, slab.keys.shape[0], slab.keys.device.type) for slab in slabs] == [
        (0, 1, "cpu"),
        (1, 2, "meta"),
    ]


def test_what_is_stored_is_read_from_pooled_and_from_plain_layers_alike() -> None:
    caches = both(capacity=64)
    feed(caches, 5)
    (one,), length = slabs_of(caches[0], GEOMETRY, 1)
    single, same_length = slabs_of(caches[1], GEOMETRY, 1)
    assert length == same_length == 5
    assert torch.equal(one.keys[:, :, :, :5], torch.cat([slab.keys for slab in single]))
    assert [slab.first_layer for slab in single] == [0, 1, 2]


def test_a_cache_of_another_batch_dtype_or_ragged_length_is_refused() -> None:
    cache, _ = both(batch=2)
    feed((cache,), 4, batch=2)
    with pytest.raises(InputError, match="batch"):
        slabs_of(cache, GEOMETRY, 1)
    cache, _ = both()
    feed((cache,), 4, dtype=torch.float16)
    with pytest.raises(InputError, match="float16"):
        slabs_of(cache, GEOMETRY, 1)
    cache, _ = both()
    feed((cache,), 4)
    cache.layers[1].crop(-1)
    with pytest.raises(InputError, match="3, 4"):
        slabs_of(cache, GEOMETRY, 1)

"""A block in the pool and a block in the cache are the same numbers, wherever they lie."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpool.adapters.transformers.block_copy import CacheSink, CacheSource, cache_sink, cache_source
from kvpool.adapters.transformers.geometry import DTYPES
from kvpool.adapters.transformers.layers import Slab
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.transfer import DeviceBlockSink, DeviceBlockSource

LAYERS, BATCH, HEADS, CAPACITY, KEY, VALUE, BLOCK = 3, 2, 2, 40, 6, 4, 8


def layout(dtype: torch.dtype = torch.float32) -> KVLayout:
    return KVLayout(
        layers=LAYERS, kv_heads=HEADS, head_size=KEY, value_head_size=VALUE, dtype=DTYPES[dtype], block_tokens=BLOCK
    )


def numbered(dtype: torch.dtype, *, split_at: int = LAYERS) -> list[Slab]:
    """A cache in which every number is another, in one slab or two."""
    bits = torch.arange(LAYERS * BATCH * HEADS * CAPACITY * (KEY + VALUE), dtype=torch.int64)
    numbers = (bits % 251).to(torch.uint8).repeat_interleave(dtype.itemsize).view(dtype)
    split = LAYERS * BATCH * HEADS * CAPACITY * KEY
    keys = numbers[:split].view(LAYERS, BATCH, HEADS, CAPACITY, KEY)
    values = numbers[split:].view(LAYERS, BATCH, HEADS, CAPACITY, VALUE)
    slabs = [Slab(0, keys[:split_at], values[:split_at])]
    return slabs if split_at == LAYERS else [*slabs, Slab(split_at, keys[split_at:], values[split_at:])]


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split_at", [1, 2, LAYERS])
def test_a_payload_lies_in_canonical_order(dtype: torch.dtype, split_at: int) -> None:
    shape, slabs, row, padding, block = layout(dtype), numbered(dtype, split_at=split_at), 1, 3, 2
    payload = np.zeros(shape.payload_bytes, np.uint8)

    CacheSource(shape, slabs, row, padding).read_block(block, payload)

    whole = numbered(dtype)[0]
    columns = slice(padding + block * BLOCK, padding + (block + 1) * BLOCK)
    for plane in shape.planes():
        side = whole.keys if plane.dim == KEY else whole.values
        expected = side[plane.layer, row, :, columns].contiguous().view(torch.uint8).numpy().tobytes()
        assert payload[plane.offset : plane.offset + plane.nbytes].tobytes() == expected


@given(
    row=st.integers(0, BATCH - 1),
    padding=st.integers(0, 7),
    block=st.integers(0, 3),
    split_at=st.integers(1, LAYERS),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_a_block_comes_back_bytewise_and_nothing_else_is_touched(
    row: int, padding: int, block: int, split_at: int, dtype: torch.dtype
) -> None:
    shape, there = layout(dtype), numbered(dtype)
    payload = np.zeros(shape.payload_bytes, np.uint8)
    CacheSource(shape, there, row, padding).read_block(block, payload)
    here = [
        Slab(slab.first_layer, torch.zeros_like(slab.keys), torch.zeros_like(slab.values))
        for slab in numbered(dtype, split_at=split_at)
    ]

    CacheSink(shape, here, row, padding, CAPACITY).write_block(block, read_only(payload))

    columns = slice(padding + block * BLOCK, padding + (block + 1) * BLOCK)
    written = (torch.cat([slab.keys for slab in here]), torch.cat([slab.values for slab in here]))
    for original, copied in zip((there[0].keys, there[0].values), written, strict=True):
        expected = torch.zeros_like(original)
        expected[:, row, :, columns] = original[:, row, :, columns]
        assert torch.equal(copied.view(torch.uint8), expected.view(torch.uint8))


def test_tokens_beyond_the_end_are_left_out() -> None:
    shape, there, here = layout(), numbered(torch.float32), numbered(torch.float32)
    payload = np.zeros(shape.payload_bytes, np.uint8)
    CacheSource(shape, there, 0, 0).read_block(1, payload)
    for slab in here:
        slab.keys.fill_(-1)
        slab.values.fill_(-1)
    sink = CacheSink(shape, here, 0, 0, end=BLOCK + 3)

    sink.write_block(1, payload)
    sink.write_block(2, payload)

    assert torch.equal(here[0].keys[:, 0, :, BLOCK : BLOCK + 3], there[0].keys[:, 0, :, BLOCK : BLOCK + 3])
    assert bool((here[0].keys[:, 0, :, BLOCK + 3 :] == -1).all())
    assert bool((here[0].values[:, 0, :, BLOCK + 3 :] == -1).all())


def test_a_read_only_payload_is_taken_without_a_warning_and_stays_read_only() -> None:
    shape, here = layout(), numbered(torch.float32)
    payload = read_only(np.zeros(shape.payload_bytes, np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CacheSink(shape, here, 0, 0, CAPACITY).write_block(0, payload)
    assert not payload.flags.writeable


@given(
    row=st.integers(0, BATCH - 1),
    padding=st.integers(0, 7),
    block=st.integers(0, 3),
    split_at=st.integers(1, LAYERS),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_on_the_device_a_block_is_the_same_bytes_as_by_way_of_the_host(
    row: int, padding: int, block: int, split_at: int, dtype: torch.dtype
) -> None:
    shape, there = layout(dtype), numbered(dtype, split_at=split_at)
    payload = np.zeros(shape.payload_bytes, np.uint8)
    on_device = torch.zeros(shape.payload_bytes, dtype=torch.uint8)
    source = cache_source(shape, there, row, padding, gpu_types=["cpu"])
    assert isinstance(source, DeviceBlockSource)
    source.read_block(block, payload)
    source.read_block_on_device(block, on_device)
    assert torch.equal(on_device, torch.from_numpy(payload))

    held = [
        [Slab(slab.first_layer, torch.zeros_like(slab.keys), torch.zeros_like(slab.values)) for slab in there]
        for _ in range(2)
    ]
    end = padding + block * BLOCK + 5
    cache_sink(shape, held[0], row, padding, end).write_block(block, read_only(payload))
    sink = cache_sink(shape, held[1], row, padding, end, gpu_types=["cpu"])
    assert isinstance(sink, DeviceBlockSink)
    sink.write_block_from_device(block, on_device)
    for one, other in zip(*held, strict=True):
        assert torch.equal(one.keys.view(torch.uint8), other.keys.view(torch.uint8))
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))


def test_only_a_cache_that_lies_on_one_device_of_the_gpu_tiers_kind_is_copied_there() -> None:
    assert not isinstance(cache_source(layout(), numbered(torch.float32), 0, 0), DeviceBlockSource)
    elsewhere = numbered(torch.float32, split_at=1)
    elsewhere[1] = Slab(1, elsewhere[1].keys.to("meta"), elsewhere[1].values.to("meta"))
    assert not isinstance(cache_source(layout(), elsewhere, 0, 0, gpu_types=["cpu", "meta"]), DeviceBlockSource)

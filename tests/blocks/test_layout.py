"""A block's payload is its planes, side by side and nothing else."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvpool.blocks.layout import MAX_BLOCK_TOKENS, PAGE_BYTES, Dtype, KVLayout, padded
from kvpool.errors import InputError

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 12),
    kv_heads=st.integers(1, 9),
    head_size=st.integers(1, 257),
    dtype=st.sampled_from(Dtype),
    block_tokens=st.integers(1, MAX_BLOCK_TOKENS),
    value_head_size=st.none() | st.integers(0, 257),
)


@given(layouts)
def test_planes_cover_the_payload_exactly_in_canonical_order(layout: KVLayout) -> None:
    at = 0
    for plane in layout.planes():
        assert plane.offset == at
        assert plane.nbytes == plane.heads * plane.tokens * plane.dim * layout.dtype.itemsize > 0
        at += plane.nbytes
    assert at == layout.payload_bytes
    assert [plane.layer for plane in layout.planes()] == sorted(plane.layer for plane in layout.planes())


@given(layouts)
def test_a_record_is_a_head_page_and_the_payload_in_whole_pages(layout: KVLayout) -> None:
    assert layout.record_bytes % PAGE_BYTES == 0
    assert 0 <= layout.record_bytes - PAGE_BYTES - layout.payload_bytes < PAGE_BYTES


def test_a_layer_has_keys_then_values_and_values_may_be_narrower() -> None:
    layout = KVLayout(layers=2, kv_heads=3, head_size=8, dtype=Dtype.FLOAT16, block_tokens=4, value_head_size=2)
    assert [(plane.layer, plane.dim, plane.nbytes) for plane in layout.planes()] == [
        (0, 8, 192), (0, 2, 48), (1, 8, 192), (1, 2, 48),
    ]  # fmt: skip


def test_a_latent_layout_has_one_plane_per_layer() -> None:
    layout = KVLayout(layers=3, kv_heads=1, head_size=576, dtype=Dtype.BFLOAT16, block_tokens=64, value_head_size=0)
    assert [(plane.layer, plane.dim) for plane in layout.planes()] == [(0, 576), (1, 576), (2, 576)]
    assert layout.payload_bytes == 3 * 64 * 576 * 2


@pytest.mark.parametrize("dtype", Dtype)
def test_element_sizes_are_those_of_the_types(dtype: Dtype) -> None:
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3": 8, "float8_e5m2": 8, "uint8": 8}
    assert dtype.itemsize * 8 == bits[dtype.value]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0), ("kv_heads", 0), ("head_size", 0), ("head_size", -1), ("block_tokens", 0),
        ("block_tokens", MAX_BLOCK_TOKENS + 1), ("value_head_size", -1),
    ],
)  # fmt: skip
def test_a_geometry_that_no_block_can_have_is_refused_by_its_field(field: str, value: int) -> None:
    good: dict[str, Any] = {"layers": 1, "kv_heads": 1, "head_size": 1, "dtype": Dtype.FLOAT16}
    with pytest.raises(InputError, match=rf"KVLayout\.{field} is {value}"):
        KVLayout(**{**good, field: value})


def test_padding_goes_up_to_whole_pages() -> None:
    assert [padded(nbytes) for nbytes in (0, 1, 4095, 4096, 4097)] == [0, 4096, 4096, 4096, 8192]

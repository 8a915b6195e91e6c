"""A batch that was written down comes back as it was; other bytes are no batch."""

from __future__ import annotations

import hashlib
import typing
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.blocks.identity import TreeId
from kvpool.catalog import rows
from kvpool.catalog.encoding import UnreadableBatchError, decode, encode
from kvpool.catalog.rows import Batch, BlocksStored, ModelForgotten, TenantErased, held_bytes, row_count
from kvpool.tiers.tier import TierName
from tests.catalog.samples import MODEL, SEEN, TENANT, stored

_INTS = st.integers(-(1 << 63), (1 << 63) - 1)
_FLOATS = st.floats(allow_nan=False)
_TEXTS = st.text(st.characters(codec="utf-8"))
_KEYS = st.binary(max_size=20).map(lambda data: data * 16)
_KEY = st.binary(min_size=16, max_size=16)
_MODEL = st.binary(min_size=32, max_size=32)
_TIER = st.sampled_from(TierName)
_TREE = st.builds(TreeId, _MODEL, _KEY, _INTS)
_PREFIX = st.builds(rows.SharedPrefixRow, _TREE, _KEY, _INTS, _INTS, _INTS, _INTS)
_OPS: dict[type[Any], st.SearchStrategy[Any]] = {
    rows.ModelSeen: st.builds(rows.ModelSeen, _MODEL, _TEXTS, _TEXTS, _TEXTS, _FLOATS),
    rows.BlocksStored: st.builds(rows.BlocksStored, _TREE, _KEY, _KEYS, _INTS, _INTS, _TIER, _INTS, _INTS, _FLOATS),
    rows.BlocksUsed: st.builds(rows.BlocksUsed, _KEYS, _FLOATS),
    rows.BlocksRemoved: st.builds(rows.BlocksRemoved, _KEYS, _TIER, _TEXTS, _FLOATS),
    rows.PromptAsked: st.builds(rows.PromptAsked, _TREE, _KEY, _INTS, st.none() | st.uuids(), _FLOATS),
    rows.UsageReport: st.builds(
        rows.UsageReport, _MODEL, _KEY, _INTS, _INTS, st.tuples(*[_INTS] * 5), _INTS, _FLOATS, _FLOATS
    ),
    rows.SharedReport: st.builds(rows.SharedReport, st.lists(_PREFIX, max_size=3).map(tuple), _FLOATS),
    rows.PricesSet: st.builds(rows.PricesSet, _FLOATS, _FLOATS, _FLOATS, _FLOATS),
    rows.TiersCleared: st.builds(rows.TiersCleared, st.lists(_TIER, max_size=5).map(tuple), _TEXTS, _FLOATS),
    rows.TenantErased: st.builds(rows.TenantErased, _KEY, _INTS),
    rows.ModelForgotten: st.builds(rows.ModelForgotten, _MODEL),
}
_BATCHES = st.builds(Batch, _INTS, _INTS, st.lists(st.one_of(*_OPS.values()), max_size=6).map(tuple))


def test_every_kind_of_report_is_tried() -> None:
    assert set(_OPS) == set(typing.get_args(rows.Op))


@given(_BATCHES)
def test_a_batch_comes_back_as_it_was(batch: Batch) -> None:
    back = decode(encode(batch))
    assert back == batch
    assert [type(op) for op in back.ops] == [type(op) for op in batch.ops]


@given(_BATCHES, st.data())
def test_a_batch_that_was_cut_is_none(batch: Batch, data: st.DataObject) -> None:
    encoded = encode(batch)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(UnreadableBatchError):
        decode(encoded[:cut])


@given(st.binary(max_size=200))
def test_noise_is_no_batch_and_nothing_worse(noise: bytes) -> None:
    try:
        decode(noise)
    except UnreadableBatchError:
        return


def test_another_version_is_told_from_ours() -> None:
    encoded = bytearray(encode(Batch(1, 1, (SEEN,))))
    encoded[0] = 2
    with pytest.raises(UnreadableBatchError, match="has version 2"):
        decode(bytes(encoded))


def test_the_bytes_of_a_batch_stay_what_they_are() -> None:
    batch = Batch(
        1,
        2,
        (
            BlocksStored(
                TreeId(MODEL, TENANT, 3), stored([1]).parent, stored([1]).keys, 4, 16, TierName.SSD, 5, 6, 7.5
            ),
            TenantErased(TENANT, 8),
            ModelForgotten(MODEL),
            rows.PromptAsked(TreeId(MODEL, TENANT, 3), stored([1]).parent, 9, UUID(int=10), 11.0),
        ),
    )
    assert hashlib.sha256(encode(batch)).hexdigest()[:16] == "6fedb1e9417b53ff"


def test_sizes_are_told_without_looking_inside() -> None:
    op = stored(range(1_000))
    assert row_count(op) == 1_000
    assert 16_000 < held_bytes(op) < 17_000

"""Token ids in every form that engines have them in, and what is none."""

from __future__ import annotations

from array import array
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kvpool.blocks.tokens import INT32_MAX, token_bytes
from kvpool.errors import InputError

IDS = [0, 1, 50_000, -1, INT32_MAX, -INT32_MAX - 1]
PACKED = b"".join(value.to_bytes(4, "little", signed=True) for value in IDS)


@pytest.mark.parametrize(
    "tokens",
    [
        IDS, tuple(IDS), PACKED, bytearray(PACKED), memoryview(PACKED), memoryview(array("i", IDS)), array("i", IDS),
        array("q", IDS), np.array(IDS, np.int32), np.array(IDS, np.int64), np.array(IDS, ">i8"), np.array(IDS, object),
        np.repeat(np.array(IDS, np.int32), 2)[::2], np.repeat(np.array(IDS, np.int64), 2)[::2],
        [np.int64(value) for value in IDS], (value for value in IDS),
    ],
    ids=lambda tokens: type(tokens).__name__,
)  # fmt: skip
def test_every_form_of_the_same_ids_gives_the_same_bytes(tokens: Any) -> None:
    assert token_bytes(tokens) == PACKED


@pytest.mark.parametrize(
    "tokens",
    [[], (), b"", array("i"), np.array([], np.int32), np.array([], np.int64)],
    ids=lambda tokens: type(tokens).__name__,
)
def test_an_empty_prompt_is_no_bytes(tokens: Any) -> None:
    assert token_bytes(tokens) == b""


@given(st.lists(st.integers(-INT32_MAX - 1, INT32_MAX)))
def test_lists_and_arrays_agree_with_int32(ids: list[int]) -> None:
    expected = np.array(ids, np.int32).tobytes()
    assert token_bytes(ids) == token_bytes(np.array(ids, np.int64)) == token_bytes(tuple(ids)) == expected


@pytest.mark.parametrize("bad", [INT32_MAX + 1, -INT32_MAX - 2, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("form", [list, tuple, np.array, lambda ids: array("q", ids)])
def test_an_id_out_of_int32_is_named_by_its_index(form: Any, bad: int) -> None:
    with pytest.raises(InputError, match=rf"tokens\[2\] = {bad} is no int32"):
        token_bytes(form([1, 2, bad, 3]))


@pytest.mark.parametrize("bad", [1.0, 1.5, "7", None, [1], 2**80, b"1"])
def test_an_item_that_is_no_integer_is_named_by_its_index(bad: Any) -> None:
    with pytest.raises(InputError, match=r"tokens\[1\] = .* is no int32"):
        token_bytes([5, bad, 6])


def test_the_item_named_is_the_bad_one_although_others_are_numpy_integers() -> None:
    with pytest.raises(InputError, match=rf"tokens\[1\] = {2**40} "):
        token_bytes([np.int64(1), 2**40])


@pytest.mark.parametrize(
    "mask",
    [[True, False], (False, True), np.array([True, False])],
    ids=["list", "tuple", "numpy"],
)
def test_a_mask_is_no_prompt(mask: Any) -> None:
    with pytest.raises(InputError, match=r"tokens\[0\] = .*boolean"):
        token_bytes(mask)


@pytest.mark.parametrize(
    "floats",
    [[1.0, 2.0], np.array([1.0]), array("f", [1.0])],
    ids=["list", "numpy", "array"],
)
def test_floats_are_refused_even_where_they_are_whole(floats: Any) -> None:
    with pytest.raises(InputError, match=r"tokens\[0\] = 1\.0 is no int32"):
        token_bytes(floats)


@pytest.mark.parametrize("tokens", [np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int64), np.array(3)])
def test_anything_but_one_dimension_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match=r"tokens have \d dimensions"):
        token_bytes(tokens)


def test_a_batch_of_lists_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokens\[0\] = \[1, 2\]"):
        token_bytes([[1, 2], [3, 4]])


@pytest.mark.parametrize("tokens", [5, None, 1.5])
def test_what_is_no_sequence_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="must be a sequence of ids"):
        token_bytes(tokens)


@pytest.mark.parametrize("tokens", [b"abc", bytearray(5), memoryview(b"abcdefg")])
def test_bytes_that_are_no_whole_ids_are_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="not a multiple of 4"):
        token_bytes(tokens)


def test_bytes_cost_nothing() -> None:
    assert token_bytes(PACKED) is PACKED

"""Padded batches: where each row's tokens lie, and what cannot be cached correctly is refused."""

from array import array

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from kvpool.adapters.transformers.rows import loadable_columns, read_prompt
from kvpool.errors import InputError, UnsupportedModelError
from tests.adapters.tiny import llama, made, padded, prompt

MODEL = llama()


def test_a_row_is_its_tokens_without_the_padding_before_them() -> None:
    long, short = prompt(9, seed=1), prompt(5, seed=2)
    read = read_prompt(MODEL, **padded(long, short))
    assert [row.padding for row in read.rows] == [0, 4]
    assert read.rows[1].tokens == array("i", short[0].tolist()).tobytes()


def test_without_a_mask_every_token_counts_and_the_model_gets_a_mask_that_says_so() -> None:
    read = read_prompt(MODEL, prompt(4))
    assert read.attention_mask.tolist() == [[1, 1, 1, 1]]


def test_a_pad_token_in_the_prompt_needs_a_mask() -> None:
    ids = torch.tensor([[0, 5, 6]])
    with pytest.raises(InputError, match="pad token 0"):
        read_prompt(MODEL, ids)
    assert read_prompt(MODEL, ids, torch.ones_like(ids)).rows[0].padding == 0


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 1, 2]])
def test_only_padding_on_the_left_is_taken(mask: list[int]) -> None:
    with pytest.raises(InputError, match="padding on the left"):
        read_prompt(MODEL, torch.tensor([[5, 6, 7]]), torch.tensor([mask]))


def test_a_row_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="row 1"):
        read_prompt(MODEL, torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))


@pytest.mark.parametrize("ids", [[1, 2], torch.tensor([1, 2]), torch.zeros(0, 3, dtype=torch.long)])
def test_the_prompt_is_a_tensor_of_rows(ids: object) -> None:
    with pytest.raises(InputError, match="input_ids must be a tensor"):
        read_prompt(MODEL, ids)


def test_the_mask_has_the_shape_of_the_prompt() -> None:
    with pytest.raises(InputError, match="shape of input_ids"):
        read_prompt(MODEL, prompt(3), torch.ones(1, 4))


def test_padding_needs_a_model_that_is_told_positions() -> None:
    bloom = made(BloomForCausalLM, BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    read_prompt(bloom, prompt(3))
    with pytest.raises(UnsupportedModelError, match="position_ids"):
        read_prompt(bloom, **padded(prompt(3), prompt(2)))


def test_token_ids_beyond_int32_are_refused() -> None:
    with pytest.raises(InputError, match="int32"):
        read_prompt(MODEL, torch.tensor([[5, 2**31]]))


@pytest.mark.parametrize(
    ("matched", "columns"),
    [
        ((16, 10), 15),  # the last column is always computed
        ((16, 8), 14),
        ((8, 8), 8),
        ((16, 0), 6),  # the second row's tokens begin in column 6
        ((0, 8), 0),
    ],
)
def test_the_row_with_least_decides_how_much_of_a_batch_is_loaded(matched: tuple[int, int], columns: int) -> None:
    read = read_prompt(MODEL, **padded(prompt(16), prompt(10)))
    assert loadable_columns(read, matched) == columns


def test_nothing_can_be_loaded_of_an_empty_prompt() -> None:
    read = read_prompt(MODEL, torch.zeros(1, 0, dtype=torch.long))
    assert loadable_columns(read, [0]) == 0
    assert read.rows[0].tokens == b""

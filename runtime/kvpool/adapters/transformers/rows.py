"""The rows of a prompt: one, or a batch that is padded on the left.

A row of `n` tokens in a batch of width `w` has its tokens in columns `w - n` to `w`, at positions 0 to `n`; what lies
before is masked. So its keys and values are those of the same tokens without padding, and only the column differs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kvpool.adapters.transformers.geometry import takes_positions
from kvpool.blocks.tokens import token_bytes
from kvpool.errors import InputError, UnsupportedModelError


class Row(NamedTuple):
    """One prompt: the columns before it, and its tokens as int32 bytes."""

    padding: int
    tokens: bytes


class Prompt(NamedTuple):
    """What was asked of the model, checked; `attention_mask` is always there, so that nobody has to guess it."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: tuple[Row, ...]

    @property
    def width(self) -> int:
        """Columns, padding included."""
        return int(self.input_ids.shape[1])


def read_prompt(model: Any, input_ids: Any, attention_mask: Any = None) -> Prompt:
    """Return the prompt in these tensors, or raise `InputError` (`UnsupportedModelError`) where it cannot be cached."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.shape[0] < 1:
        raise InputError("input_ids must be a tensor [batch, tokens] with at least one row (return_tensors='pt')")
    if attention_mask is None:
        _refuse_unmarked_padding(model, input_ids)
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        raise InputError(f"attention_mask must be a tensor of the shape of input_ids, {tuple(input_ids.shape)}")
    rows = tuple(
        _row(number, tokens, mask) for number, (tokens, mask) in enumerate(zip(input_ids, attention_mask, strict=True))
    )
    if any(row.padding for row in rows) and not takes_positions(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids, so left-padded rows cannot be placed: "
            "pass prompts of one length, or one at a time"
        )
    return Prompt(input_ids, attention_mask, rows)


def loadable_columns(prompt: Prompt, matched: Sequence[int]) -> int:
    """How many columns of the whole batch can be loaded when `matched` tokens of each row are there.

    The cache of a batch has one length, so the row with least decides. The last column is never loaded: what the model
    says after it has to be computed.
    """
    return max(0, min(prompt.width - 1, *(row.padding + n for row, n in zip(prompt.rows, matched, strict=True))))


def _row(number: int, tokens: torch.Tensor, mask: torch.Tensor) -> Row:
    width = len(tokens)
    kept = int((mask != 0).sum())
    padding = width - kept
    if width and not kept:
        raise InputError(f"row {number} of attention_mask is all zeros: a prompt has at least one token")
    if not bool((mask[padding:] == 1).all()):
        raise InputError(
            f"row {number} of attention_mask is not zeros, then ones: only padding on the left can be cached "
            "(tokenizer.padding_side = 'left')"
        )
    return Row(padding, token_bytes(tokens[padding:].cpu().numpy()))


def _refuse_unmarked_padding(model: Any, input_ids: torch.Tensor) -> None:
    """Without a mask, `generate` would take every pad token for padding, wherever it stands."""
    pad, eos = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if pad is not None and pad not in ends and bool((input_ids == pad).any()):
        raise InputError(f"input_ids holds the pad token {pad}: pass the attention_mask too")

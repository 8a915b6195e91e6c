"""Token ids as torch tensors, for whoever has torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpool.blocks.tokens import INT32_MAX, token_bytes
from kvpool.errors import InputError

torch = pytest.importorskip("torch")

IDS = [0, 1, 50_000, -1, INT32_MAX, -INT32_MAX - 1]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_a_tensor_gives_the_bytes_of_its_ids(dtype: str) -> None:
    tensor = torch.tensor(IDS, dtype=getattr(torch, dtype))
    assert token_bytes(tensor) == token_bytes(tensor.repeat_interleave(2)[::2]) == np.array(IDS, np.int32).tobytes()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_smaller_integers_are_ids_too(dtype: str) -> None:
    assert token_bytes(torch.tensor([1, 2, 100], dtype=getattr(torch, dtype))) == token_bytes([1, 2, 100])


def test_an_empty_tensor_is_an_empty_prompt() -> None:
    assert token_bytes(torch.tensor([], dtype=torch.int64)) == b""


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1, 2, INT32_MAX + 1]), r"tokens\[2\] = 2147483648"),
        (torch.tensor([True, False]), r"tokens\[0\] = True .*boolean"),
        (torch.tensor([1.0, 2.0]), r"tokens\[0\] = 1\.0 "),
        (torch.tensor([1.0], dtype=torch.bfloat16), r"tokens\[0\] = 1\.0 "),
        (torch.zeros((1, 3), dtype=torch.int64), "2 dimensions"),
        (torch.tensor(3), "0 dimensions"),
    ],
    ids=["int64", "mask", "float", "bfloat16", "batch", "scalar"],
)
def test_what_is_no_prompt_is_refused(tensor: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        token_bytes(tensor)

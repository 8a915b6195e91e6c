"""The encoder without a model: the same everywhere, near for prompts that share much, bounded in memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tracemalloc
from array import array
from collections import Counter
from itertools import pairwise
from math import hypot
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.catalog.embedding import DIMENSIONS, HashedNgrams, Vector
from kvpool.errors import InputError

ENCODER = HashedNgrams()
U32 = 0xFFFFFFFF
INT32 = st.integers(-(2**31), 2**31 - 1)


def prompt(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def text(rng: Random, tokens: int) -> bytes:
    return array("i", [rng.randrange(128_000) for _ in range(tokens)]).tobytes()


def encoded(tokens: bytes) -> Vector:
    return ENCODER.encode(tokens)


def likeness(one: bytes, other: bytes) -> float:
    return float(encoded(one) @ encoded(other))


def one_by_one(ids: list[int]) -> list[float]:
    """The same in plain Python, n-gram by n-gram."""
    single = [mixed((token & U32) * 0x9E3779B1 + 1) for token in ids]
    double = [mixed(one * 0x85EBCA77 + other) for one, other in pairwise(single)]
    triple = [mixed(one * 0xC2B2AE3D + other) for one, other in zip(double, single[2:], strict=False)]
    counts = Counter(ngram >> 19 for ngram in single + double + triple)
    sums = [
        sum((-1) ** cell * counts[16 * dimension + cell] ** 0.25 for cell in range(16))
        for dimension in range(DIMENSIONS)
    ]
    length = hypot(*sums)
    return [one / length for one in sums]


def mixed(ngram: int) -> int:
    ngram &= U32
    ngram = (ngram ^ ngram >> 15) * 0x2C1B3C6D & U32
    ngram = (ngram ^ ngram >> 12) * 0x297A2D39 & U32
    return ngram ^ ngram >> 15


@pytest.mark.parametrize(
    ("tokens", "digest"),
    [
        (prompt(), "cc6d171260b47f4c"),
        (prompt(0), "b4ebdea6455ee266"),
        (prompt(1, 2, 3, 1, 2, 3), "2dbd94905f5c5501"),
        (prompt(-1, 2**31 - 1, -(2**31)), "ebf65a0b9bcc4946"),
        (prompt(*(number * number % 50_021 for number in range(40_000))), "7104116c942aa635"),
    ],
)
def test_a_prompt_has_the_same_vector_in_every_version_and_on_every_machine(tokens: bytes, digest: str) -> None:
    thousandths = np.rint(encoded(tokens) * 1_000).astype("<i2")
    assert hashlib.blake2b(thousandths.tobytes(), digest_size=8).hexdigest() == digest


def test_another_process_encodes_alike() -> None:
    program = (
        "import sys; from kvpool.catalog.embedding import HashedNgrams;"
        "sys.stdout.buffer.write(HashedNgrams().encode(bytes(range(200)) * 40).tobytes())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert ended.stdout == encoded(bytes(range(200)) * 40).tobytes()


@given(st.lists(INT32, max_size=300))
def test_a_vector_has_512_finite_numbers_and_length_1_unless_there_is_nothing_to_say(tokens: list[int]) -> None:
    vector = encoded(prompt(*tokens))
    assert vector.shape == (DIMENSIONS,)
    assert vector.dtype == np.dtype(np.float32)
    assert np.isfinite(vector).all()
    length = float(np.linalg.norm(vector))
    assert length == pytest.approx(1, abs=1e-5) or not vector.any()


def test_an_empty_prompt_is_all_zero_and_one_token_is_not() -> None:
    assert not encoded(b"").any()
    assert encoded(prompt(7)).any()


def test_bytes_that_are_no_token_ids_are_refused() -> None:
    with pytest.raises(InputError, match="not a multiple of 4"):
        encoded(b"12345")


def test_prompts_are_the_nearer_the_more_they_share() -> None:
    rng = Random(1)
    head, other_head = text(rng, 800), text(rng, 800)
    question, other_question = text(rng, 200), text(rng, 200)
    near = likeness(head + question, head + other_question)
    far = likeness(head + question, other_head + question)
    assert 0.6 < near < 0.95
    assert 0.05 < far < near
    assert abs(likeness(head, other_head)) < 0.2


def test_the_order_of_tokens_counts() -> None:
    rng = Random(2)
    ids = array("i", text(rng, 500))
    mixed = array("i", rng.sample(list(ids), len(ids)))
    assert likeness(ids.tobytes(), mixed.tobytes()) < 0.8


def test_what_a_prompt_repeats_does_not_drown_the_rest() -> None:
    rng = Random(3)
    question = text(rng, 300)
    repeated = prompt(*[5, 6] * 1_000)
    assert likeness(question + repeated, question) > 0.7


@pytest.mark.parametrize("tokens", [1, 2, 3, 300, 16_383, 16_384, 16_385, 16_386, 2 * 16_384 + 1])
def test_each_n_gram_counts_once_also_where_a_long_prompt_is_hashed_in_pieces(tokens: int) -> None:
    ids = array("i", text(Random(tokens), tokens)).tolist()
    np.testing.assert_allclose(encoded(prompt(*ids)), one_by_one(ids), atol=1e-6)


def test_memory_does_not_grow_with_the_prompt() -> None:
    peaks = []
    for tokens in (60_000, 400_000):
        ids = np.arange(tokens, dtype=np.int32).tobytes()
        tracemalloc.start()
        encoded(ids)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 2 << 20

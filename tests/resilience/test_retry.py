"""Pauses between tries spread out, and grow up to a ceiling."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvpool.resilience import FullJitter


@given(st.integers(), st.integers(1, 30))
def test_a_pause_is_anything_up_to_a_ceiling_that_doubles(seed: int, tries: int) -> None:
    jitter = FullJitter(0.1, 5.0, rng=random.Random(seed))
    for at in range(tries):
        assert 0 <= jitter.next_s() <= min(0.1 * 2**at, 5.0)
    jitter.reset()
    assert jitter.next_s() <= 0.1

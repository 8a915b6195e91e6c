"""Semantic prefetch: what came after prompts like the one that is asked for is in RAM before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.config import PrefetchConfig
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.stats import PrefetchStats
from kvpool.tiers.tier import TierName
from tests.pool.kv import DEADLINE_S, MIB, RECORD, check, empty_ram, flushed, prompt, served, spec, store
from tests.waiting import eventually

from .pools import shared_config

MAX_BLOCKS = 24


@pytest.fixture
def pool(tmp_path: Path, postgres: Path) -> Iterator[Pool]:
    plain = shared_config(
        tmp_path / "pool",
        database=postgres,
        database_options={"inlineMaxBytes": 0, "qdrant": {"tls": False}},
        ssd=64 * MIB,
    )
    prefetching = plain.model_copy(update={"prefetch": PrefetchConfig(semantic=True, max_bytes=MAX_BLOCKS * RECORD)})
    with Pool.open(prefetching, directory=tmp_path / "pool") as opened:
        yield opened


def stats(pool: Pool) -> PrefetchStats:
    found = pool.stats().prefetch
    assert found is not None
    return found


def remembered(pool: Pool) -> None:
    prompts = pool._engine.prompts
    assert prompts is not None
    assert prompts.flush(DEADLINE_S), "what was asked for is remembered"


def played(pool: Pool, model: Model) -> tuple[list[int], list[int]]:
    """Three users ask nearly the same, and then the same other prompt; all that lies on SSD alone afterwards."""
    question, other = prompt(20), prompt(10, seed=5)
    for user in range(3):
        store(model, question + prompt(1, seed=50 + user))
        store(model, other)
    flushed(pool)
    remembered(pool)
    empty_ram(pool)
    return question, other


def test_what_followed_similar_prompts_is_in_ram_before_it_is_asked_for(pool: Pool) -> None:
    model = pool.register(spec())
    question, other = played(pool, model)
    with model.match(question + prompt(1, seed=60)):
        pass
    eventually(lambda: stats(pool).prefetched_blocks >= 10, "the prompt that followed is prefetched")
    assert served(model, other) == {TierName.RAM: 10}
    eventually(lambda: stats(pool).used_blocks >= 10, "it is counted as used")
    check(pool)


def test_what_is_prefetched_and_not_used_stays_within_the_budget_and_is_counted_when_it_goes(pool: Pool) -> None:
    model = pool.register(spec())
    question, _ = played(pool, model)
    for user in range(4):
        with model.match(question + prompt(1, seed=70 + user)):
            pass
    prefetcher = pool._engine.prefetcher
    assert prefetcher is not None
    assert prefetcher.flush(DEADLINE_S)
    assert stats(pool).searches >= 4
    assert 0 < stats(pool).held_bytes <= MAX_BLOCKS * RECORD
    empty_ram(pool)
    eventually(lambda: stats(pool).held_bytes == 0 and stats(pool).unused_blocks > 0, "what has gone is counted")
    check(pool)


def test_it_is_off_where_nobody_asked_for_it(tmp_path: Path, postgres: Path) -> None:
    plain = shared_config(tmp_path / "plain", database=postgres)
    with Pool.open(plain, directory=tmp_path / "plain") as pool:
        assert pool.stats().prefetch is None


def test_without_what_it_needs_it_is_said_not_to_be_used(tmp_path: Path, postgres: Path) -> None:
    plain = shared_config(tmp_path / "plain", database=postgres)
    wanted = plain.model_copy(update={"prefetch": PrefetchConfig(semantic=True)})
    with Pool.open(wanted, directory=tmp_path / "plain") as pool:
        assert pool.notices == ("prefetch.semantic is not used: it needs tiers.database.qdrant",)

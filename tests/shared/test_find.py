"""One question over catalog, vectors and shared tiers; and what the catalog knows of a pool, told behind its back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from kvpool.errors import InputError, SharedTierOutError
from kvpool.pool.pool import Pool
from kvpool.pool.results import Verdict
from kvpool.tiers.tier import TierName
from tests.local.servers import Server
from tests.pool.kv import BLOCK_TOKENS, DEADLINE_S, MIB, empty_ram, flushed, load, prompt, spec, store
from tests.tiers.dragonfly.servers import client_of
from tests.waiting import eventually

from .pools import catalog_of, open_shared, reported


@pytest.fixture
def pool(tmp_path: Path, dragonfly: Path, postgres: Path) -> Iterator[Pool]:
    with open_shared(tmp_path / "pool", dragonfly=dragonfly, database=postgres, ssd=64 * MIB) as opened:
        yield opened


def rows(folder: Path, query: str) -> list[tuple[object, ...]]:
    """What the database says, asked as a person would."""
    url, password = (folder / "url").read_text(), (folder / "password").read_text()
    with psycopg.connect(url, user="kvpool", password=password) as connection:
        return connection.execute(query.encode()).fetchall()


def test_blocks_are_found_by_model_tenant_and_prefix_with_the_tiers_that_have_them(pool: Pool) -> None:
    model = pool.register(spec())
    store(model, prompt(5))
    store(model, prompt(2) + prompt(2, seed=7))
    store(model, prompt(3), tenant="other")
    flushed(pool)
    assert len(pool.find("m")) == 10
    assert len(pool.find("m", "default")) == 7
    found = pool.find("m", "default", prefix=prompt(2))
    assert sorted(entry.depth for entry in found) == [1, 2, 2, 3, 3, 4]
    assert {entry.tokens for entry in found} == {BLOCK_TOKENS * depth for depth in (2, 3, 4, 5)}
    assert {entry.tiers for entry in found} == {(TierName.RAM, TierName.DRAGONFLY, TierName.DATABASE, TierName.SSD)}
    assert len(pool.find("m", limit=3)) == 3


def test_what_has_gone_from_a_shared_tier_since_is_not_said_to_be_there(pool: Pool, dragonfly: Path) -> None:
    store(pool.register(spec()), prompt(3))
    flushed(pool)
    with client_of(dragonfly) as client:
        client.flushall()
    assert {entry.tiers for entry in pool.find("m")} == {(TierName.RAM, TierName.DATABASE, TierName.SSD)}


def test_blocks_are_found_by_age_and_by_metadata(pool: Pool) -> None:
    store(pool.register(spec()), prompt(3))
    flushed(pool)
    key = pool.find("m", prefix=prompt(2), tenant="default")[0].key
    catalog_of(pool).reading.describe_block(key, {"kept_for": "audit", "level": 3}, version=1)
    assert [entry.key for entry in pool.find("m", where={"kept_for": "audit"})] == [key]
    assert pool.find("m", where={"kept_for": "audit", "level": 4}) == []
    assert len(pool.find("m", older_than=timedelta(0))) == 3
    assert pool.find("m", older_than=timedelta(hours=1)) == []


def test_prompts_are_found_by_likeness_best_first_and_only_of_the_same_tenant(
    tmp_path: Path, dragonfly: Path, postgres: Path
) -> None:
    with open_shared(
        tmp_path / "pool", dragonfly=dragonfly, database=postgres, database_options={"qdrant": {"tls": False}}
    ) as pool:
        model = pool.register(spec())
        long = prompt(40)
        store(model, long)
        store(model, long[:120] + prompt(10, seed=3))
        store(model, prompt(40, seed=4))
        store(model, long, tenant="other")
        prompts = pool._engine.prompts
        assert prompts is not None
        assert prompts.flush(DEADLINE_S)
        assert prompts.remembered == 4
        found = pool.find("m", "default", similar_to=long, limit=2)
        assert [entry.depth for entry in found] == [39, 39]
        likeness = [entry.similarity or 0.0 for entry in found]
        assert likeness == sorted(likeness, reverse=True)
        assert likeness[0] > 0.99
        assert likeness[1] > 0.5
        pool.erase(tenant="default")
        eventually(lambda: pool.find("m", "default", similar_to=long) == [], "what was erased is not found")
        assert len(pool.find("m", "other", similar_to=long)) == 1


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ({"prefix": prompt(1)}, "need a tenant"),
        ({"similar_to": prompt(1)}, "need a tenant"),
        ({"tenant": "t", "prefix": prompt(1), "similar_to": prompt(1)}, "not both"),
        ({"tenant": "t", "prefix": [1]}, "at least a block"),
        ({"tenant": "t", "similar_to": prompt(1)}, "tiers.database.qdrant"),
        ({"limit": 0}, "limit is 0"),
        ({"older_than": timedelta(seconds=-1)}, "0 or more"),
        ({"where": {"a": {1, 2}}}, "JSON"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(pool: Pool, question: dict[str, object], complaint: str) -> None:
    pool.register(spec())
    with pytest.raises(InputError, match=complaint):
        pool.find("m", **question)  # type: ignore[arg-type]


def test_a_catalog_that_does_not_answer_is_said(tmp_path: Path, own_postgres: Server) -> None:
    with open_shared(tmp_path / "pool", database=own_postgres.folder, database_options={"budgetS": 0.2}) as pool:
        store(pool.register(spec()), prompt(2))
        own_postgres.kill()
        with pytest.raises(SharedTierOutError, match="catalog does not answer"):
            pool.find("m")


def test_explain_says_how_a_block_went_from_another_node(tmp_path: Path, postgres: Path) -> None:
    rows_alone = {"inlineMaxBytes": 0}
    with (
        open_shared(tmp_path / "one", database=postgres, database_options=rows_alone) as one,
        open_shared(tmp_path / "two", database=postgres, database_options=rows_alone) as two,
    ):
        store(one.register(spec()), prompt(3))
        empty_ram(one)
        reported(one)
        report = two.register(spec()).explain(prompt(3))[0]
        assert report.verdict is Verdict.NEVER_STORED
        assert "went last from ram of" in report.detail
        assert "(evicted)" in report.detail


def test_people_read_what_is_held_and_what_was_saved_in_views(tmp_path: Path, dragonfly: Path, postgres: Path) -> None:
    with open_shared(tmp_path / "pool", dragonfly=dragonfly, database=postgres, ssd=64 * MIB) as pool:
        model = pool.register(spec())
        model.observe_prefill(1000, 1.0)
        store(model, prompt(5))
        flushed(pool)
        assert load(model, prompt(5)) == 5
    held = rows(postgres, "select tier, blocks from kvpool.held where model = 'm' order by tier")
    assert held == [("database", 5), ("dragonfly", 5), ("ram", 5), ("ssd", 5)]
    ((matched, tokens, seconds),) = rows(
        postgres, "select matched_blocks, saved_tokens, saved_prefill_s from kvpool.saved where model = 'm'"
    )
    assert (matched, tokens) == (5, 5 * BLOCK_TOKENS)
    assert seconds == pytest.approx(5 * BLOCK_TOKENS / 1000)
    ((gpu_hour,),) = rows(postgres, "select value from kvpool.prices where name = 'gpuHour'")
    assert gpu_hour == 2.5
    with open_shared(tmp_path / "pool", database=postgres) as pool:
        reported(pool)
        held = rows(postgres, "select tier from kvpool.held where model = 'm' order by tier")
        assert ("ram",) not in held, "what was in memory is gone with the process"

"""`kvpool replay`: the command around the replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpool.cli.exits import ExitCode
from kvpool.cli.replaying import capacities_of
from kvpool.errors import ConfigError
from kvpool.replay.synthetic import synthetic_trace
from tests.cli.command import kvpool


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(json.dumps({"hash_ids": blocks.tolist()}) + "\n" for blocks in synthetic_trace(200, seed=3))
    )
    return path


def test_each_capacity_has_the_policy_the_exact_lru_and_the_bound(trace: Path) -> None:
    ended = kvpool("replay", trace, "--capacity-blocks", "100,1k", "--json")
    assert ended.code == 0
    rows = ended.objects
    assert [(row["capacity_blocks"], row["policy"]) for row in rows] == [
        (capacity, policy) for capacity in (100, 1_000) for policy in ("lru", "adaptive", "exact-lru", "offline-bound")
    ]
    for ours, better, exact, bound in (rows[:4], rows[4:]):
        assert ours["hits"] == exact["hits"] <= better["hits"] <= bound["hits"]
        assert ours["requests"] == 200
        assert ours["hit_ratio_percent"] == pytest.approx(100 * ours["hits"] / ours["blocks"], abs=0.001)


def test_for_people_it_is_a_table(trace: Path) -> None:
    ended = kvpool("replay", trace, "--capacity-blocks", "100")
    assert ended.code == 0
    assert ended.out.startswith("200 requests for ")
    assert ["100", "lru"] in [line.split()[:2] for line in ended.out.splitlines()]


def test_capacities_are_numbers_of_blocks_with_k_and_m() -> None:
    assert capacities_of("500, 2k,1M") == [500, 2_000, 1_000_000]


@pytest.mark.parametrize("wrong", ["", "0", "2kk", "-1", "1.5k", "2k,,3k", "many"])
def test_a_wrong_capacity_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--capacity-blocks"):
        capacities_of(wrong)


def test_an_unknown_policy_is_answered_with_the_known_ones(trace: Path) -> None:
    ended = kvpool("replay", trace, "--policy", "fifo")
    assert ended.code == ExitCode.USAGE
    assert "lru" in ended.complaint


def test_a_trace_that_is_none_is_named_with_its_line(trace: Path) -> None:
    trace.write_text("hello\n")
    ended = kvpool("replay", trace)
    assert ended.code == ExitCode.USAGE
    assert "trace.jsonl:1" in ended.complaint

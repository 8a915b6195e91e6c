"""The bench of prefetching: its memory counts rightly, predictors see nothing of the future, and the command prints."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.bench.area import benchmarks_of
from kvpool.bench.prefetch.memory import SmallMemory
from kvpool.bench.prefetch.playing import play
from kvpool.bench.prefetch.predictors import FOLLOWERS, K, Predictor, followed, frequent, nearest, similar
from kvpool.bench.prefetch.requests import Asked, asked_of_trace, asked_of_workload, distinct, stages
from kvpool.bench.sharing.workloads import chatbot
from kvpool.catalog.embedding import HashedNgrams
from kvpool.replay.reference import exact_lru_hits
from kvpool.replay.synthetic import synthetic_trace
from kvpool.replay.trace import BlockNumbers
from tests.bench.test_rows import KEYS
from tests.cli.command import kvpool


def asked_of(*prompts: Sequence[int]) -> list[Asked]:
    numbers = BlockNumbers()
    return asked_of_trace([numbers.number(prompt) for prompt in prompts])


def predictors_of(asked: Sequence[Asked]) -> dict[str, Predictor]:
    neighbours = nearest(asked, HashedNgrams())
    return {"frequent": frequent(asked), "similar": similar(asked, neighbours), "followed": followed(asked, neighbours)}


@pytest.mark.parametrize("capacity", [200, 1_000, 5_000])
def test_without_prefetch_the_memory_is_an_exact_lru(capacity: int) -> None:
    trace = synthetic_trace(400, seed=3)
    played = play(asked_of_trace(trace), capacity_blocks=capacity)
    assert played.hits == pytest.approx(sum(exact_lru_hits(trace, capacity)), rel=0.01)
    assert (played.asked, played.prefetched, played.used) == (sum(map(len, trace)), 0, 0)


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 40), max_size=8)), max_size=40))
def test_the_memory_never_holds_more_than_its_capacity(steps: list[tuple[bool, list[int]]]) -> None:
    memory = SmallMemory(12, 4)
    for prefetches, blocks in steps:
        if prefetches:
            memory.prefetch(blocks)
        else:
            memory.request(blocks, len(blocks))
        assert len(memory) <= 12
        assert sum(block in memory for block in range(41)) == len(memory)
    assert memory.used_blocks <= memory.prefetched_blocks


def test_a_prefetched_block_that_is_asked_for_counts_once() -> None:
    memory = SmallMemory(10, 4)
    memory.request([1, 2, 3], 3)
    memory.prefetch([7, 8])
    assert memory.request([7, 8, 9], 3) == (2, 2)
    assert memory.request([7, 8, 9], 3) == (3, 0)
    assert (memory.prefetched_blocks, memory.used_blocks) == (2, 2)


def test_what_was_prefetched_first_goes_first_and_does_not_exceed_its_share() -> None:
    memory = SmallMemory(10, 3)
    memory.prefetch(range(5))
    assert [block in memory for block in range(5)] == [False, False, True, True, True]


@pytest.mark.parametrize("kind", ["frequent", "similar", "followed"])
def test_a_predictor_sees_nothing_of_the_future(kind: str) -> None:
    asked = asked_of_workload(chatbot(120))
    whole, beginning = predictors_of(asked)[kind], predictors_of(asked[:60])[kind]
    for number in range(60):
        assert whole(number, set(), 50) == beginning(number, set(), 50)


@pytest.mark.parametrize("kind", ["frequent", "similar", "followed"])
def test_a_predictor_names_what_is_not_held_and_parents_before_children(kind: str) -> None:
    asked = asked_of_workload(chatbot(150))
    parents = {child: parent for request in asked for parent, child in zip(request.blocks, request.blocks[1:])}  # noqa: B905
    predict = predictors_of(asked)[kind]
    rng, held = Random(1), set[int]()
    for number, request in enumerate(asked):
        wanted = predict(number, held, 20)
        assert len(wanted) <= 20
        assert len(set(wanted)) == len(wanted)
        assert not held & set(wanted)
        if not held:
            assert all(parents.get(block, block) in [*wanted[:at], block] for at, block in enumerate(wanted))
        if number > 100:
            held.update(block for block in request.blocks if rng.random() < 0.5)


def test_neighbours_are_the_earlier_prompts_that_share_most() -> None:
    asked = asked_of([1, 2, 3], [9, 8, 7], [1, 2, 4], [1, 2, 3, 5])
    neighbours = nearest(asked, HashedNgrams())
    assert neighbours[0] == []
    assert neighbours[2][0].number == 0
    assert [one.number for one in neighbours[3]][:2] == [0, 2]
    assert all(one.number < number for number, found in enumerate(neighbours) for one in found)


def test_what_followed_similar_prompts_is_what_two_of_them_agree_on() -> None:
    flow = [([1, 2, 10], [5, 6, 20]), ([1, 2, 11], [5, 6, 21]), ([1, 2, 12], [])]
    asked = asked_of(*(prompt for pair in flow for prompt in pair if prompt))
    common, own = list(asked[1].blocks[:2]), asked[1].blocks[2]
    held = set(asked[4].blocks)
    wanted = predictors_of(asked)["followed"](4, held, 10)
    assert wanted[:2] == common
    assert own not in wanted


def test_a_trace_has_the_same_tokens_for_the_same_block() -> None:
    one, other = asked_of([1, 2, 3], [1, 2, 4])
    assert one.tokens[:-64] == other.tokens[:-64]
    assert one.tokens[-64:] != other.tokens[-64:]
    assert min(array("i", one.tokens)) >= 0


def test_semantic_prefetch_wins_where_a_workload_is_made_for_it() -> None:
    asked = asked_of_workload(stages(1_500))
    capacity = distinct(asked) // 20
    without = play(asked, capacity_blocks=capacity)
    hits = {
        kind: play(
            asked, capacity_blocks=capacity, prefetch_blocks=capacity // 4, predictor=predictor, blocks_at_once=16
        ).hit_percent
        for kind, predictor in predictors_of(asked).items()
    }
    assert hits["followed"] > max(without.hit_percent, hits["frequent"]) + 3
    assert K > FOLLOWERS


def test_every_benchmark_prints_rows_of_the_documented_form(tmp_path: Path) -> None:
    ended = kvpool("bench", "prefetch", "--quick", "--directory", tmp_path, "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = ended.objects
    assert all(list(row) == KEYS and isinstance(row["value"], int | float) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    names = [benchmark.name for benchmark in benchmarks_of("prefetch")]
    assert list(dict.fromkeys(row["name"].split(".")[0] for row in rows)) == names
    assert list(tmp_path.iterdir()) == []

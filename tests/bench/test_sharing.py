"""The bench of sharing: its workloads are what they say, and what it counts is what the pool counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kvpool.bench.area import benchmarks_of
from kvpool.bench.engine.pools import BLOCK_TOKENS
from kvpool.bench.sharing.playing import play, registered, small_pool
from kvpool.bench.sharing.workloads import Request, Text, agent, chatbot, distinct_blocks, varied
from tests.bench.test_rows import KEYS
from tests.cli.command import kvpool

WORKLOADS = [chatbot, agent, varied]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_seed_gives_the_same_requests_and_another_one_others(workload: Callable[..., Iterator[Request]]) -> None:
    assert list(workload(50)) == list(workload(50))
    assert list(workload(50)) != list(workload(50, 99))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_a_request_calls_common_is_asked_for_again_by_others(workload: Callable[..., Iterator[Request]]) -> None:
    requests = list(workload(400))
    behind = [request for request in requests if request.common_tokens]
    heads = [request.prompt[: 4 * request.common_tokens] for request in behind]
    assert len(heads) > 100
    assert 2 <= len(set(heads)) < len(heads) / 2
    assert all(len(head) < len(request.prompt) for head, request in zip(heads, behind, strict=True))


@pytest.mark.parametrize("workload", [chatbot, agent])
def test_a_turn_goes_on_from_what_was_said_before(workload: Callable[..., Iterator[Request]]) -> None:
    turns = list(workload(60, at_once=1))
    follow = [later.prompt.startswith(turn.prompt + turn.answer) for turn, later in pairwise(turns)]
    assert sum(follow) > len(follow) / 2
    begun = [later for (_, later), goes_on in zip(pairwise(turns), follow, strict=True) if not goes_on]
    assert all(turn.common_tokens < len(turn.prompt) // 4 <= turn.common_tokens + 1_500 for turn in begun)


def test_the_working_set_counts_each_block_once() -> None:
    text = Text(1)
    head, one, other = text.of(2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS), text.of(70, 70), text.of(64, 64)
    requests = [Request(head + one, b"", 128), Request(head, other, 128), Request(head + one, other, 0)]
    assert distinct_blocks(requests, BLOCK_TOKENS) == 2 + 1 + 1 + 1


def test_what_is_played_is_what_the_pool_counts(tmp_path: Path) -> None:
    requests = list(chatbot(80))
    with small_pool(tmp_path, 4_096, sharing=True) as pool:
        played = play(registered(pool), requests)
        stats = pool.stats()
    assert (played.requests, played.asked, played.matched) == (80, stats.asked_blocks, stats.matched_blocks)
    assert played.asked == sum(len(request.prompt) // (4 * BLOCK_TOKENS) for request in requests)
    assert 0 < stats.shared_hit_blocks <= played.matched
    assert stats.stored_blocks == distinct_blocks(requests, BLOCK_TOKENS), "nothing had to go"
    assert stats.saved_prefill_seconds == pytest.approx(played.matched * BLOCK_TOKENS / 8_000)


def test_sharing_keeps_a_prefix_through_a_scan_that_evicts_it_without(tmp_path: Path) -> None:
    text = Text(4)
    head = text.of(640, 640)
    asked = [Request(head + text.of(64, 64), b"", 640) for _ in range(3)]
    scans = [Request(text.of(64, 64), b"", 0) for _ in range(100)]
    kept = {}
    for sharing in (True, False):
        with small_pool(tmp_path / str(sharing), 60, sharing=sharing) as pool:
            kept[sharing] = play(registered(pool), [*asked[:2], *scans, asked[2]]).common_matched
    assert kept == {True: 20, False: 10}


def test_every_benchmark_prints_rows_of_the_documented_form(tmp_path: Path) -> None:
    ended = kvpool("bench", "sharing", "--quick", "--directory", tmp_path, "--json")
    assert (ended.code, ended.err) == (0, "")
    rows = ended.objects
    assert all(list(row) == KEYS and isinstance(row["value"], int | float) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    names = [benchmark.name for benchmark in benchmarks_of("sharing")]
    assert list(dict.fromkeys(row["name"].split(".")[0] for row in rows)) == names
    assert list(tmp_path.iterdir()) == []

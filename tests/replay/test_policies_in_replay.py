"""What the policies reach on made-up traces, through the real index: rules, no figures."""

from __future__ import annotations

from array import array
from itertools import count
from random import Random

import pytest

from kvpool.policy import ADAPTIVE, LRU, Demand
from kvpool.policy import hindsight as hindsight_module
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import RAM
from kvpool.replay.index_replay import IndexReplay, play
from kvpool.replay.reference import offline_bound_hits
from kvpool.replay.synthetic import synthetic_trace
from kvpool.replay.trace import Trace

REQUESTS = 800


def with_scans(trace: Trace, *, every: int = 4, blocks: int = 100) -> Trace:
    """One-off prompts between the others."""
    fresh, mixed = count(1 << 29), []
    for at, request in enumerate(trace, 1):
        mixed.append(request)
        if at % every == 0:
            mixed.append(array("i", [next(fresh) for _ in range(blocks)]))
    return mixed


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("capacity", [200, 1_000])
def test_the_adaptive_policy_is_not_below_lru_where_there_is_nothing_to_learn(seed: int, capacity: int) -> None:
    trace = synthetic_trace(REQUESTS, seed=seed)
    assert play(trace, capacity, ADAPTIVE).hits >= 0.99 * play(trace, capacity, LRU).hits


def test_scans_cost_the_adaptive_policy_less_than_lru() -> None:
    trace = with_scans(synthetic_trace(REQUESTS, seed=1))
    assert play(trace, 1_000, ADAPTIVE).hits > 1.1 * play(trace, 1_000, LRU).hits


def test_the_index_stays_sound_under_the_adaptive_policy_and_the_same_trace_gives_the_same_hits() -> None:
    trace = with_scans(synthetic_trace(300, seed=3))
    replays = [IndexReplay(500, ADAPTIVE) for _ in range(2)]
    hits = [[replay.request(blocks) for blocks in trace] for replay in replays]
    check_integrity(replays[0].index)
    assert hits[0] == hits[1]
    assert sum(hits[0]) <= sum(offline_bound_hits(trace, 500))


@pytest.mark.parametrize("capacity", [200, 1_000])
def test_the_adaptive_policy_knows_what_lru_would_have_hit(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hindsight_module, "HALF_LIFE_BLOCKS", 1 << 40)  # else it is of late only
    trace = with_scans(synthetic_trace(REQUESTS, seed=4))
    replay = IndexReplay(capacity, ADAPTIVE)
    asked = sum(len(blocks) for blocks in trace)
    for blocks in trace:
        replay.request(blocks)
    (account,) = replay.index.ledger.accounts.values()
    assert isinstance(account.learner, Demand)
    lru = play(trace, capacity, LRU).hits / asked
    assert account.learner.hindsight.would_hit(RAM)[0] == pytest.approx(lru, abs=0.01)


def test_where_prompts_are_of_unequal_fame_the_famous_are_kept() -> None:
    random = Random(1)
    prompts = [array("i", range(first, first + 10)) for first in range(0, 10_000, 10)]
    fame = [1 / rank for rank in range(1, len(prompts) + 1)]
    trace = random.choices(prompts, fame, k=4_000)
    lru, adaptive = play(trace, 500, LRU), play(trace, 500, ADAPTIVE)
    assert adaptive.hits > 1.2 * lru.hits


@pytest.mark.parametrize("capacity", [200, 1_000])
def test_where_fame_fades_the_adaptive_policy_lets_go_of_the_famous_of_the_past(capacity: int) -> None:
    random = Random(2)
    trace: list[array[int]] = []
    for first in range(0, 60_000, 10_000):
        prompts = [array("i", range(at, at + 10)) for at in range(first, first + 2_000, 10)]
        trace += random.choices(prompts, [1 / rank for rank in range(1, len(prompts) + 1)], k=600)
    assert play(trace, capacity, ADAPTIVE).hits >= 0.99 * play(trace, capacity, LRU).hits

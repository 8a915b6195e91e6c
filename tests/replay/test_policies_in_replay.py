"""What the policies reach on made-up traces, through the real index: rules, no figures."""

from __future__ import annotations

from array import array
from itertools import count

import pytest

from kvpool.policy import HIT_DENSITY, LRU, Demand
from kvpool.prefix.integrity import check_integrity
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
def test_hit_density_is_not_below_lru_where_there_is_nothing_to_learn(seed: int, capacity: int) -> None:
    trace = synthetic_trace(REQUESTS, seed=seed)
    assert play(trace, capacity, HIT_DENSITY).hits >= 0.99 * play(trace, capacity, LRU).hits


def test_scans_cost_hit_density_less_than_lru() -> None:
    trace = with_scans(synthetic_trace(REQUESTS, seed=1))
    assert play(trace, 1_000, HIT_DENSITY).hits > 1.1 * play(trace, 1_000, LRU).hits


def test_the_index_stays_sound_under_hit_density_and_the_same_trace_gives_the_same_hits() -> None:
    trace = with_scans(synthetic_trace(300, seed=3))
    replays = [IndexReplay(500, HIT_DENSITY) for _ in range(2)]
    hits = [[replay.request(blocks) for blocks in trace] for replay in replays]
    check_integrity(replays[0].index)
    assert hits[0] == hits[1]
    assert sum(hits[0]) <= sum(offline_bound_hits(trace, 500))


@pytest.mark.parametrize("capacity", [200, 1_000])
def test_hit_density_knows_what_lru_would_have_hit(capacity: int) -> None:
    trace = with_scans(synthetic_trace(REQUESTS, seed=4))
    replay = IndexReplay(capacity, HIT_DENSITY)
    hits, asked = sum(map(replay.request, trace)), sum(map(len, trace))
    (account,) = replay.index.ledger.accounts.values()
    assert isinstance(account.learner, Demand)
    gain = (hits - play(trace, capacity, LRU).hits) / asked
    assert account.learner.gain == pytest.approx(gain, abs=0.005)

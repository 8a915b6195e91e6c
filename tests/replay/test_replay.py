"""Replay against an exact LRU, the offline bound against every possible choice, on small random traces."""

from __future__ import annotations

from array import array
from functools import cache

import hypothesis.strategies as st
from hypothesis import given, settings

from kvpool.policy import LRU
from kvpool.prefix.integrity import check_integrity
from kvpool.replay.index_replay import IndexReplay, play
from kvpool.replay.reference import exact_lru_hits, offline_bound_hits, timed
from kvpool.replay.synthetic import synthetic_trace
from kvpool.replay.trace import BlockNumbers, Trace

Ids = list[list[int]]


def numbered(ids: Ids) -> Trace:
    numbers = BlockNumbers()
    return [numbers.number(request) for request in ids]


def small_traces(*, requests: int, blocks: int, ids: int) -> st.SearchStrategy[Trace]:
    request = st.lists(st.integers(0, ids - 1), max_size=blocks)
    return st.lists(request, max_size=requests).map(numbered)


@settings(max_examples=300, deadline=None)
@given(trace=small_traces(requests=60, blocks=6, ids=3), capacity=st.integers(1, 30))
def test_the_index_with_lru_hits_exactly_what_an_exact_lru_hits(trace: Trace, capacity: int) -> None:
    replay = IndexReplay(capacity, LRU)
    hits = [replay.request(blocks) for blocks in trace]
    check_integrity(replay.index)
    assert hits == exact_lru_hits(trace, capacity)


def test_prompts_longer_than_a_batch_and_than_the_capacity_hit_what_an_exact_lru_hits() -> None:
    trace = [array("i", range(70)), array("i", range(100, 250)), array("i", range(70)), array("i", range(90))]
    for capacity in (1, 31, 32, 33, 64, 65, 100, 400):
        replay = IndexReplay(capacity, LRU)
        assert [replay.request(blocks) for blocks in trace] == exact_lru_hits(trace, capacity)


def test_a_recorded_length_trace_hits_what_an_exact_lru_hits_at_every_capacity() -> None:
    trace = synthetic_trace(600, seed=5)
    for capacity in (50, 300, 2_000):
        assert play(trace, capacity, LRU).hits == sum(exact_lru_hits(trace, capacity))


@settings(max_examples=150, deadline=None)
@given(trace=small_traces(requests=6, blocks=3, ids=2), capacity=st.integers(1, 3))
def test_no_choice_of_victims_hits_more_than_the_offline_bound(trace: Trace, capacity: int) -> None:
    assert sum(offline_bound_hits(trace, capacity)) == most_hits(trace, capacity)


@settings(max_examples=100, deadline=None)
@given(trace=small_traces(requests=40, blocks=6, ids=3), capacity=st.integers(1, 20))
def test_the_offline_bound_is_never_below_lru(trace: Trace, capacity: int) -> None:
    assert sum(offline_bound_hits(trace, capacity)) >= sum(exact_lru_hits(trace, capacity))


def test_an_outcome_counts_requests_blocks_and_hits() -> None:
    outcome = timed(exact_lru_hits, numbered([[1, 2], [1, 2, 3], []]), 10)
    assert (outcome.requests, outcome.blocks, outcome.hits) == (3, 5, 2)
    assert outcome.hit_percent == 40.0


def most_hits(trace: Trace, capacity: int) -> int:
    """The most hits of all ways to keep, after each request, some of what was held or asked for: by trying them all."""
    parents = {block: blocks[at - 1] if at else None for blocks in trace for at, block in enumerate(blocks)}

    def is_closed(kept: frozenset[int]) -> bool:
        return all((parent := parents[block]) is None or parent in kept for block in kept)

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        blocks = trace[at]
        hits = next((i for i, block in enumerate(blocks) if block not in held), len(blocks))
        choices = (kept for kept in subsets(held | set(blocks)) if len(kept) <= capacity and is_closed(kept))
        return hits + max(best(at + 1, kept) for kept in choices)

    return best(0, frozenset())


def subsets(blocks: frozenset[int]) -> list[frozenset[int]]:
    found: list[frozenset[int]] = [frozenset()]
    for block in blocks:
        found += [subset | {block} for subset in found]
    return found

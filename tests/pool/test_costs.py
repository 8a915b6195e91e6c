"""Costs of tiers: what was measured is found again, and a tier slower than recomputing is not asked."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.pool.costs import PROBE_INTERVAL_S, TierCosts
from tests.clock import Clock

MIB = 1 << 20
observations = st.lists(st.tuples(st.integers(1, 1 << 32), st.floats(1e-6, 100)), min_size=1, max_size=30)


def measured(observed: list[tuple[int, float]], clock: Clock | None = None) -> TierCosts:
    costs = TierCosts(clock or Clock())
    for nbytes, seconds in observed:
        costs.observe(nbytes, seconds)
    return costs


def test_latency_and_bandwidth_of_a_tier_are_found() -> None:
    costs = measured([(size * MIB, 0.002 + size * MIB / 1e9) for size in (1, 2, 4, 8, 16, 1, 3)])
    assert costs.latency_s == pytest.approx(0.002, rel=1e-3)
    assert costs.bandwidth_bytes_per_s == pytest.approx(1e9, rel=1e-3)
    assert costs.expected_seconds(100 * MIB) == pytest.approx(0.002 + 100 * MIB / 1e9, rel=1e-3)


def test_reads_of_one_size_are_expected_to_take_as_long_again() -> None:
    costs = measured([(2 * MIB, 0.004)] * 10)
    assert costs.expected_seconds(2 * MIB) == pytest.approx(0.004)
    assert costs.expected_seconds(4 * MIB) == pytest.approx(0.008)


def test_a_tier_whose_time_does_not_depend_on_size_is_all_latency() -> None:
    costs = measured([(MIB, 0.5), (8 * MIB, 0.5), (MIB, 0.5)])
    assert costs.expected_seconds(64 * MIB) == pytest.approx(0.5)
    assert costs.bandwidth_bytes_per_s == math.inf or costs.latency_s == pytest.approx(0.5)


def test_nothing_is_expected_of_a_tier_that_was_not_measured() -> None:
    costs = measured([(0, 1.0), (MIB, 0.0)])
    assert costs.expected_seconds(MIB) is None
    assert costs.latency_s is None
    assert costs.bandwidth_bytes_per_s is None


def test_what_is_not_measured_is_asked() -> None:
    assert measured([]).worth_asking(1 << 40, 1, 1e9)
    assert measured([(1, 100.0)]).worth_asking(1 << 40, 1, None)


def test_a_tier_slower_than_recomputing_is_not_asked_and_a_faster_one_is() -> None:
    costs = measured([(MIB, 0.1)])
    assert not costs.worth_asking(10 * MIB, tokens=640, prefill_tokens_per_second=1000)
    assert costs.worth_asking(10 * MIB, tokens=640, prefill_tokens_per_second=500)


def test_a_skipped_tier_is_probed_every_ten_seconds_and_once_each_time() -> None:
    clock = Clock()
    costs = measured([(MIB, 10.0)], clock)
    answers = []
    for _ in range(25):
        answers.append(costs.worth_asking(MIB, 64, 1000))
        clock.now_s += 1.0
    assert [second for second, asked in enumerate(answers) if asked] == [10, 20]


def test_a_probe_is_counted_from_the_last_read() -> None:
    clock = Clock()
    costs = measured([(MIB, 10.0)], clock)
    clock.now_s += PROBE_INTERVAL_S - 1
    costs.observe(MIB, 10.0)
    clock.now_s += PROBE_INTERVAL_S - 1
    assert not costs.worth_asking(MIB, 64, 1000)


def test_a_tier_that_got_faster_is_asked_again_after_a_few_probes() -> None:
    clock = Clock()
    costs = measured([(MIB, 0.2)] * 100, clock)
    probes = 0
    while not costs.worth_asking(MIB, 64, 1000) or probes == 0:
        clock.now_s += PROBE_INTERVAL_S
        assert costs.worth_asking(MIB, 64, 1000)
        costs.observe(MIB, 0.001)
        probes += 1
    assert probes <= 8


@given(observations, st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_more_bytes_are_never_expected_sooner(observed: list[tuple[int, float]], one: int, other: int) -> None:
    costs = measured(observed)
    few, many = costs.expected_seconds(min(one, other)), costs.expected_seconds(max(one, other))
    assert few is not None
    assert many is not None
    assert 0 <= few <= many < math.inf


@given(observations, st.integers(1, 1 << 40), st.integers(1, 10**6), st.floats(1e-3, 1e9), st.floats(1, 1e6))
def test_a_faster_prefill_never_turns_skip_into_ask(
    observed: list[tuple[int, float]], nbytes: int, tokens: int, rate: float, factor: float
) -> None:
    slower = measured(observed).worth_asking(nbytes, tokens, rate)
    faster = measured(observed).worth_asking(nbytes, tokens, rate * factor)
    assert slower or not faster


@given(observations, st.integers(1, 1 << 40), st.integers(1, 10**6), st.integers(0, 10**6), st.floats(1e-3, 1e9))
def test_more_tokens_for_the_same_bytes_never_turn_ask_into_skip(
    observed: list[tuple[int, float]], nbytes: int, tokens: int, more: int, rate: float
) -> None:
    few = measured(observed).worth_asking(nbytes, tokens, rate)
    assert measured(observed).worth_asking(nbytes, tokens + more, rate) or not few


@given(st.floats(1e-6, 1), st.floats(1e3, 1e11), st.lists(st.integers(1, 1 << 36), min_size=2, max_size=30))
def test_any_straight_line_is_expected_at_the_sizes_that_were_read(
    latency_s: float, bandwidth: float, sizes: list[int]
) -> None:
    costs = measured([(size, latency_s + size / bandwidth) for size in sizes])
    mean = sum(sizes) / len(sizes)
    if sum((size - mean) ** 2 for size in sizes) / len(sizes) > 1e-2 * mean * mean:
        for size in sizes:
            expected = costs.expected_seconds(size)
            assert expected == pytest.approx(latency_s + size / bandwidth, rel=1e-2, abs=1e-6)

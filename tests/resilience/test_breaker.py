"""Circuit breakers: a tier that fails costs its deadline once, and comes back by itself."""

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.resilience import BreakerLimits, BreakerState, CircuitBreaker, Degradation, mode
from tests.clock import Clock


class LongestJitter(random.Random):
    """Always the ceiling, so that a test can tell when the breaker lets a probe through."""

    def uniform(self, a: float, b: float) -> float:
        return b


def breaker(clock: Clock, **limits: float) -> CircuitBreaker:
    return CircuitBreaker(BreakerLimits(**limits), clock=clock, rng=LongestJitter())  # type: ignore[arg-type]


def test_a_new_breaker_lets_calls_through() -> None:
    fresh = breaker(Clock())
    assert fresh.allows()
    assert (fresh.state, fresh.last_error, fresh.opened_total) == (BreakerState.CLOSED, None, 0)


def test_a_timeout_opens_it_at_once() -> None:
    tripped = breaker(Clock())
    tripped.trip("no progress in 0.1 s")
    assert not tripped.allows()
    assert (tripped.state, tripped.last_error, tripped.opened_total) == (BreakerState.OPEN, "no progress in 0.1 s", 1)


def test_so_many_failures_in_a_row_open_it_and_a_success_between_them_does_not_count() -> None:
    tested = breaker(Clock(), failures=3)
    for outcome in ("fail", "fail", "succeed", "fail", "fail"):
        tested.succeeded() if outcome == "succeed" else tested.failed("refused")
    assert tested.allows()
    tested.failed("refused")
    assert not tested.allows()


def test_a_share_of_bad_calls_within_the_window_opens_it() -> None:
    tested = breaker(Clock(), failures=100, window_calls=10, bad_ratio=0.5)
    for _ in range(4):
        tested.succeeded()
        tested.failed("refused")
    tested.succeeded()
    assert tested.allows()
    tested.failed("refused")
    assert not tested.allows()


def test_slow_calls_count_as_bad_ones() -> None:
    tested = breaker(Clock(), window_calls=4, slow_s=0.1)
    for _ in range(4):
        tested.succeeded(seconds=0.2)
    assert not tested.allows()
    assert tested.last_error == "a call took 0.2 s"


def test_bad_calls_of_long_ago_do_not_count() -> None:
    clock = Clock()
    tested = breaker(clock, failures=100, window_calls=10, window_s=30)
    for _ in range(20):
        tested.failed("refused")
        clock.now_s += 10
    assert tested.allows()


def test_after_its_backoff_one_probe_goes_through_and_closes_it() -> None:
    clock = Clock()
    tested = breaker(clock)
    tested.trip("timeout")
    clock.now_s += 0.99
    assert not tested.allows()
    clock.now_s += 0.02
    assert tested.allows()
    assert tested.state is BreakerState.HALF_OPEN
    assert not tested.allows()
    tested.succeeded()
    assert (tested.state, tested.last_error) == (BreakerState.CLOSED, "timeout")
    assert tested.allows()


def test_the_backoff_doubles_from_one_second_to_sixty_and_starts_again_after_a_success() -> None:
    clock = Clock()
    tested = breaker(clock)
    tested.trip("timeout")
    assert [backoff(tested, clock) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    clock.now_s += 60
    assert tested.allows()
    tested.succeeded()
    tested.trip("timeout")
    assert backoff(tested, clock) == 1
    assert tested.opened_total == 2


def backoff(tested: CircuitBreaker, clock: Clock) -> int:
    """Whole seconds until a probe goes through, which fails."""
    for seconds in range(1, 100):
        clock.now_s += 1
        if tested.allows():
            tested.failed("still away")
            return seconds
    raise AssertionError("no probe within 100 s")


def test_a_probe_that_is_never_reported_is_given_up() -> None:
    clock = Clock()
    tested = breaker(clock)
    tested.trip("timeout")
    clock.now_s += 1
    assert tested.allows()
    clock.now_s += 59
    assert not tested.allows()
    clock.now_s += 1
    assert tested.allows()


def test_late_reports_of_older_calls_neither_close_an_open_breaker_nor_lengthen_its_backoff() -> None:
    clock = Clock()
    tested = breaker(clock)
    tested.trip("timeout")
    tested.succeeded()
    for _ in range(10):
        tested.failed("late")
        tested.trip("late")
    assert tested.state is BreakerState.OPEN
    assert (tested.opened_total, tested.last_error) == (1, "late")
    clock.now_s += 1
    assert tested.allows()


def test_failures_before_it_closed_do_not_count_afterwards() -> None:
    clock = Clock()
    tested = breaker(clock, failures=3)
    for _ in range(3):
        tested.failed("refused")
    clock.now_s += 1
    assert tested.allows()
    tested.succeeded()
    tested.failed("refused")
    tested.failed("refused")
    assert tested.allows()


def test_jitter_is_spread_over_the_whole_backoff() -> None:
    clock = Clock()
    waits = []
    for seed in range(200):
        tested = CircuitBreaker(clock=clock, rng=random.Random(seed))
        tested.trip("timeout")
        started = clock.now_s
        while not tested.allows():
            clock.now_s += 0.01
        waits.append(clock.now_s - started)
    assert min(waits) < 0.1
    assert 0.9 < max(waits) <= 1.02


def test_of_many_threads_one_gets_the_probe() -> None:
    clock = Clock()
    tested = breaker(clock)
    tested.trip("timeout")
    clock.now_s += 1
    start = threading.Barrier(8)
    answers: list[bool] = []

    def ask() -> None:
        start.wait()
        answers.append(tested.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(True) == 1


@given(st.lists(st.sampled_from(["fail", "succeed", "slow", "trip", "second", "minute"]), max_size=200), st.integers())
@settings(max_examples=200)
def test_whatever_happened_it_closes_by_itself_once_the_tier_answers(events: list[str], seed: int) -> None:
    clock = Clock()
    tested = CircuitBreaker(BreakerLimits(slow_s=0.1), clock=clock, rng=random.Random(seed))
    for event in events:
        clock.now_s += {"second": 1, "minute": 60}.get(event, 0)
        if tested.allows():
            {"fail": lambda: tested.failed("x"), "trip": lambda: tested.trip("x")}.get(
                event, lambda slow=event == "slow": tested.succeeded(1.0 if slow else 0.0)
            )()
    clock.now_s += 60
    assert tested.allows()
    tested.succeeded()
    assert tested.state is BreakerState.CLOSED


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (set(), "normal"),
        ({Degradation.NO_SSD}, "no-ssd"),
        ({Degradation.NO_SSD, Degradation.NO_GPU}, "no-gpu+no-ssd"),
        ({Degradation.NO_SSD, Degradation.NO_DRAGONFLY}, "no-dragonfly+no-ssd"),
        ({Degradation.NO_SSD, Degradation.NO_DRAGONFLY, Degradation.NO_POSTGRES}, "memory-only"),
        (set(Degradation), "memory-only"),
    ],
)
def test_the_mode_is_the_set_of_what_is_out(out: set[Degradation], expected: str) -> None:
    assert mode(out) == expected

"""The policies as pure objects: what they hold, what they give back, and what they remember."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvpool.policy import POLICIES, Demand, HitDensityPolicy
from kvpool.policy import demand as demand_module
from kvpool.policy import lru_window as lru_window_module
from kvpool.policy import remembered as remembered_module
from kvpool.policy.demand import KEY_BYTES, best_density
from kvpool.policy.lru_window import LruWindow
from kvpool.prefix.candidates import EvictionPolicy

FRESH = Demand().entered(bytes(2 * KEY_BYTES), 0, 0)[0]


def made(name: str) -> EvictionPolicy:
    choice = POLICIES[name]
    return choice.make_policy() if choice.make_learner is None else choice.make_policy(choice.make_learner())


steps = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "withdraw", "take"]),
        st.integers(0, 9),
        st.integers(1, 60),
        st.sampled_from([FRESH, FRESH + 1, FRESH + 8]),
    ),
    max_size=80,
)


@pytest.mark.parametrize("name", POLICIES)
@given(steps=steps)
def test_what_is_on_offer_is_taken_once_at_the_age_of_its_last_offer(
    name: str, steps: list[tuple[str, int, int, int]]
) -> None:
    policy, expected = made(name), dict[object, int]()
    for action, candidate, age, trait in steps:
        if action == "offer":
            policy.offer(candidate, age, trait)
            expected[candidate] = age
        elif action == "withdraw":
            policy.withdraw(candidate)
            expected.pop(candidate, None)
        else:
            taken = policy.take()
            assert (taken is None) == (not expected)
            if taken is not None:
                assert expected.pop(taken[0]) == taken[1]
        assert len(policy) == len(expected)
        assert policy.next_age() == min(expected.values(), default=None)
        assert all(policy.offered_at(held) == expected.get(held) for held in range(10))


@given(ages=st.lists(st.integers(1, 1_000), max_size=30))
def test_where_nothing_is_known_the_one_used_longest_ago_goes(ages: list[int]) -> None:
    policy = HitDensityPolicy(Demand())
    for candidate, age in enumerate(ages):
        policy.offer(candidate, age, FRESH)
    assert [policy.take() for _ in ages] == sorted(((at, age) for at, age in enumerate(ages)), key=lambda one: one[1])


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_module, "MOST_REMEMBERED", 2_000)
    monkeypatch.setattr(remembered_module, "LEAST_REMEMBERED", 500)
    demand = Demand()
    demand.entered(bytes(KEY_BYTES) * 60_000, 0, 1)
    for first in range(0, 50_000, 10):
        demand.lost(list(map(key, range(first, first + 10))), FRESH, 1)
        assert demand.remembered <= 4_020
    assert demand.remembered >= 2_000


def test_an_evicted_block_that_returns_has_its_uses_again() -> None:
    demand = Demand()
    first = demand.entered(key(1) + key(2), 0, 1)
    demand.lost([key(1)], first[0], 1)
    again = demand.entered(key(1) + key(2), 0, 9)
    assert again[0] == first[:1].translate(Demand.step)[0]
    assert again[1] == first[1]
    assert demand.remembered == 0


def test_a_block_is_the_last_of_its_prompt_until_another_follows() -> None:
    demand = Demand()
    traits = demand.entered(key(1) + key(2), 0, 1)
    assert traits[0] != traits[1]
    assert demand.extended(traits) == traits[:1] * 2


@given(hazards=st.lists(st.floats(0, 0.95), min_size=demand_module.BINS, max_size=demand_module.BINS))
def test_the_best_density_is_that_of_the_best_time_to_stop(hazards: list[float]) -> None:
    lengths = demand_module._LENGTH
    for first, density in enumerate(best_density(hazards)):
        hits, time, surviving, best = 0.0, 0.0, 1.0, 0.0
        for at in range(first, demand_module.BINS):
            hits += surviving * hazards[at]
            time += surviving * (lengths[at] or 1.0) * (1 - hazards[at] / 2)
            surviving *= 1 - hazards[at]
            best = max(best, hits / time)
        assert density == pytest.approx(best, rel=1e-6, abs=1e-12)


@given(uses=st.lists(st.integers(0, 30), min_size=1, max_size=200), held=st.integers(1, 20))
def test_the_window_holds_what_an_lru_of_the_same_size_holds(uses: list[int], held: int) -> None:
    window, used_at = LruWindow(), dict[int, int]()
    for now, block in enumerate(uses, 1):
        before = used_at.pop(block, 0)
        kept = before > 0 and sum(use > before for use in used_at.values()) < held
        assert window.use(1, before, now) == kept
        window.enter(min(1, held - window.held), 0, now)
        used_at[block] = now


def test_times_that_the_window_keeps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_window_module, "MOST_TIMES", 50)
    window = LruWindow()
    for now in range(2, 500):
        window.use(1, now - 1, now)  # was dated unseen meanwhile
        window.enter(1, 1, now)
        assert len(window._used_at) <= 51


def test_where_lru_would_have_hit_more_its_order_is_kept_to_until_another_trial() -> None:
    demand, trust = Demand(), list[float]()
    for now in range(1, 2 + 2 * demand_module.BARRED_REQUESTS):
        wanted_again = now < 10  # what is asked for next goes, though an LRU would have held it
        keys = [key(number if wanted_again else 100 * now + number) for number in range(100)]
        demand.now = now
        traits = demand.entered(b"".join(keys), 0, now)
        demand.asked()
        demand.refresh()
        trust.append(demand.clearly_less)
        demand.lost(keys, traits[0], now + 1)
    assert demand.gain < 0
    assert not any(trust[10 : demand_module.BARRED_REQUESTS])
    assert trust[-1] > 0

"""The policies as pure objects: what they hold, what they give back, and what they remember."""

from __future__ import annotations

from threading import Lock

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvpool.blocks.identity import KEY_BYTES
from kvpool.policy import POLICIES, AdaptivePolicy, Demand
from kvpool.policy import remembered as remembered_module
from kvpool.policy.demand import MOST_EVENTS
from kvpool.policy.hindsight import HEAD_STARTS, STRETCHES, Hindsight
from kvpool.policy.traits import CLASS_OF, LAST, STEP
from kvpool.prefix.candidates import EvictionPolicy
from kvpool.prefix.node import LEVELS, RAM

FRESH = 1


def made(name: str) -> EvictionPolicy:
    choice = POLICIES[name]
    if choice.make_learner is None:
        return choice.make_policy()
    return choice.make_policy(choice.make_learner([0, 0, 0]), RAM)


def demand_of(copies: int) -> Demand:
    return Demand([0, copies, 0])


steps = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "withdraw", "take"]),
        st.integers(0, 9),
        st.integers(1, 60),
        st.sampled_from([FRESH, FRESH + 1, LAST]),
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
        assert policy.next_date() == min(expected.values(), default=None)
        assert all(policy.offered_at(held) == expected.get(held) for held in range(10))


@given(
    offers=st.lists(st.tuples(st.integers(1, 1_000), st.integers(1, LAST)), max_size=30),
    stretch=st.sampled_from([0, 4, 64, 1_024]),
)
def test_the_one_used_longest_ago_goes_where_its_uses_do_not_give_it_a_later_date(
    offers: list[tuple[int, int]], stretch: int
) -> None:
    demand = demand_of(len(offers))
    demand.hindsight.head_starts[RAM] = [round(head_start * stretch) for head_start in HEAD_STARTS]
    policy, dates = AdaptivePolicy(demand, RAM), list[int]()
    for candidate, (age, trait) in enumerate(offers):
        policy.offer(candidate, age, trait)
        dates.append(policy.date(age, trait))
        assert dates[-1] == age + demand.hindsight.head_starts[RAM][CLASS_OF[trait]]
    for _ in offers:
        assert policy.next_date() == min(dates)
        taken = policy.take()
        assert taken is not None
        at = taken[0]
        assert isinstance(at, int)
        assert dates[at] == min(dates)
        dates[at] = 1 << 40


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_module, "MOST_REMEMBERED", 2_000)
    monkeypatch.setattr(remembered_module, "LEAST_REMEMBERED", 500)
    demand = demand_of(60_000)
    demand.entered(bytes(KEY_BYTES) * 60_000, 0, 1)
    for first in range(0, 50_000, 10):
        demand.lost(list(map(key, range(first, first + 10))), FRESH, 1)
        assert demand.remembered <= 4_020
    assert demand.remembered >= 2_000


def test_an_evicted_block_that_returns_has_its_uses_again() -> None:
    demand = demand_of(2)
    first = demand.entered(key(1) + key(2), 0, 1)
    demand.lost([key(1)], first[0], 1)
    again = demand.entered(key(1) + key(2), 0, 9)
    assert again[0] == first[:1].translate(Demand.step)[0]
    assert again[1] == first[1]
    assert demand.remembered == 0


def test_a_block_is_the_last_of_its_prompt_until_another_follows() -> None:
    demand = demand_of(2)
    traits = demand.entered(key(1) + key(2), 0, 1)
    assert traits[0] != traits[1]
    assert demand.extended(traits) == traits[:1] * 2


@given(
    uses=st.lists(st.integers(0, 30), min_size=1, max_size=200),
    held=st.integers(1, 20),
    stretch=st.integers(0, len(STRETCHES) - 1),
)
def test_what_a_stretch_would_hit_is_what_is_among_the_latest_dates(uses: list[int], held: int, stretch: int) -> None:
    hindsight = Hindsight(len(LEVELS))
    known, hits = dict[int, tuple[int, int]](), 0

    def date(block: int) -> float:
        time, trait = known[block]
        return float(time + HEAD_STARTS[CLASS_OF[trait]] * STRETCHES[stretch])

    for now, block in enumerate(uses, 1):
        time, trait = known.get(block, (0, LAST))
        if time:
            hits += sum(date(other) >= date(block) for other in known) <= held
        hindsight.digest([(bytes([trait]), time, now)], now, [0, held, 0], len(known))
        known[block] = (now, STEP[trait] if time else trait)
    ties = len(uses) - len({date(block) for block in known})
    assert hindsight.would_hit(RAM)[stretch] * len(uses) == pytest.approx(hits, abs=1 + ties)


def test_blocks_that_were_erased_are_held_by_no_stretch() -> None:
    hindsight = Hindsight(len(LEVELS))
    hindsight.digest(
        [(bytes([FRESH]) * 10, 0, 1), (bytes([FRESH]), 0, 2), (bytes([FRESH]) * 10, 0, 3)], 3, [0, 12, 0], 21
    )
    hindsight.digest([(bytes([FRESH]) * 10, 3, 0)], 4, [0, 11, 0], 11)
    hindsight.digest([(bytes([FRESH]) * 10, 1, 5)], 5, [0, 11, 0], 11)
    assert hindsight.would_hit(RAM)[0] * 31 == pytest.approx(10), "LRU would hold what was used before what was erased"


def test_events_that_nobody_digests_are_asked_for() -> None:
    demand, lock, overdue = demand_of(200), Lock(), 0
    demand.entered(bytes(KEY_BYTES) * 10, 0, 1)
    for now in range(2, 5 * MOST_EVENTS):
        overdue += demand.asked([(bytes([FRESH]) * 10, now - 1, now)], 10, now)
    assert overdue == 4
    while demand.due:
        demand.learn(lock)
        demand.asked([], 0, now)
    assert not any(demand.asked([(bytes([FRESH]) * 10, now, now)], 10, now) for _ in range(MOST_EVENTS // 2))


def test_only_what_was_due_is_digested_and_only_once() -> None:
    demand, lock = demand_of(200), Lock()
    demand.entered(bytes(KEY_BYTES) * 150, 0, 1)
    demand.learn(lock)
    assert demand.hindsight.asked == 0, "no request has ended"
    demand.asked([], 0, 2)
    demand.entered(bytes(KEY_BYTES) * 7, 150, 1)
    assert demand.due
    for _ in range(2):
        demand.learn(lock)
        assert not demand.due
        assert demand.hindsight.asked == 150

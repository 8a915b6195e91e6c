"""What is out: all 32 combinations of the five, and every way from one to another."""

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.resilience import Degradation, Degradations, mode
from kvpool.resilience.degradation import REMEMBERED_CHANGES

PARTS = list(Degradation)
COMBINATIONS = list(chain.from_iterable(combinations(PARTS, count) for count in range(len(PARTS) + 1)))
BELOW_MEMORY = {Degradation.NO_DRAGONFLY, Degradation.NO_POSTGRES, Degradation.NO_SSD}


@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: "+".join(parts) or "none")
def test_each_combination_has_a_mode_that_names_it(parts: tuple[Degradation, ...]) -> None:
    if set(parts) >= BELOW_MEMORY:
        assert mode(parts) == "memory-only"
    else:
        assert set(mode(parts).split("+")) == (set(map(str, parts)) or {"normal"})


@pytest.mark.parametrize("before", COMBINATIONS, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("after", COMBINATIONS, ids=lambda parts: "+".join(parts) or "none")
def test_from_each_combination_every_other_is_reached_by_the_changes_that_differ(
    before: tuple[Degradation, ...], after: tuple[Degradation, ...]
) -> None:
    machine = Degradations()
    machine.observe(dict.fromkeys(before, "first"), 1.0)
    changes = machine.observe(dict.fromkeys(after, "then"), 2.0)
    assert {change.part for change in changes} == set(before) ^ set(after)
    assert all(change.is_out == (change.part in after) and change.at_s == 2.0 for change in changes)
    assert set(machine.state) == set(after)
    assert machine.mode == mode(after)


def test_a_part_is_out_since_it_fell_out_first_and_says_the_latest_reason() -> None:
    machine = Degradations()
    assert machine.out(Degradation.NO_SSD, "full", 10.0)
    assert not machine.out(Degradation.NO_SSD, "read-only", 20.0)
    assert machine.state[Degradation.NO_SSD][:1] == (10.0,)
    assert machine.state[Degradation.NO_SSD].reason == "read-only"


def test_a_state_that_was_handed_out_does_not_change() -> None:
    machine = Degradations()
    machine.out(Degradation.NO_GPU, "absent", 1.0)
    seen = machine.state
    machine.back(Degradation.NO_GPU, 2.0)
    assert set(seen) == {Degradation.NO_GPU}


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.booleans()), max_size=60))
def test_the_state_is_what_the_last_event_of_each_part_says(events: list[tuple[Degradation, bool]]) -> None:
    machine = Degradations()
    last = dict.fromkeys(PARTS, False)
    told = 0
    for at_s, (part, is_out) in enumerate(events):
        changed = machine.out(part, "", float(at_s)) if is_out else machine.back(part, float(at_s))
        assert changed == (last[part] != is_out)
        told += changed
        last[part] = is_out
    assert set(machine.state) == {part for part, is_out in last.items() if is_out}
    assert len(machine.changes) == told


def test_only_so_many_changes_are_remembered() -> None:
    machine = Degradations()
    for at_s in range(REMEMBERED_CHANGES):
        machine.out(Degradation.NO_QDRANT, "", float(at_s))
        machine.back(Degradation.NO_QDRANT, float(at_s))
    assert len(machine.changes) == REMEMBERED_CHANGES

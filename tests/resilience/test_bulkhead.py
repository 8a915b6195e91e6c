"""What is in flight to a tier is bounded, in bytes."""

from hypothesis import given
from hypothesis import strategies as st

from kvpool.resilience import Bulkhead


def test_who_finds_no_room_goes_without_and_is_counted() -> None:
    bulkhead = Bulkhead(10)
    assert bulkhead.enter(8)
    assert not bulkhead.enter(3)
    assert bulkhead.refused_total == 1
    bulkhead.leave(8)
    assert bulkhead.enter(3)


def test_what_is_larger_than_all_of_it_enters_alone() -> None:
    bulkhead = Bulkhead(10)
    assert bulkhead.enter(100)
    assert not bulkhead.enter(1)
    bulkhead.leave(100)
    assert bulkhead.in_flight_bytes == 0


@given(st.lists(st.integers(1, 20), max_size=40))
def test_several_are_never_in_flight_above_the_limit(sizes: list[int]) -> None:
    bulkhead = Bulkhead(30)
    inside: list[int] = []
    for nbytes in sizes:
        if bulkhead.enter(nbytes):
            inside.append(nbytes)
        elif inside:
            bulkhead.leave(inside.pop(0))
        assert bulkhead.in_flight_bytes == sum(inside)
        assert len(inside) <= 1 or sum(inside) <= 30

"""A block that moves within RAM while others evict, lease and split."""

from __future__ import annotations

from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import RAM, SSD
from kvpool.prefix.relocating import hold, release, settle
from tests.prefix.small import PLACES, RECORD_BYTES, make_index, make_tree, store, stored, tokens


def ram_index() -> PrefixIndex:
    return make_index(region_of={RAM: lambda place: place // 8, SSD: lambda place: place // 64})


def test_a_block_that_is_about_to_move_is_not_evicted() -> None:
    index = ram_index()
    tree = make_tree(index)
    pin = store(index, tree, "ab")
    first, second = index.places(pin, RAM)
    index.unpin(pin)
    held = hold(index, RAM, second)
    assert held is not None
    assert index.evict(RAM, 10 * RECORD_BYTES) == []
    (new,) = PLACES.take(1)
    assert settle(index, held, new)
    pin = index.match(tree, tokens("ab"))
    assert index.places(pin, RAM) == [first, new]
    check_integrity(index, [pin])


def test_a_leased_block_does_not_begin_to_move() -> None:
    index = ram_index()
    tree = make_tree(index)
    pin = store(index, tree, "ab")
    assert hold(index, RAM, index.places(pin, RAM)[0]) is None


def test_a_block_that_was_leased_meanwhile_stays_where_it_is() -> None:
    index = ram_index()
    tree = make_tree(index)
    pin = store(index, tree, "a")
    (old,) = index.places(pin, RAM)
    index.unpin(pin)
    held = hold(index, RAM, old)
    assert held is not None
    pin = index.match(tree, tokens("a"))
    assert not settle(index, held, PLACES.take(1)[0])
    assert index.places(pin, RAM) == [old]
    check_integrity(index, [pin])


def test_a_split_in_the_middle_of_a_move_changes_nothing() -> None:
    index = ram_index()
    tree = make_tree(index)
    pin = store(index, tree, "abcd")
    places = index.places(pin, RAM)
    index.unpin(pin)
    held = hold(index, RAM, places[1])
    assert held is not None
    stored(index, tree, "abx")
    stored(index, tree, "ay")
    (new,) = PLACES.take(1)
    assert settle(index, held, new)
    pin = index.match(tree, tokens("abcd"))
    assert index.places(pin, RAM) == [places[0], new, *places[2:]]
    check_integrity(index, [pin])


def test_a_move_that_is_given_up_leaves_no_lease() -> None:
    index = ram_index()
    tree = make_tree(index)
    pin = store(index, tree, "a")
    (place,) = index.places(pin, RAM)
    index.unpin(pin)
    held = hold(index, RAM, place)
    assert held is not None
    release(index, held)
    check_integrity(index, [])
    assert len(index.evict(RAM, RECORD_BYTES)) == 1


def test_a_place_where_nothing_lies_cannot_move() -> None:
    index = ram_index()
    stored(index, make_tree(index), "a")
    assert hold(index, RAM, 10**9) is None

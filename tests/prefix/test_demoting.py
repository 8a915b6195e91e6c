"""Blocks that move between device memory and RAM while others store, lease and split."""

from __future__ import annotations

import pytest

from kvpool.prefix import demoting
from kvpool.prefix.accounts import Quota
from kvpool.prefix.demoting import Span
from kvpool.prefix.history import Loss
from kvpool.prefix.index import Pin, PrefixIndex
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import GPU, NOWHERE, RAM, SSD
from kvpool.prefix.tree import PrefixTree
from tests.prefix.small import PLACES, RECORD_BYTES, make_index, make_tree, stored, tokens

ALL = 32 * RECORD_BYTES


def index_with_device() -> PrefixIndex:
    return make_index(
        region_of={GPU: lambda place: place // 8, RAM: lambda place: place // 8, SSD: lambda place: place // 64}
    )


def held(index: PrefixIndex, tree: PrefixTree, prompt: str, level: int) -> str:
    """Which letters of a prompt lie at this level."""
    pin = index.match(tree, tokens(prompt))
    places = index.places(pin, level)
    index.unpin(pin)
    return "".join(letter for letter, place in zip(prompt, places, strict=False) if place != NOWHERE)


def copied(index: PrefixIndex, span: Span, level: int = RAM) -> None:
    """As if the bytes had been copied to `level`."""
    assert index.fill(span.pin, span.first, level, PLACES.take(len(span.places))) == []


def taken(index: PrefixIndex, blocks: int) -> Span:
    span = demoting.coldest(index, blocks * RECORD_BYTES)
    assert span is not None
    return span


def test_the_end_of_what_was_used_longest_ago_goes_down_first() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", GPU)
    stored(index, tree, "xyz", GPU)
    span = taken(index, 2)
    assert (span.first, len(span.places), span.is_below) == (2, 2, [False, False])
    copied(index, span)
    gone = demoting.leave_device(index, span)
    assert [copy.place for copy in gone] == span.places[::-1]
    assert not any(copy.last for copy in gone)
    assert (held(index, tree, "abcd", GPU), held(index, tree, "abcd", RAM)) == ("ab", "cd")
    assert held(index, tree, "xyz", GPU) == "xyz"
    check_integrity(index, [])


def test_what_found_no_room_below_stays_on_the_device() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", GPU)
    span = taken(index, 3)
    places = [NOWHERE, *PLACES.take(1), NOWHERE]
    index.fill(span.pin, span.first, RAM, places)
    assert demoting.leave_device(index, span) == []
    assert held(index, tree, "abcd", GPU) == "abcd"
    check_integrity(index, [])


def test_what_is_on_ssd_has_a_copy_below() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "ab", GPU)
    stored_too(index, tree, "ab", SSD)
    assert len(demoting.leave_device(index, taken(index, 2))) == 2
    assert held(index, tree, "ab", GPU) == ""
    check_integrity(index, [])


def stored_too(index: PrefixIndex, tree: PrefixTree, prompt: str, level: int) -> None:
    pin = index.match(tree, tokens(prompt))
    index.fill(pin, 0, level, PLACES.take(pin.depth))
    index.unpin(pin)


def test_what_was_leased_while_it_was_copied_stays_and_the_rest_goes() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", GPU)
    span = taken(index, 4)
    copied(index, span)
    lease = index.match(tree, tokens("ab"))
    assert len(demoting.leave_device(index, span)) == 2
    assert [place != NOWHERE for place in index.places(lease, GPU)] == [True, True]
    check_integrity(index, [lease])


def test_what_somebody_has_continued_on_the_device_stays() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "ab", GPU)
    span = taken(index, 2)
    copied(index, span)
    stored(index, tree, "abc", GPU)
    assert demoting.leave_device(index, span) == []
    assert held(index, tree, "abc", GPU) == "abc"
    check_integrity(index, [])


def test_a_split_while_blocks_are_copied_leaves_each_where_it_can_be_found() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", GPU)
    span = taken(index, 4)
    stored(index, tree, "abx", RAM)
    copied(index, span)
    demoting.leave_device(index, span)
    assert held(index, tree, "abcd", RAM) == "abcd"
    assert held(index, tree, "abcd", GPU) == "ab"
    check_integrity(index, [])


def test_a_leased_block_and_one_used_later_than_asked_do_not_begin_to_move() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "ab", GPU)
    lease = index.match(tree, tokens("ab"))
    assert demoting.coldest(index, ALL) is None
    index.unpin(lease)
    assert demoting.coldest(index, ALL, older_than=1) is None
    span = demoting.coldest(index, ALL, older_than=index.uses + 1)
    assert span is not None
    index.unpin(span.pin)
    check_integrity(index, [])


def test_nobody_but_its_owner_moves_what_is_guaranteed_to_it() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", GPU)
    index.set_quotas({tree.model: {GPU: Quota(guaranteed=3 * RECORD_BYTES)}}, [ALL, ALL, ALL])
    span = taken(index, 4)
    assert len(span.places) == 1
    copied(index, span)
    demoting.leave_device(index, span)
    assert demoting.coldest(index, ALL) is None
    own = demoting.coldest(index, ALL, own=tree.account)
    assert own is not None
    assert len(own.places) == 3
    index.unpin(own.pin)
    check_integrity(index, [])


def risen(index: PrefixIndex, tree: PrefixTree, prompt: str) -> tuple[Span, Pin]:
    pin = index.match(tree, tokens(prompt))
    span = demoting.next_below(index, pin.node, 0, pin.depth, 32)
    assert span is not None
    return span, pin


def test_what_goes_up_leaves_ram_unless_somebody_reads_it_there() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", RAM)
    span, pin = risen(index, tree, "abcd")
    index.unpin(pin)
    copied(index, span, GPU)
    lease = index.match(tree, tokens("ab"))
    assert len(demoting.leave_ram(index, span)) == 2
    assert [place != NOWHERE for place in index.places(lease, RAM)] == [True, True]
    index.unpin(lease)
    assert held(index, tree, "abcd", GPU) == "abcd"
    check_integrity(index, [])


def test_what_had_no_room_on_the_device_stays_in_ram() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abcd", RAM)
    span, pin = risen(index, tree, "abcd")
    index.unpin(pin)
    index.fill(span.pin, span.first, GPU, PLACES.take(2))
    assert len(demoting.leave_ram(index, span)) == 2
    assert (held(index, tree, "abcd", GPU), held(index, tree, "abcd", RAM)) == ("ab", "cd")
    check_integrity(index, [])


def test_an_encoded_copy_stays_in_ram() -> None:
    index = make_index(region_of={GPU: lambda place: place // 8, SSD: lambda place: place // 64}, bytes_of={RAM: small})
    tree = make_tree(index)
    index.expect_encoded(tree)
    stored(index, tree, "ab", RAM)
    span, pin = risen(index, tree, "ab")
    index.unpin(pin)
    copied(index, span, GPU)
    assert demoting.leave_ram(index, span) == []
    assert held(index, tree, "ab", RAM) == "ab"
    check_integrity(index, [])


def small(place: int) -> int:
    return RECORD_BYTES // 2


@pytest.mark.parametrize("leased", [False, True])
def test_a_place_that_has_to_go_goes_whatever_lies_below_it_but_not_from_under_a_lease(leased: bool) -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abc", GPU)
    lease = index.match(tree, tokens("abc"))
    place = index.places(lease, GPU)[1]
    if leased:
        assert demoting.held_at(index, place) is None
        return
    index.unpin(lease)
    span = demoting.held_at(index, place)
    assert span is not None
    [gone] = demoting.give_up_place(index, span)
    assert (gone.place, gone.last) == (place, True)
    assert held(index, tree, "abc", GPU) == "a", "a match ends at the hole"
    check_integrity(index, [])


def test_a_tier_that_fell_out_takes_leased_blocks_too_and_says_why() -> None:
    index = index_with_device()
    tree = make_tree(index)
    stored(index, tree, "abc", GPU)
    stored_too(index, tree, "ab", RAM)
    lease = index.match(tree, tokens("abc"))
    assert demoting.forget_regions(index, lambda region: False) == []
    gone = demoting.forget_regions(index, lambda region: True)
    assert len(gone) == 3
    index.unpin(lease)
    assert held(index, tree, "abc", RAM) == "ab"
    key = tree.chain.keys(tokens("abc"), 4)[2]
    fate = index.history.fate(key)
    assert fate is not None
    assert fate.loss is Loss.TIER_OUT
    check_integrity(index, [])

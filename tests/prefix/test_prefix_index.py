"""Rules of the prefix index that each had a bug, or would be missed only rarely."""

from __future__ import annotations

import gc
import os
import tracemalloc

import pytest

from kvpool.blocks.identity import BlockKey
from kvpool.policy import LruPolicy
from kvpool.prefix.history import Fate, History, Loss
from kvpool.prefix.index import PrefixIndex, SharingRules
from kvpool.prefix.integrity import IntegrityError, check_integrity
from kvpool.prefix.node import RAM, SSD
from kvpool.prefix.restore import restore
from kvpool.prefix.tree import PrefixTree, common_blocks
from tests.prefix.small import PLACES, RECORD_BYTES, depth, make_index, make_tree, records, store, stored, tokens


@pytest.fixture
def index() -> PrefixIndex:
    return make_index()


@pytest.fixture
def tree(index: PrefixIndex) -> PrefixTree:
    return make_tree(index)


def test_a_pin_made_before_a_split_ends_after_the_lower_half_was_evicted(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "aaab")
    pin = index.match(tree, tokens("aaa"))
    stored(index, tree, "aaac")
    index.evict(RAM, 1)
    assert depth(index, tree, "aaab") == 3
    index.unpin(pin)
    check_integrity(index, [])


def test_a_part_of_an_edge_keeps_the_age_of_its_own_last_use(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "abcdef")
    assert depth(index, tree, "abcd") == 4
    stored(index, tree, "x")
    assert depth(index, tree, "ab") == 2
    assert len(index.evict(RAM, 4 * RECORD_BYTES)) == 4
    assert depth(index, tree, "abcdef") == 2, "e and f are oldest, then c and d"
    assert depth(index, tree, "x") == 1


def test_using_the_whole_edge_ends_the_age_of_its_parts(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "ab")
    depth(index, tree, "a")
    depth(index, tree, "ab")
    stored(index, tree, "x")
    depth(index, tree, "ab")
    index.evict(RAM, RECORD_BYTES)
    assert depth(index, tree, "x") == 0
    assert depth(index, tree, "ab") == 2


def test_shortening_a_lease_is_no_use(index: PrefixIndex, tree: PrefixTree) -> None:
    pin = store(index, tree, "ab")
    stored(index, tree, "x")
    index.shorten(pin, 1)
    index.unpin(pin)
    index.evict(RAM, 2 * RECORD_BYTES)
    assert (depth(index, tree, "ab"), depth(index, tree, "x")) == (0, 1)


def test_a_lease_shortened_to_nothing_holds_nothing(index: PrefixIndex, tree: PrefixTree) -> None:
    pin = store(index, tree, "ab")
    index.shorten(pin, 0)
    assert len(index.evict(RAM, 1 << 30)) == 2
    index.unpin(pin)
    assert (index.bytes, index.blocks, index.trees) == (0, 0, {})


def test_shortening_never_lengthens(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "abc")
    pin = index.match(tree, tokens("ab"))
    index.shorten(pin, 3)
    assert pin.depth == 2
    check_integrity(index, [pin])


def test_every_branch_of_a_prefix_is_restored(index: PrefixIndex, tree: PrefixTree) -> None:
    prompts = ["ab1", "ab2", "ab3", "ab23", "ab31", "ab3145", "b"]
    restored = restore(index, tree, records(tree, prompts))
    assert (restored.orphans, restored.duplicates) == ([], [])
    assert [depth(index, tree, prompt) for prompt in prompts] == [len(prompt) for prompt in prompts]
    check_integrity(index, [])


def test_a_record_whose_key_its_tokens_do_not_give_is_not_restored(index: PrefixIndex, tree: PrefixTree) -> None:
    first, second, third = records(tree, ["abc"])
    forged = second._replace(tokens=tokens("x"))
    misplaced = third._replace(depth=1, parent=first.key)
    restored = restore(index, tree, [first, forged, misplaced])
    assert sorted(restored.orphans) == [forged.place, misplaced.place]
    assert restored.blocks == 1
    check_integrity(index, [])


def test_restoring_nothing_keeps_no_tree(index: PrefixIndex, tree: PrefixTree) -> None:
    restore(index, tree, records(tree, ["ab"])[1:])
    assert (index.trees, index.bytes) == ({}, 0)


def test_an_erased_tree_is_not_restored(index: PrefixIndex, tree: PrefixTree) -> None:
    index.erase(tree)
    found = records(tree, ["ab"])
    assert restore(index, tree, found) == (0, [record.place for record in found], [])


def test_a_prompt_that_follows_a_shared_prefix_is_not_shared_by_that(index: PrefixIndex, tree: PrefixTree) -> None:
    for prompt in ("ab1", "ab2"):
        stored(index, tree, prompt)
    index.sharing = SharingRules(min_prefix_tokens=1)
    index.evict(RAM, 2 * RECORD_BYTES)
    assert depth(index, tree, "ab1") == depth(index, tree, "ab2") == 2
    pin = store(index, tree, "ab3")
    assert index.shared_blocks(pin) == 2
    assert index.shared_bytes[RAM] == 2 * RECORD_BYTES


def test_declaring_a_part_of_an_edge_shared_leaves_the_rest_as_it_is(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "abcd")
    pin = index.match(tree, tokens("ab"))
    index.mark_shared(pin)
    assert index.shared_bytes[RAM] == 2 * RECORD_BYTES
    assert index.shared_blocks(pin) == 2
    check_integrity(index, [pin])


def test_shared_prefixes_go_last_while_they_are_few(index: PrefixIndex, tree: PrefixTree) -> None:
    index.sharing = SharingRules(min_prefix_tokens=2, max_shared_bytes=3 * RECORD_BYTES)
    for prompt in ("ab1", "ab2", "x", "y"):
        stored(index, tree, prompt)
    index.evict(RAM, 4 * RECORD_BYTES)
    assert [depth(index, tree, prompt) for prompt in ("ab1", "x", "y")] == [2, 0, 0]


def test_shared_prefixes_above_the_limit_go_as_all_others(index: PrefixIndex, tree: PrefixTree) -> None:
    index.sharing = SharingRules(min_prefix_tokens=1, max_shared_bytes=3 * RECORD_BYTES)
    for prompt in ("ab1", "ab2", "cd1", "cd2"):
        stored(index, tree, prompt)
    index.evict(RAM, 4 * RECORD_BYTES)
    assert index.shared_bytes[RAM] == 3 * RECORD_BYTES, (
        "one too many: the oldest of them goes before the tails of later"
    )
    assert [depth(index, tree, prompt) for prompt in ("ab1", "cd1", "cd2")] == [1, 2, 3]


def test_a_shorter_prefix_than_the_minimum_is_not_protected(index: PrefixIndex, tree: PrefixTree) -> None:
    index.sharing = SharingRules(min_prefix_tokens=3)
    for prompt in ("ab1", "ab2", "x"):
        stored(index, tree, prompt)
    index.evict(RAM, 4 * RECORD_BYTES)
    assert [depth(index, tree, prompt) for prompt in ("ab1", "x")] == [0, 1]


def test_a_tree_given_up_between_its_entry_and_a_match_is_entered_again(index: PrefixIndex, tree: PrefixTree) -> None:
    other = index.match(tree, tokens("ab"))
    assert index.add_tree(tree) is tree
    index.unpin(other)
    assert index.tree(tree.id) is None
    stored(index, tree, "ab")
    assert index.tree(tree.id) is tree
    assert depth(index, tree, "ab") == 2


def test_a_tree_that_was_replaced_leads_to_its_successor(index: PrefixIndex, tree: PrefixTree) -> None:
    index.unpin(index.match(tree, b""))
    successor = make_tree(index)
    stored(index, tree, "ab")
    assert successor is not tree
    assert depth(index, successor, "ab") == 2
    check_integrity(index, [])


def test_erasing_a_tree_that_was_replaced_erases_its_successor(index: PrefixIndex, tree: PrefixTree) -> None:
    index.unpin(index.match(tree, b""))
    successor = make_tree(index)
    stored(index, successor, "ab")
    index.erase(tree)
    assert depth(index, successor, "ab") == 0
    assert len(index.bury()) == 2


def test_nothing_is_found_or_entered_in_an_erased_tree(index: PrefixIndex, tree: PrefixTree) -> None:
    pin = store(index, tree, "ab")
    index.erase(tree)
    assert index.attach(pin, tokens("abc"), RAM, [1000]) == [1000]
    assert index.fill(pin, 0, SSD, [1001, -1]) == [1001]
    assert index.advance(pin, tokens("abc")) == 0
    assert depth(index, tree, "ab") == 0
    assert index.bury() == []
    index.unpin(pin)
    assert len(index.bury()) == 2
    assert (index.bytes, index.blocks, index.trees) == (0, 0, {})


def test_an_erased_tree_keeps_only_what_a_lease_covers(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "a" * 100)
    stored(index, tree, "ab")
    pin = index.match(tree, tokens("a" * 40))
    index.erase(tree)
    buried = 0
    while gone := index.bury():
        assert len(gone) <= 32
        buried += len(gone)
    assert buried == 61
    assert -1 not in index.places(pin, RAM)
    check_integrity(index, [pin])


def test_burying_leaves_nothing_behind_in_the_policy() -> None:
    policies: list[LruPolicy] = []

    def make_policy() -> LruPolicy:
        policies.append(LruPolicy())
        return policies[-1]

    index = make_index(make_policy=make_policy)
    for epoch in range(50):
        tree = make_tree(index, epoch)
        for prompt in range(20):
            stored(index, tree, prompt.to_bytes(4, "little"))
        index.erase(tree)
        while index.bury():
            pass
    assert sum(len(policy) for policy in policies) == 0
    assert all(len(policy._heap) + len(policy._retired) < 200 for policy in policies)


def test_a_prompt_of_thousands_of_edges_is_matched_keyed_and_evicted(index: PrefixIndex, tree: PrefixTree) -> None:
    """As one with a different image in every block."""
    blocks = 3000
    prompt = tokens("a" * blocks)
    extras = {at: b"image %d" % at for at in range(blocks)}
    pin = index.match(tree, prompt, extras)
    while pin.depth < blocks:
        index.attach(pin, prompt, RAM, PLACES.take(min(32, blocks - pin.depth)), extras)
    assert len(index.path(pin)) == blocks
    assert tree.keys_of(pin.node) == tree.chain.keys(prompt, 4, extras)[-1]
    index.unpin(pin)
    while index.evict(RAM, 1 << 30):
        pass
    assert (index.bytes, index.blocks) == (0, 0)


def test_no_eviction_takes_more_than_a_batch_however_much_lies_below(index: PrefixIndex, tree: PrefixTree) -> None:
    """The only copy of the first block goes, and below it lie a thousand blocks on SSD."""
    restore(index, tree, records(tree, ["a" + letter * 20 for letter in "bcdefghijklmnopqrstuvwxyz" * 2]))
    pin = index.match(tree, tokens("a"))
    (place,) = index.places(pin, SSD)
    index.fill(pin, 0, RAM, PLACES.take(1))
    index.lose(pin, 0, SSD, place, Loss.CORRUPT)
    index.unpin(pin)
    total = index.copies[SSD]
    taken = 0
    while gone := index.evict(RAM, RECORD_BYTES):
        assert len(gone) <= 32
        assert all(copy.level == SSD for copy in gone[:-1])
        taken += len(gone)
    assert taken == total + 1
    assert (index.bytes, index.blocks, index.trees) == (0, 0, {})


def test_a_block_without_a_lower_copy_stays_while_a_block_below_it_is_leased(
    index: PrefixIndex, tree: PrefixTree
) -> None:
    restore(index, tree, records(tree, ["ab", "ac"]))
    pin = index.match(tree, tokens("ab"))
    (place, _) = index.places(pin, SSD)
    index.fill(pin, 0, RAM, PLACES.take(1))
    index.lose(pin, 0, SSD, place, Loss.CORRUPT)
    assert index.evict(RAM, RECORD_BYTES) == []
    index.unpin(pin)
    assert [copy.level for copy in index.evict(RAM, RECORD_BYTES)] == [SSD, SSD, RAM]


def test_only_real_places_are_asked_for_their_segment(tree: PrefixTree) -> None:
    asked: list[int] = []

    def segment_of(place: int) -> int:
        asked.append(place)
        return place // 4

    index = make_index(region_of={SSD: segment_of})
    tree = index.add_tree(tree)
    pin = store(index, tree, "abcd")
    index.fill(pin, 0, SSD, [1000, -1, -1, 1001])
    assert index.residents[SSD] == {250: {pin.node}}
    index.unpin(pin)
    gone, complete = index.vacate(pin.node, 250)
    assert ([copy.place for copy in gone], complete) == ([1001, 1000], True)
    assert -1 not in asked
    assert index.residents[SSD] == {}


def test_vacating_a_segment_may_leave_a_hole_that_a_store_fills(index: PrefixIndex, tree: PrefixTree) -> None:
    restore(index, tree, [record._replace(place=64 * at) for at, record in enumerate(records(tree, ["abc"]))])
    (node,) = index.residents[SSD][1]
    gone, _ = index.vacate(node, 1)
    assert [copy.last for copy in gone] == [True]
    assert depth(index, tree, "abc") == 1
    pin = index.match(tree, tokens("abc"))
    refused = index.attach(pin, tokens("abc"), SSD, [900, 901])
    assert refused == [901], "only the hole needed a copy"
    assert pin.depth == 3
    check_integrity(index, [pin])


def test_a_moved_record_is_found_in_its_new_segment(index: PrefixIndex, tree: PrefixTree) -> None:
    pin = store(index, tree, "ab", level=SSD)
    old, _ = index.places(pin, SSD)
    assert not index.move(pin.node, SSD, old, 64 * 999), "a leased block is never moved"
    index.unpin(pin)
    assert index.move(pin.node, SSD, old, 64 * 999)
    pin = index.match(tree, tokens("ab"))
    assert index.places(pin, SSD)[0] == 64 * 999
    assert pin.node in index.residents[SSD][999]
    assert not index.move(pin.node, SSD, old, 64 * 998)
    check_integrity(index, [pin])


def test_a_leased_candidate_is_looked_at_again_only_when_its_lease_ends(index: PrefixIndex, tree: PrefixTree) -> None:
    pins = [store(index, tree, at.to_bytes(4, "little") * 2) for at in range(1000)]
    assert index.evict(RAM, RECORD_BYTES) == []
    policy = index.ledger.accounts[""].candidates[RAM].ordinary
    assert len(policy) == 0
    index.unpin(pins.pop(500))
    assert len(policy) == 1
    assert len(index.evict(RAM, 1 << 30)) == 2
    check_integrity(index, pins)


def test_the_index_shrinks_to_its_limit_by_what_was_used_longest_ago(index: PrefixIndex, tree: PrefixTree) -> None:
    for prompt in ("abcd", "xy"):
        pin = store(index, tree, prompt)
        index.fill(pin, 0, SSD, PLACES.take(len(prompt)))
        index.unpin(pin)
    index.limit_bytes = index.bytes - 1
    gone = index.shrink()
    assert not index.over_limit
    assert sorted(copy.level for copy in gone) == [RAM] * 4 + [SSD] * 4
    assert (depth(index, tree, "abcd"), depth(index, tree, "xy")) == (0, 2)
    key = tree.chain.keys(tokens("a"), 4)[0]
    assert index.history.fate(key) is not None


def test_the_index_does_not_shrink_below_its_leases(index: PrefixIndex, tree: PrefixTree) -> None:
    pin = store(index, tree, "abcd")
    index.limit_bytes = 0
    assert index.shrink() == []
    index.unpin(pin)
    assert len(index.shrink()) == 4
    assert index.bytes == 0


def test_attach_takes_no_more_than_a_batch(index: PrefixIndex, tree: PrefixTree) -> None:
    pin = index.match(tree, b"")
    with pytest.raises(ValueError, match="at most 32 blocks"):
        index.attach(pin, tokens("a" * 40), RAM, list(range(33)))
    with pytest.raises(ValueError, match="as many places"):
        index.attach(pin, tokens("ab"), RAM, [1, 2, 3])
    assert index.attach(pin, tokens("ab"), RAM, []) == []


def test_an_edge_is_not_lengthened_without_limit(index: PrefixIndex, tree: PrefixTree) -> None:
    prompt = b"".join(at.to_bytes(4, "little") for at in range(100_000))
    pin = store(index, tree, prompt)
    assert max(len(node.tokens) for node in index.path(pin)) <= 256 << 10
    assert index.shared_blocks(pin) == 0
    assert tree.find(prompt) == (pin.node, 100_000)


def test_the_fate_of_lost_blocks_is_remembered(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "abc")
    index.evict(RAM, 2 * RECORD_BYTES)
    kept, *lost = tree.chain.keys(tokens("abc"), 4)
    assert index.history.fate(kept) is None
    fates = [index.history.fate(key) for key in lost]
    assert [fate and (fate.loss, fate.tier) for fate in fates] == [(Loss.EVICTED, "ram")] * 2


def test_history_remembers_the_latest_losses_within_its_bound() -> None:
    history = History(100)
    keys = [BlockKey(at.to_bytes(16, "little")) for at in range(1000)]
    for at, key in enumerate(keys):
        history.note(key, Fate(Loss.EVICTED, "ram", float(at)))
        assert len(history) <= 100
    assert all(history.fate(key) is not None for key in keys[-50:])
    remembered = [key for key, _ in history.items()]
    assert remembered == keys[-len(remembered) :]
    assert history.complete_since_s == 1000.0 - len(remembered) - 1


def test_history_keeps_the_later_of_two_losses() -> None:
    history = History(4)
    key = BlockKey(bytes(16))
    history.note(key, Fate(Loss.EVICTED, "ram", 1.0))
    history.note_all([BlockKey(bytes([at]) * 16) for at in (1, 2)], Fate(Loss.EVICTED, "ram", 2.0))
    history.note(key, Fate(Loss.CORRUPT, "ssd", 3.0))
    assert history.fate(key) == Fate(Loss.CORRUPT, "ssd", 3.0)
    assert len(history) == len(list(history.items()))


@pytest.mark.parametrize(("common", "limit"), [(0, 9), (1, 9), (5, 9), (8, 9), (9, 9), (9, 4), (0, 0), (3, -1)])
def test_common_blocks_counts_whole_equal_blocks(common: int, limit: int) -> None:
    edge = bytes(range(40))
    prompt = b"??" + edge[4 : 4 + 4 * common] + b"\xff" * 40
    assert common_blocks(edge, 4, prompt, 2, limit, 4) == max(min(common, limit), 0)


def test_integrity_finds_a_wrong_count(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "ab")
    index.copies[RAM] += 1
    with pytest.raises(IntegrityError, match="it counts"):
        check_integrity(index)


def test_integrity_finds_a_lease_that_nobody_holds(index: PrefixIndex, tree: PrefixTree) -> None:
    store(index, tree, "ab")
    with pytest.raises(IntegrityError, match="open pins"):
        check_integrity(index, [])


SHAPES = {
    "single blocks": (4000, 1, 64, 1, False),
    "16 blocks": (500, 16, 64, 1, False),
    "1000 blocks": (8, 1000, 64, 1, False),
    "16 small blocks": (500, 16, 16, 1, False),
    "16 blocks, on ssd too": (500, 16, 64, 1, True),
    "four branches": (200, 8, 64, 4, True),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_the_estimate_of_its_memory_is_near_the_truth(shape: tuple[int, int, int, int, bool]) -> None:
    prefixes, blocks, block_tokens, branches, on_ssd = shape
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = make_index()
        tree = make_tree(index, token_bytes=4 * block_tokens)
        for _ in range(prefixes):
            base = os.urandom(blocks * tree.token_bytes) if branches > 1 else b""
            for _ in range(branches):
                pin = store(index, tree, base + os.urandom(blocks * tree.token_bytes) + b"rest")
                for first in range(0, pin.depth if on_ssd else 0, 32):
                    index.fill(pin, first, SSD, PLACES.take(min(32, pin.depth - first)))
                index.unpin(pin)
        del pin, base
        gc.collect()
        true = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert index.bytes == pytest.approx(true, rel=0.15)
    if blocks >= 8:
        assert true / index.blocks < 600


def test_only_requests_are_counted_and_shared_hits_end_with_the_shared_prefix(
    index: PrefixIndex, tree: PrefixTree
) -> None:
    stored(index, tree, "abcd")
    stored(index, tree, "abxy")
    assert index.matches == 0, "a store's own look-up is no request"
    pin = index.match(tree, tokens("abxyz"), asked=5)
    assert (index.matches, index.asked_blocks, index.matched_blocks, index.shared_hits) == (1, 5, 4, 2)
    index.unpin(pin)


def test_keys_of_what_left_are_reported_when_asked_for(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "ab")
    removed: list[tuple[int, list[BlockKey]]] = []
    index.on_removed = lambda level, keys, _: removed.append((level, list(keys)))
    assert len(index.evict(RAM, 2 * RECORD_BYTES)) == 2
    assert removed == [(RAM, tree.chain.keys(tokens("ab"), 4)[::-1])]


def test_blocks_of_an_erased_tree_are_remembered_as_erased(index: PrefixIndex, tree: PrefixTree) -> None:
    stored(index, tree, "a")
    index.erase(tree)
    assert len(index.bury()) == 1
    fate = index.history.fate(tree.chain.keys(tokens("a"), 4)[0])
    assert fate is not None
    assert fate.loss is Loss.ERASED

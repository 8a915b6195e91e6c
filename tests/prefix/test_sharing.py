"""Which shared prefixes are used most, and which are known again after a restart."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import RAM
from kvpool.prefix.restore import restore
from kvpool.prefix.sharing import mark_again, shared_marks, shared_nodes, top_shared
from kvpool.prefix.tree import PrefixTree
from tests.prefix.small import RECORD_BYTES, make_index, make_tree, records, stored, tokens


def ask(index: PrefixIndex, tree: PrefixTree, prompt: str, times: int = 1) -> None:
    """So many requests for a prompt."""
    for _ in range(times):
        index.unpin(index.match(tree, tokens(prompt), asked=len(prompt)))


def declare(index: PrefixIndex, tree: PrefixTree, prompt: str) -> None:
    pin = index.match(tree, tokens(prompt))
    index.mark_shared(pin)
    index.unpin(pin)


def shared_texts(index: PrefixIndex) -> set[str]:
    """Every shared prefix, up to the end of its edge."""
    found = set()
    for node in shared_nodes(index):
        text, at = "", node
        while at.parent is not None:
            text, at = bytes(at.tokens[::4]).decode() + text, at.parent
        found.add(text)
    return found


def test_a_request_counts_for_its_longest_shared_prefix_alone() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("ab1", "ab2", "abcd1", "abcd2", "z"):
        stored(index, tree, prompt)
    ask(index, tree, "ab1", 3)
    ask(index, tree, "abcd1", 5)
    ask(index, tree, "z")
    assert [(found.depth, found.hits) for found in top_shared(index, 9)] == [(4, 5), (2, 3)]


def test_the_size_of_a_prefix_is_that_of_all_its_blocks() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("ab1", "ab2", "abcd1", "abcd2"):
        stored(index, tree, prompt)
    ask(index, tree, "abcd1")
    (longest, *_) = top_shared(index, 1)
    assert longest.bytes == (0, 4 * RECORD_BYTES, 0)
    assert (longest.tokens, longest.children, longest.key) == (4, 2, tree.chain.keys(tokens("abcd"), 4)[-1])


def test_a_prefix_that_is_only_the_way_to_a_longer_one_is_not_listed() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abcd")
    declare(index, tree, "ab")
    declare(index, tree, "abcd")
    assert [found.depth for found in top_shared(index, 9)] == [4]


def test_of_as_many_hits_the_one_used_last_comes_first() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("a1", "a2", "b1", "b2"):
        stored(index, tree, prompt)
    ask(index, tree, "b1")
    ask(index, tree, "a1")
    first, second = top_shared(index, 2)
    assert first.key == tree.chain.keys(tokens("a"), 4)[0]
    assert (first.idle_uses, second.idle_uses) == (0, 1)


def test_nothing_is_held_and_nothing_is_changed_by_looking() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("ab1", "ab2"):
        stored(index, tree, prompt)
    uses = index.uses
    assert len(top_shared(index, 9)) == 1
    assert index.uses == uses
    check_integrity(index, [])
    while index.evict(RAM, 100 * RECORD_BYTES):
        pass
    assert top_shared(index, 9) == []


def test_an_index_with_many_trees_and_wide_edges_is_walked_to_the_end() -> None:
    index = make_index()
    trees = [make_tree(index, epoch) for epoch in range(3)]
    for tree in trees:
        for first in range(70):
            for last in "12":
                stored(index, tree, chr(200 + first) + last)
    assert sum(1 for _ in shared_nodes(index)) == 3 * 70
    assert len(top_shared(index, 100)) == 100


PROMPTS = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


@settings(deadline=None)
@given(PROMPTS, st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
def test_what_was_shared_is_shared_again_once_it_is_restored(prompts: list[str], declared: list[str]) -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in prompts:
        stored(index, tree, prompt)
        ask(index, tree, prompt)
    for prompt in declared:
        declare(index, tree, prompt)
    marks = shared_marks(index, 1000)
    again = make_index()
    restore(again, make_tree(again), records(tree, prompts))
    assert mark_again(again, marks) == len(marks)
    assert shared_texts(again) >= shared_texts(index)
    assert {(mark.depth, mark.key): mark.hits for mark in marks if mark.hits}.items() <= {
        (found.depth, found.key): found.hits for found in top_shared(again, 1000)
    }.items()
    check_integrity(again, [])


def test_marks_of_what_is_not_there_are_passed_over() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abc")
    declare(index, tree, "abc")
    marks = shared_marks(index, 9)
    other = make_index()
    assert mark_again(other, marks) == 0
    stored(other, make_tree(other), "ab")
    assert mark_again(other, marks) == 0
    assert shared_texts(other) == set()


def test_of_too_many_marks_those_with_most_hits_are_kept() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("a1", "a2", "b1", "b2"):
        stored(index, tree, prompt)
    ask(index, tree, "b1", 2)
    ask(index, tree, "a1")
    assert [mark.hits for mark in shared_marks(index, 1)] == [2]

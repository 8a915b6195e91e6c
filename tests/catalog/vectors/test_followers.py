"""Which prompts followed which, as a pure matter; and what their blocks add up to."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvpool.blocks.identity import TreeId
from kvpool.catalog.vectors.contract import Point
from kvpool.catalog.vectors.followers import FOLLOWERS, FollowerBook
from kvpool.catalog.vectors.votes import ranked
from tests.catalog.vectors.points import leaf_of, point, tree_of


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=60))
def test_every_prompt_comes_out_once_with_the_next_of_its_tree(asked: list[tuple[int, int]]) -> None:
    book = FollowerBook()
    out: list[Point] = []
    for number, (prompt, tenant) in enumerate(asked):
        tree = tree_of(tenant=tenant)
        done = book.add(alone(prompt, tree, number))
        assert len(done) <= 1
        out += done
    out += book.take(len(asked))
    assert len(book) == 0
    assert sorted(one.at_ms for one in out) == list(range(len(asked)))
    for one in out:
        after = asked[one.at_ms + 1 :]
        later = [leaf_of(prompt, one.tree) for prompt, tenant in after if tree_of(tenant=tenant) == one.tree]
        wanted = [leaf for leaf in dict.fromkeys(later[:FOLLOWERS]) if leaf != one.leaf]
        assert list(one.followers) == wanted


def alone(number: int, tree: TreeId, at_ms: int) -> Point:
    return replace(point(number, tree, at_ms=at_ms), followers=())


def test_the_oldest_tree_goes_where_there_are_too_many() -> None:
    book = FollowerBook(most_trees=3)
    assert [book.add(point(1, tree_of(tenant=tenant))) for tenant in range(3)] == [[], [], []]
    assert [one.tree for one in book.add(point(1, tree_of(tenant=3)))] == [tree_of(tenant=0)]
    assert len(book) == 3


def test_only_those_that_waited_long_enough_are_taken() -> None:
    book = FollowerBook()
    for number in range(4):
        book.add(point(number, at_ms=number))
    assert [one.at_ms for one in book.take(2)] == [0, 1]
    assert len(book) == 2


_CHAINS = st.lists(st.tuples(st.floats(0.01, 1), st.lists(st.integers(0, 2), max_size=6)), max_size=8)


@given(_CHAINS)
def test_a_parent_is_never_ranked_after_its_child(voices: list[tuple[float, list[int]]]) -> None:
    chains = [(score, [tuple(path[: depth + 1]) for depth in range(len(path))]) for score, path in voices]
    order = ranked(chains, least_support=1)
    assert set(order) == {block for _, chain in chains for block in chain}
    for at, block in enumerate(order):
        assert len(block) == 1 or block[:-1] in order[:at]


def test_what_one_prompt_alone_speaks_for_does_not_count_however_often_it_says_so() -> None:
    assert ranked([(0.9, ["own", "own", "both"]), (0.1, ["both", "other"])]) == ["both"]


def test_the_sum_of_scores_decides() -> None:
    assert ranked([(0.5, "ab"), (0.4, "bc"), (0.3, "ca")]) == ["b", "a", "c"]

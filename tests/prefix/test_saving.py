"""What is written to SSD next: parents before children, once, and nothing that was lost meanwhile."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvpool.blocks.identity import Fingerprint
from kvpool.prefix.history import Loss
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import NOWHERE, RAM, SSD, Node
from kvpool.prefix.saving import Idle, Run, begin, end, finish, forget, is_between_saved, want, want_everything
from kvpool.prefix.tree import PrefixTree
from tests.prefix.small import PLACES, RECORD_BYTES, make_index, make_tree, stored, tokens


def payload_bytes(fingerprint: Fingerprint) -> int | None:
    return RECORD_BYTES


def next_run(index: PrefixIndex, node: Node, most_blocks: int = 32) -> Run | Idle:
    return begin(index, node, payload_bytes_of=payload_bytes, most_bytes=most_blocks * RECORD_BYTES)


def wanted(index: PrefixIndex, tree: PrefixTree, prompt: str, depth: int | None = None) -> Node:
    """Ask for a prompt, or its beginning, on SSD; the queued node."""
    pin = index.match(tree, tokens(prompt))
    node = want(index, pin, pin.depth if depth is None else depth)
    index.unpin(pin)
    assert node is not None
    return node


def save(index: PrefixIndex, node: Node, most_blocks: int = 32) -> list[str]:
    """Write all that is wanted of a node; the blocks, as letters, in the order in which they were written."""
    written: list[str] = []
    while isinstance(run := next_run(index, node, most_blocks), Run):
        assert finish(index, run, PLACES.take(len(run.places))) == []
        end(index, run)
        written += [chr(head.tokens[0]) for head in run.heads]
        node = run.wanted
    assert run is Idle.DONE
    return written


def on_ssd(index: PrefixIndex, tree: PrefixTree, prompt: str) -> list[bool]:
    pin = index.match(tree, tokens(prompt))
    places = index.places(pin, SSD)
    index.unpin(pin)
    return [place != NOWHERE for place in places]


def test_only_what_is_wanted_is_written() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abcd")
    assert save(index, wanted(index, tree, "abcd", depth=2)) == ["a", "b"]
    assert on_ssd(index, tree, "abcd") == [True, True, False, False]
    assert save(index, wanted(index, tree, "abcd")) == ["c", "d"]
    check_integrity(index, [])


def test_ancestors_are_written_before_what_hangs_on_them() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("abc", "abx", "abxy"):
        stored(index, tree, prompt)
    assert save(index, wanted(index, tree, "abxy"), most_blocks=1) == ["a", "b", "x", "y"]
    assert save(index, wanted(index, tree, "abc")) == ["c"]


def test_what_is_being_written_by_one_is_not_written_by_another() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abc")
    stored(index, tree, "abx")
    first = next_run(index, wanted(index, tree, "abc"))
    assert isinstance(first, Run)
    other = wanted(index, tree, "abx")
    assert next_run(index, other) is Idle.BUSY
    finish(index, first, PLACES.take(len(first.places)))
    end(index, first)
    assert save(index, other) == ["x"]


def test_a_split_while_an_edge_is_written_leaves_nobody_busy() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abcdef")
    node = wanted(index, tree, "abcdef")
    run = next_run(index, node, most_blocks=3)
    assert isinstance(run, Run)
    finish(index, run, PLACES.take(3))
    end(index, run)
    run = next_run(index, node, most_blocks=3)
    assert isinstance(run, Run)
    assert run.first == 3
    stored(index, tree, "abx")  # splits before what is being written
    stored(index, tree, "abcdy")  # and within it
    finish(index, run, PLACES.take(3))
    end(index, run)
    assert all(part.busy is None for part in tree.nodes())
    assert on_ssd(index, tree, "abcdef") == [True] * 6
    check_integrity(index, [])


def test_what_is_being_written_is_not_evicted() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "ab")
    run = next_run(index, wanted(index, tree, "ab"))
    assert isinstance(run, Run)
    assert index.evict(RAM, 10 * RECORD_BYTES) == []
    finish(index, run, [None, None])
    end(index, run)
    assert len(index.evict(RAM, 10 * RECORD_BYTES)) == 2


def test_what_was_lost_before_it_was_written_is_given_up_with_all_below() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abcd")
    node = wanted(index, tree, "abcd")
    index.evict(RAM, 2 * RECORD_BYTES)
    assert index.unsaved_blocks == 2
    assert save(index, node) == ["a", "b"]
    assert not node.queued


def test_a_run_of_which_a_part_was_written_goes_on_where_it_ended() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abcd")
    run = next_run(index, wanted(index, tree, "abcd"))
    assert isinstance(run, Run)
    finish(index, run, [*PLACES.take(2), None, None])
    end(index, run)
    assert forget(index, run.wanted) == 2
    assert save(index, wanted(index, tree, "abcd")) == ["c", "d"]


def test_a_record_that_was_lost_is_written_again_when_what_hangs_on_it_is_used() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("abc", "abx"):
        stored(index, tree, prompt)
        save(index, wanted(index, tree, prompt))
    pin = index.match(tree, tokens("ab"))
    index.lose(pin, 1, SSD, index.places(pin, SSD)[1], Loss.CORRUPT)
    index.unpin(pin)
    assert tree.gapped
    assert save(index, wanted(index, tree, "abx")) == ["b"]


def test_blocks_before_others_that_are_on_ssd_are_missing_there() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abc")
    save(index, wanted(index, tree, "abc"))
    pin = index.match(tree, tokens("abc"))
    assert not is_between_saved(index, pin, 0)
    index.lose(pin, 1, SSD, index.places(pin, SSD)[1], Loss.CORRUPT)
    assert is_between_saved(index, pin, 1)
    assert not is_between_saved(index, pin, 3)


def test_everything_in_ram_can_be_wanted_at_once() -> None:
    index = make_index()
    tree = make_tree(index)
    for prompt in ("abc", "abx", "q"):
        stored(index, tree, prompt)
    written = [block for node in want_everything(index, tree) for block in save(index, node)]
    assert sorted(written) == sorted("abcxq")


prompts = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=6)


@given(prompts, st.lists(st.integers(0, 5), max_size=6), st.integers(1, 3))
def test_nothing_is_on_ssd_without_the_block_before_it(words: list[str], evictions: list[int], most: int) -> None:
    index = make_index()
    tree = make_tree(index)
    queue: list[Node] = []
    for word, evicted in zip(words, [*evictions, *[0] * len(words)], strict=False):
        stored(index, tree, word)
        pin = index.match(tree, tokens(word))
        if (node := want(index, pin, pin.depth)) is not None:
            queue.append(node)
        index.unpin(pin)
        index.evict(RAM, evicted * RECORD_BYTES)
        if queue:
            save(index, queue.pop(0), most)
        check_integrity(index, [])
        for node in tree.nodes():
            if node.places[SSD]:
                assert NOWHERE not in node.places[SSD]
                parent = node.parent
                assert parent is not None
                assert parent is tree.root or len(parent.places[SSD] or ()) == parent.blocks

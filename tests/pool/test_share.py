"""A model's limit in a tier that has none of its own: held by what is written, the oldest going first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.pool.remote.share import Limit, LimitedTier
from kvpool.tiers.tier import Sealed, TierName
from tests.clock import Clock

from .shared import MemoryTier

MODEL, OTHER = Fingerprint(b"m" * 32), Fingerprint(b"o" * 32)
TREE = TreeId(MODEL, TenantDigest(bytes(16)), 0)
RECORD = 100


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "little"))


def sealed(*numbers: int, nbytes: int = RECORD) -> list[Sealed]:
    return [Sealed(key(number), 0, bytes(nbytes)) for number in numbers]


def limited(nbytes: int, clock: Clock | None = None) -> tuple[LimitedTier, MemoryTier]:
    memory = MemoryTier()
    tier = LimitedTier(memory, ttl_s=lambda: 60.0, clock=clock or Clock())
    tier.set_limits({MODEL: Limit("m", nbytes)})
    return tier, memory


def numbers(memory: MemoryTier) -> set[int]:
    return {int.from_bytes(one, "little") for _, one, _ in memory.records}


def test_the_oldest_go_and_of_a_prompt_the_last_blocks_first() -> None:
    tier, memory = limited(4 * RECORD)
    tier.put(TREE, sealed(1, 2, 3), [])
    tier.put(TREE, sealed(11, 12), [])
    assert numbers(memory) == {1, 2, 11, 12}


def test_what_is_used_goes_later() -> None:
    tier, memory = limited(3 * RECORD)
    for number in (1, 2, 3):
        tier.put(TREE, sealed(number), [])
    tier.touch(TREE, [key(1)], [0])
    tier.put(TREE, sealed(4), [])
    assert numbers(memory) == {1, 3, 4}


def test_ancestors_of_what_is_written_are_used() -> None:
    tier, memory = limited(3 * RECORD)
    for number in (1, 2, 3):
        tier.put(TREE, sealed(number), [key(1)] if number == 3 else [])
    tier.put(TREE, sealed(4), [])
    assert numbers(memory) == {1, 3, 4}


def test_what_is_above_the_limit_alone_is_refused_and_nothing_goes_for_it() -> None:
    tier, memory = limited(2 * RECORD)
    tier.put(TREE, sealed(1), [])
    moved = tier.put(TREE, sealed(2, nbytes=3 * RECORD), [])
    assert moved.done == [False]
    assert numbers(memory) == {1}


def test_what_has_expired_there_counts_no_more() -> None:
    clock = Clock()
    tier, memory = limited(2 * RECORD, clock)
    tier.put(TREE, sealed(1, 2), [])
    clock.now_s += 61.0
    tier.put(TREE, sealed(3), [])
    assert tier.used_bytes("m") == RECORD
    assert "drop" not in memory.calls


def test_models_without_a_limit_have_none() -> None:
    tier, memory = limited(RECORD)
    tier.put(TREE._replace(fingerprint=OTHER), sealed(*range(50)), [])
    assert len(memory.records) == 50


def test_a_limit_that_is_lowered_is_kept_from_the_next_record_on() -> None:
    tier, memory = limited(9 * RECORD)
    tier.put(TREE, sealed(*range(9)), [])
    tier.set_limits({MODEL: Limit("m", 2 * RECORD)})
    tier.put(TREE, sealed(20), [])
    assert len(memory.records) == 2


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True)),
            st.tuples(st.just("touch"), st.lists(st.integers(0, 12), max_size=3)),
            st.tuples(st.just("drop"), st.lists(st.integers(0, 12), max_size=2)),
        ),
        max_size=40,
    )
)
def test_the_limit_holds_after_every_call_and_what_is_counted_is_what_is_there(
    calls: list[tuple[str, list[int]]],
) -> None:
    tier, memory = limited(5 * RECORD)
    for call, named in calls:
        if call == "put":
            tier.put(TREE, sealed(*named), [])
        elif call == "touch":
            tier.touch(TREE, [key(number) for number in named], [0])
        else:
            tier.drop(TREE, [found for found in tier.find(TREE, [key(one) for one in named], [0]) if found])
        assert sum(map(len, memory.records.values())) == tier.used_bytes("m") <= 5 * RECORD
    assert tier.name is TierName.DRAGONFLY

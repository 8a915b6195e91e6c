"""Accounts and quotas: who may hold how much, whose blocks go, and that every count is exact whatever happens."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.blocks.identity import Fingerprint, KeyChain, TenantDigest, TreeId
from kvpool.policy import LruPolicy
from kvpool.prefix.accounts import UNLIMITED, Account, Grant, Quota
from kvpool.prefix.history import Loss
from kvpool.prefix.index import Gone, Pin, PrefixIndex
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import LEVELS, NOWHERE, RAM, SSD
from kvpool.prefix.relocating import hold, settle
from kvpool.prefix.tree import PrefixTree

from .small import tokens

RAW, ENCODED = 100, 40
MODELS = ("one", "two", "three")
CAPACITY = 2000


class World:
    """An index with a tree for each model, whose places say how long their records are."""

    def __init__(self, quotas: dict[str, dict[int, Quota]] | None = None, *, encoded: bool = False) -> None:
        self.serials = count(1)
        self.index = PrefixIndex(
            limit_bytes=1 << 30,
            make_policy=LruPolicy,
            region_of={RAM: lambda place: place >> 12, SSD: lambda place: place >> 12},
            bytes_of={RAM: bytes_of, SSD: bytes_of},
        )
        self.trees = {name: self.make_tree(number, name) for number, name in enumerate(MODELS)}
        for tree in self.trees.values():
            tree.encoded = encoded
        self.pins: list[Pin] = []
        self.set_quotas(quotas or {})

    def make_tree(self, number: int, name: str) -> PrefixTree:
        tree_id = TreeId(Fingerprint(bytes([number]) * 32), TenantDigest(bytes(16)), 0)
        chain = KeyChain(bytes(32), *tree_id)
        tree = self.index.add_tree(PrefixTree(tree_id, token_bytes=4, record_bytes=RAW, chain=chain, model=name))
        self.index.unpin(self.index.match(tree, b""))  # an empty tree is given up until something is entered
        return tree

    def set_quotas(self, quotas: dict[str, dict[int, Quota]]) -> None:
        self.index.set_quotas(quotas, [UNLIMITED, CAPACITY, CAPACITY])

    def account(self, name: str) -> Account:
        return self.index.ledger.account(name)

    def leased(self, name: str) -> int:
        return self.index.leased(self.account(name), RAM)

    def places(self, number: int, nbytes: int) -> list[int]:
        return [next(self.serials) << 7 | nbytes for _ in range(number)]

    def held(self, level: int) -> int:
        return sum(account.bytes[level] + account.in_flight[level] for account in self.index.ledger.accounts.values())

    def store(self, name: str, prompt: str, *, keep: bool = False) -> tuple[int, Grant]:
        """As the pool stores: charge, make room, enter; the depth reached, and what stopped it if something did."""
        packed, tree = tokens(prompt), self.trees[name]
        pin = self.index.match(tree, packed)
        granted = Grant.GIVEN
        while pin.depth < len(prompt) and (granted := self.room_for(name, RAW)) is Grant.GIVEN:
            self.index.attach(pin, packed, RAM, self.places(1, RAW), charged=RAW)
        if keep:
            self.pins.append(pin)
        else:
            self.index.unpin(pin)
        return pin.depth, granted

    def room_for(self, name: str, nbytes: int) -> Grant:
        account = self.account(name)
        while (granted := self.index.charge(account, RAM, [nbytes])[1]) is Grant.OVER_LIMIT:
            if not self.index.evict_own(account, RAM, nbytes):
                return granted
        while granted is Grant.GIVEN and self.held(RAM) > CAPACITY:
            if not self.index.evict(RAM, self.held(RAM) - CAPACITY, account):
                self.index.discharge(account, RAM, nbytes)
                return Grant.OTHERS_GUARANTEE
        return granted

    def check(self) -> None:
        check_integrity(self.index, self.pins)


def bytes_of(place: int) -> int:
    return place & 127


def prompt(first: int, blocks: int) -> str:
    return "".join(chr(first * 1000 + at) for at in range(blocks))


def whole_blocks(nbytes: int) -> int:
    return nbytes // RAW * RAW


def test_a_model_at_its_limit_gives_up_its_own_blocks() -> None:
    world = World({"one": {RAM: Quota(limit=300)}})
    world.store("two", prompt(1, 2))
    for first in range(3, 6):
        assert world.store("one", prompt(first, 3)) == (3, Grant.GIVEN)
    assert world.account("one").bytes[RAM] == 300
    assert world.account("two").bytes[RAM] == 200, "nobody else pays for it"
    world.check()


def test_a_model_at_its_limit_with_everything_leased_is_refused() -> None:
    world = World({"one": {RAM: Quota(limit=300)}})
    world.store("one", prompt(1, 3), keep=True)
    assert world.store("one", prompt(2, 3)) == (0, Grant.OVER_LIMIT)


def test_those_furthest_above_their_guarantee_lose_first() -> None:
    world = World({"one": {RAM: Quota(guaranteed=800)}, "two": {RAM: Quota(guaranteed=100)}})
    world.store("one", prompt(1, 9))
    world.store("two", prompt(2, 6))
    gone = world.index.evict(RAM, 100)
    assert len(gone) == 1
    assert world.account("two").bytes[RAM] == 500, "400 above its guarantee, and the other is 100 above"


def test_without_guarantees_the_oldest_goes_whosever_it_is() -> None:
    world = World()
    world.store("one", prompt(1, 2))
    world.store("two", prompt(2, 8))
    world.index.evict(RAM, 100)
    assert world.account("one").bytes[RAM] == 100


def test_the_first_guarantee_counts_leases_that_were_there_before() -> None:
    world = World()
    world.store("one", prompt(1, 4), keep=True)
    world.store("one", prompt(1, 2), keep=True)
    assert world.leased("one") == 0
    world.set_quotas({"two": {RAM: Quota(guaranteed=1000)}})
    assert world.leased("one") == 400
    world.check()
    world.set_quotas({})
    assert world.leased("one") == 0


def test_a_match_is_cut_short_where_it_would_lease_what_is_guaranteed_to_another() -> None:
    world = World()
    world.store("one", prompt(1, 15))
    world.set_quotas({"two": {RAM: Quota(guaranteed=1200)}})
    pin = world.index.match(world.trees["one"], tokens(prompt(1, 15)))
    assert pin.depth == 8
    assert world.leased("one") == 800
    again = world.index.match(world.trees["one"], tokens(prompt(1, 15)))
    assert again.depth == 8, "what is leased already costs nothing more"
    world.pins = [pin, again]
    world.check()


def test_encoded_copies_are_charged_by_their_length() -> None:
    world = World(encoded=True)
    world.store("one", prompt(1, 3), keep=True)
    pin = world.pins[0]
    world.index.fill(pin, 0, SSD, world.places(3, ENCODED))
    assert world.account("one").bytes == [0, 300, 120]
    world.index.unpin(world.pins.pop())
    node = next(world.trees["one"].nodes())
    held = hold(world.index, RAM, node.place(1, RAM))
    assert held is not None
    assert settle(world.index, held, world.places(1, ENCODED)[0])
    assert world.account("one").bytes == [0, 240, 120]
    assert world.index.copy_bytes == [0, 240, 120]
    world.check()


def test_no_more_goes_than_is_wanted_where_the_last_blocks_are_encoded_and_those_before_are_not() -> None:
    world = World(encoded=True)
    world.store("one", prompt(1, 10), keep=True)
    world.index.unpin(world.pins.pop())
    node = next(world.trees["one"].nodes())
    for at in (9, 8):
        held = hold(world.index, RAM, node.place(at, RAM), near=node)
        assert held is not None
        assert settle(world.index, held, world.places(1, ENCODED)[0])
    gone = world.index.evict(RAM, 2 * ENCODED + RAW)
    assert [copy.record_bytes for copy in gone] == [ENCODED, ENCODED, RAW]
    world.check()


def test_pressure_in_ram_takes_nothing_that_is_guaranteed_on_ssd() -> None:
    """The last copy of a block goes only with what hangs on it, and here that is guaranteed."""
    world = World({"one": {SSD: Quota(guaranteed=500)}})
    world.store("one", prompt(1, 3), keep=True)
    world.index.fill(world.pins[0], 2, SSD, world.places(1, RAW))
    world.index.unpin(world.pins.pop())
    world.store("two", prompt(2, 2))
    assert len(world.index.evict(RAM, 10 * RAW)) == 3, "one's last block, which is on ssd too, and two's"
    assert world.account("one").bytes == [0, 200, 100]
    world.check()
    assert len(world.index.evict(RAM, RAW, world.account("one"))) == 2, "its own needs may take it"
    world.check()


def scripts(verbs: list[str], *, least: int = 0) -> st.SearchStrategy[list[tuple[str, str, int, int]]]:
    """What is done, by which model, with which prompt, of how many blocks."""
    return st.lists(
        st.tuples(st.sampled_from(verbs), st.sampled_from(MODELS), st.integers(1, 6), st.integers(1, 12)),
        min_size=least,
        max_size=40,
    )


steps = scripts(["store", "keep", "match", "end", "evict", "own", "save", "encode", "erase", "lose"])
greedy_steps = scripts(["store", "keep", "keep", "keep", "match", "match", "end", "evict", "erase"], least=20)
quotas_of_all = st.fixed_dictionaries(
    {
        name: st.builds(lambda low, more: {RAM: Quota(low, low + more)}, st.integers(0, 600), st.integers(100, 2000))
        for name in MODELS
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps, quotas_of_all, st.booleans())
def test_every_count_is_exact_and_nobody_takes_what_is_guaranteed_to_another(
    script: list[tuple[str, str, int, int]], quotas: dict[str, dict[int, Quota]], encoded: bool
) -> None:
    world = World(quotas, encoded=encoded)
    for number, (verb, name, first, blocks) in enumerate(script):
        before = {account.name: account.bytes[RAM] for account in world.index.ledger.accounts.values()}
        act(world, verb, name, first, blocks, number)
        world.check()
        for other in MODELS:
            kept = min(before.get(other, 0), whole_blocks(quotas[other][RAM].guaranteed))
            if other != name and not encoded:
                assert world.account(other).bytes[RAM] >= kept, f"{verb} of {name} took from {other}"
    for pin in world.pins:
        world.index.unpin(pin)
    world.pins = []
    world.check()
    assert all(account.in_flight == [0, 0, 0] for account in world.index.ledger.accounts.values())


@settings(max_examples=100, deadline=None)
@given(greedy_steps, quotas_of_all, st.sampled_from(MODELS))
def test_what_is_guaranteed_can_be_had_at_any_time(
    script: list[tuple[str, str, int, int]], quotas: dict[str, dict[int, Quota]], mine: str
) -> None:
    """However wild the others are: they may store, lease and match as they like."""
    world = World(quotas)
    for number, (verb, name, first, blocks) in enumerate(script):
        if name != mine:
            act(world, verb, name, first, blocks, number)
    blocks = quotas[mine][RAM].guaranteed // RAW
    assert world.store(mine, prompt(30, blocks), keep=True)[0] == blocks
    world.check()


def act(world: World, verb: str, name: str, first: int, blocks: int, number: int) -> list[Gone]:
    index, tree = world.index, world.trees[name]
    if verb in ("store", "keep"):
        world.store(name, prompt(first, blocks), keep=verb == "keep")
    elif verb == "match":
        world.pins.append(index.match(tree, tokens(prompt(first, blocks))))
    elif verb == "end" and world.pins:
        index.unpin(world.pins.pop(number % len(world.pins)))
    elif verb == "evict":
        return index.evict(RAM, blocks * RAW, world.account(name))
    elif verb == "own":
        return index.evict_own(world.account(name), RAM, blocks * RAW)
    elif verb == "save" and world.pins and world.pins[-1].depth:
        pin = world.pins[-1]
        index.fill(pin, 0, SSD, world.places(pin.depth, ENCODED if tree.encoded else RAW))
    elif verb == "encode" and tree.encoded:
        for node in list(tree.nodes())[:1]:
            place = node.place(0, RAM)
            held = hold(index, RAM, place) if place != NOWHERE else None
            if held is not None:
                settle(index, held, world.places(1, ENCODED)[0])
    elif verb == "erase":
        index.erase(tree)
        gone = index.bury()
        world.trees[name] = world.make_tree(MODELS.index(name), name)
        world.trees[name].encoded = tree.encoded
        return gone
    elif verb == "lose" and world.pins and world.pins[-1].tree.model == name:
        pin = world.pins[-1]
        for at, place in enumerate(index.places(pin, RAM)[:1]):
            if place != NOWHERE:
                return index.lose(pin, at, RAM, place, Loss.CORRUPT)
    return []


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_without_quotas_has_none(level: int) -> None:
    assert World().account("one").quotas[level] == Quota(0, UNLIMITED)

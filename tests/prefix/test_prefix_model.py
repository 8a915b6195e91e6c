"""The prefix index against a naive model: a dictionary from (tree, path of blocks) to the places of its copies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.blocks.identity import BlockKey, Fingerprint, KeyChain, TenantDigest, TreeId
from kvpool.policy import POLICIES
from kvpool.prefix.history import Loss
from kvpool.prefix.index import Gone, Pin, PrefixIndex, SharingRules
from kvpool.prefix.integrity import check_integrity
from kvpool.prefix.node import GPU, LEVELS, NOWHERE, RAM, SSD, Node
from kvpool.prefix.restore import restore
from kvpool.prefix.tree import PrefixTree

SECRET = bytes(range(32))
SEGMENT_PLACES = 40
RECORD_BYTES = 100

Block = tuple[int, bytes]
"""A block's token and its extra key."""
Path = tuple[Block, ...]
Where = tuple[int, Path]
"""A tree's number and a path in it."""


class Record(NamedTuple):
    key: BlockKey
    parent: BlockKey
    depth: int
    tokens: bytes
    extra: bytes
    place: int


class Age(NamedTuple):
    """When a block was used last: between these, for a restored block may find its age of before."""

    low: int
    high: int


@dataclass
class Lease:
    pin: Pin
    tree: int
    path: Path
    """All blocks of the prompt; the lease covers the first `pin.depth`."""

    @property
    def covered(self) -> Path:
        return self.path[: self.pin.depth]


@dataclass
class Model:
    copies: dict[Where, dict[int, int]] = field(default_factory=dict)
    ages: dict[Where, Age] = field(default_factory=dict)
    clock: int = 0

    def use(self, tree: int, path: Path) -> None:
        self.clock += 1
        for end in range(1, len(path) + 1):
            self.ages[tree, path[:end]] = Age(self.clock, self.clock)

    def match(self, tree: int, path: Path) -> int:
        return next((end for end in range(len(path)) if (tree, path[: end + 1]) not in self.copies), len(path))

    def below(self, where: Where) -> Iterator[tuple[Where, dict[int, int]]]:
        tree, path = where
        for other, copies in self.copies.items():
            if other[0] == tree and len(other[1]) > len(path) and other[1][: len(path)] == path:
                yield other, copies

    def may_leave(self, where: Where, level: int) -> bool:
        copies = self.copies[where]
        return level in copies and not any(min(deeper) <= level for _, deeper in self.below(where))

    def put(self, where: Where, level: int, place: int) -> bool:
        copies = self.copies.setdefault(where, {})
        return copies.setdefault(level, place) == place

    def block_at(self, level: int, place: int) -> Where:
        return next(where for where, copies in self.copies.items() if copies.get(level) == place)

    def remove(self, where: Where, level: int) -> bool:
        """Whether it was the last copy."""
        del self.copies[where][level]
        if self.copies[where]:
            return False
        del self.copies[where]
        return True


blocks = st.tuples(st.integers(0, 1), st.sampled_from([b"", b"", b"", b"", b"", b"", b"x", b"y"]))
tails = st.lists(blocks, max_size=12).map(tuple) | st.lists(st.just((0, b"")), max_size=24).map(tuple)
levels = st.sampled_from([RAM, RAM, GPU, SSD])


class IndexAgainstModel(RuleBasedStateMachine):
    @initialize(
        block_tokens=st.integers(1, 2),
        protect=st.booleans(),
        max_shared=st.sampled_from([0, 3, 1000]),
        auto_detect=st.booleans(),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def open(self, block_tokens: int, protect: bool, max_shared: int, auto_detect: bool, policy: str) -> None:
        self.block_tokens = block_tokens
        self.index = PrefixIndex(
            limit_bytes=1 << 30,
            make_policy=POLICIES[policy].make_policy,
            make_learner=POLICIES[policy].make_learner,
            sharing=SharingRules(
                auto_detect=auto_detect,
                protect=protect,
                min_prefix_tokens=1,
                max_shared_bytes=max_shared * RECORD_BYTES,
            ),
            region_of={RAM: lambda place: place // 7, SSD: lambda place: place // SEGMENT_PLACES},
            clock=lambda: 5.0,
        )
        self.model = Model()
        self.leases: list[Lease] = []
        self.prompts: list[Path] = [()]
        self.trees: dict[int, PrefixTree] = {}
        self.places = 0
        self.epoch = 0
        self.current = [self.new_tree(), self.new_tree()]

    # -- what the rules are made of ------------------------------------------------------------------------------------

    def new_tree(self) -> int:
        self.epoch += 1
        tree_id = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), self.epoch)
        chain = KeyChain(SECRET, *tree_id)
        self.trees[self.epoch] = PrefixTree(
            tree_id, token_bytes=4 * self.block_tokens, record_bytes=RECORD_BYTES, chain=chain
        )
        return self.epoch

    def tree(self, which: int) -> tuple[int, PrefixTree]:
        number = self.current[which]
        self.trees[number] = self.index.add_tree(self.trees[number])
        return number, self.trees[number]

    def prompt(self, base: int, cut: int, tail: Path) -> Path:
        known = self.prompts[base % len(self.prompts)]
        path = known[: cut % (len(known) + 1)] + tail
        self.prompts.append(path[:40])
        return path[:40]

    def tokens(self, path: Path) -> bytes:
        return b"".join(token.to_bytes(4, "little") * self.block_tokens for token, _ in path)

    @staticmethod
    def extras(path: Path) -> dict[int, bytes] | None:
        return {at: extra for at, (_, extra) in enumerate(path) if extra} or None

    def new_places(self, count: int) -> list[int]:
        self.places += count
        return list(range(self.places - count, self.places))

    def lease(self, which: int) -> Lease:
        return self.leases[which % len(self.leases)]

    def leased(self) -> set[Where]:
        return {(lease.tree, lease.path[: at + 1]) for lease in self.leases for at in range(lease.pin.depth)}

    def is_open(self, tree: int) -> bool:
        return tree in self.current

    def lost(self, gone: list[Gone], *, may_be_leased: bool = False) -> list[Where]:
        """Take what left the index out of the model, one by one; nothing leased may be among it."""
        leased = self.leased()
        found = []
        for level, place, record_bytes, last in gone:
            where = self.model.block_at(level, place)
            assert may_be_leased or where not in leased
            assert record_bytes == RECORD_BYTES
            assert last == self.model.remove(where, level)
            found.append(where)
        return found

    # -- rules ---------------------------------------------------------------------------------------------------------

    @rule(
        which=st.integers(0, 1), base=st.integers(0, 50), cut=st.integers(0, 50), tail=tails, level=levels,
        most=st.integers(0, 40), batch=st.integers(1, 32), keep=st.booleans(),
    )  # fmt: skip
    def store(self, which: int, base: int, cut: int, tail: Path, level: int, most: int, batch: int, keep: bool) -> None:
        path = self.prompt(base, cut, tail)
        tokens, extras = self.tokens(path) + b"\1\1", self.extras(path)
        number, tree = self.tree(which)
        pin = self.index.match(tree, tokens, extras)
        lease = Lease(pin, number, path)
        assert pin.depth == self.model.match(number, path)
        self.model.use(number, path[: pin.depth])
        self.leases.append(lease)
        while pin.depth < min(len(path), most):
            places = self.new_places(min(batch, len(path) - pin.depth))
            first = pin.depth
            refused = self.index.attach(pin, tokens, level, places, extras)
            self.model.use(number, lease.covered)
            entered = [self.model.put((number, path[: first + at + 1]), level, p) for at, p in enumerate(places)]
            assert refused == [place for place, taken in zip(places, entered, strict=True) if not taken]
            assert pin.depth == first + len(places)
        if not keep:
            self.leases.remove(lease)
            self.index.unpin(pin)

    @rule(
        which=st.integers(0, 1),
        base=st.integers(0, 50),
        cut=st.integers(0, 50),
        tail=tails,
        most=st.none() | st.integers(0, 30),
    )
    def match(self, which: int, base: int, cut: int, tail: Path, most: int | None) -> None:
        path = self.prompt(base, cut, tail)
        number, tree = self.tree(which)
        pin = self.index.match(tree, self.tokens(path), self.extras(path), most)
        expected = self.model.match(number, path)
        assert pin.depth == (expected if most is None else min(expected, most))
        self.model.use(number, path[: pin.depth])
        self.leases.append(Lease(pin, number, path))
        for level in LEVELS:
            known = [self.model.copies[number, path[: at + 1]].get(level, NOWHERE) for at in range(pin.depth)]
            assert self.index.places(pin, level) == known

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50))
    def close(self, which: int) -> None:
        self.index.unpin(self.leases.pop(which % len(self.leases)).pin)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50), depth=st.integers(0, 30))
    def shorten(self, which: int, depth: int) -> None:
        pin = self.lease(which).pin
        expected = min(depth, pin.depth)
        self.index.shorten(pin, depth)
        assert pin.depth == expected

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50))
    def advance(self, which: int) -> None:
        lease = self.lease(which)
        reach = self.model.match(lease.tree, lease.path) if self.is_open(lease.tree) else 0
        expected = max(reach - lease.pin.depth, 0)
        assert self.index.advance(lease.pin, self.tokens(lease.path), self.extras(lease.path)) == expected
        if expected:
            self.model.use(lease.tree, lease.covered)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50), first=st.integers(0, 8), level=levels, wanted=st.lists(st.booleans(), max_size=20))
    def fill(self, which: int, first: int, level: int, wanted: list[bool]) -> None:
        lease = self.lease(which)
        wanted = wanted[: max(lease.pin.depth - first, 0)]
        new = iter(self.new_places(len(wanted)))
        places = [next(new) if want else NOWHERE for want in wanted]
        expected = []
        for at, place in enumerate(places):
            where = (lease.tree, lease.path[: first + at + 1])
            if place != NOWHERE and not (self.is_open(lease.tree) and self.model.put(where, level, place)):
                expected.append(place)
        assert self.index.fill(lease.pin, first, level, places) == expected

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50), depth=st.integers(0, 30), level=levels)
    def lose(self, which: int, depth: int, level: int) -> None:
        lease = self.lease(which)
        if depth >= lease.pin.depth:
            return
        where = (lease.tree, lease.path[: depth + 1])
        place = self.model.copies.get(where, {}).get(level, NOWHERE)
        gone = self.index.lose(lease.pin, depth, level, place, Loss.CORRUPT)
        assert len(gone) == (place != NOWHERE)
        assert self.lost(gone, may_be_leased=True) == [where] * len(gone)

    @rule(level=levels, count=st.integers(1, 40))
    def evict(self, level: int, count: int) -> None:
        flags = self.shared_flags()
        gone = self.index.evict(level, count * RECORD_BYTES)
        freed = 0
        for position, copy in enumerate(gone):
            where = self.model.block_at(copy.level, copy.place)
            victims = self.victims(level, flags)
            assert where not in self.leased()
            if copy.level == level and where in victims:
                freed += 1
                assert len(self.model.copies[where]) > 1 or not any(self.model.below(where))
            else:
                self.check_orphan(where, level, victims)
            assert copy.last == self.model.remove(where, copy.level), position
        assert freed <= count
        if freed < count and len(gone) < 32:
            assert not self.victims(level, flags)

    def victims(self, level: int, flags: dict[Where, bool]) -> set[Where]:
        """The blocks of which one has to go next."""
        leased = self.leased()
        candidates = [
            where for where in self.model.copies if where not in leased and self.model.may_leave(where, level)
        ]
        rules = self.index.sharing
        shared_bytes = sum(
            RECORD_BYTES for where, copies in self.model.copies.items() if level in copies and flags[where]
        )
        if rules.protect and shared_bytes <= rules.max_shared_bytes:
            candidates = [where for where in candidates if not flags[where]] or candidates
        oldest = min((self.model.ages[where].high for where in candidates), default=0)
        return {where for where in candidates if self.model.ages[where].low <= oldest}

    def check_orphan(self, where: Where, level: int, victims: set[Where]) -> None:
        """It went because a victim above it goes whose only copy lies at `level`; nothing deeper is left."""
        assert not any(self.model.below(where))
        assert any(
            set(self.model.copies[victim]) == {level} and where in dict(self.model.below(victim)) for victim in victims
        )

    def shared_flags(self) -> dict[Where, bool]:
        return {where: node.shared for where, (node, _) in self.contents().items()}

    @rule(protect=st.booleans(), max_shared=st.sampled_from([0, 3, 6, 1000]))
    def reload(self, protect: bool, max_shared: int) -> None:
        rules = self.index.sharing
        self.index.sharing = replace(rules, protect=protect, max_shared_bytes=max_shared * RECORD_BYTES)

    @rule(segment=st.integers(0, 50), keep_leased=st.booleans())
    def vacate(self, segment: int, keep_leased: bool) -> None:
        segments = sorted(self.index.residents[SSD])
        if not segments:
            return
        segment = segments[segment % len(segments)]
        for node in list(self.index.residents[SSD][segment]):
            while True:
                gone, complete = self.index.vacate(node, segment, keep_leased=keep_leased)
                self.lost(gone, may_be_leased=not keep_leased)
                assert all(copy.level == SSD and copy.place // SEGMENT_PLACES == segment for copy in gone)
                if not gone or not complete:
                    break
        leased = self.leased()
        for where, copies in self.model.copies.items():
            if SSD in copies and copies[SSD] // SEGMENT_PLACES == segment:
                assert keep_leased
                assert where[0] in {tree for tree, _ in leased}

    @rule(level=st.sampled_from([RAM, SSD]), place=st.integers(0, 500))
    def move(self, level: int, place: int) -> None:
        here = sorted(copies[level] for copies in self.model.copies.values() if level in copies)
        if not here:
            return
        old = here[place % len(here)]
        residents = self.index.residents[level][self.index.region_of[level](old)]
        node = next(node for node in residents if old in (node.places[level] or ()))
        where = self.model.block_at(level, old)
        (new,) = self.new_places(1)
        moved = self.index.move(node, level, old, new)
        assert moved == (where not in self.leased()), "a leased block is never moved"
        if moved:
            self.model.copies[where][level] = new
            assert not self.index.move(node, level, old, new)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50))
    def mark_shared(self, which: int) -> None:
        lease = self.lease(which)
        self.index.mark_shared(lease.pin)
        assert not self.is_open(lease.tree) or self.index.shared_blocks(lease.pin) == lease.pin.depth

    @rule(limit=st.integers(0, 100))
    def shrink(self, limit: int) -> None:
        self.index.limit_bytes = self.index.bytes * limit // 100
        while gone := self.index.shrink():
            self.lost(gone)
        if self.index.over_limit:
            leased = self.leased()
            assert all(
                where in leased or any(other in leased for other, _ in self.model.below(where))
                for where in self.model.copies
            )
        self.index.limit_bytes = 1 << 30

    @rule(which=st.integers(0, 1), bury=st.integers(0, 5))
    def erase(self, which: int, bury: int) -> None:
        self.index.erase(self.trees[self.current[which]])
        self.current[which] = self.new_tree()
        for _ in range(bury):
            self.lost(self.index.bury())

    @rule()
    def bury(self) -> None:
        while gone := self.index.bury():
            self.lost(gone)
        leased = {lease.tree for lease in self.leases}
        assert all(self.is_open(tree) or tree in leased for tree, _ in self.model.copies)

    @rule(which=st.integers(0, 1), count=st.integers(1, 4), seed=st.integers(0, 1 << 20))
    def restore(self, which: int, count: int, seed: int) -> None:
        """Records of some prompts, of which some are missing, in any order."""
        chance = random.Random(seed)
        number, tree = self.tree(which)
        paths = {path[: at + 1] for path in chance.choices(self.prompts, k=count) for at in range(len(path))}
        kept = {path for path in paths if chance.random() < 0.9}
        records = [self.record(tree, path, self.new_places(1)[0]) for path in sorted(kept)]
        chance.shuffle(records)
        reachable = {path for path in kept if all(path[:end] in kept for end in range(1, len(path)))}
        orphans = {
            record.place
            for record, path in ((r, self.path_of(r, sorted(kept), tree)) for r in records)
            if path not in reachable
        }
        result = restore(self.index, tree, records)
        refused = set()
        for record in records:
            if record.place not in orphans:
                where = (number, self.path_of(record, sorted(kept), tree))
                if SSD in self.model.copies.get(where, {}):
                    refused.add(record.place)
                    continue
                if where not in self.model.copies:
                    before = self.model.ages.get(where, Age(0, 0))
                    self.model.ages[where] = Age(0, before.high)
                self.model.put(where, SSD, record.place)
        assert set(result.orphans) == orphans
        assert set(result.duplicates) == refused
        assert result.blocks == len(records) - len(orphans) - len(refused)

    def record(self, tree: PrefixTree, path: Path, place: int) -> Record:
        size = tree.token_bytes
        tokens = self.tokens(path)
        keys = [tree.chain.root, *tree.chain.keys(tokens, size, self.extras(path))]
        return Record(keys[-1], keys[-2], len(path) - 1, tokens[-size:], path[-1][1], place)

    def path_of(self, record: Record, paths: list[Path], tree: PrefixTree) -> Path:
        return next(path for path in paths if self.record(tree, path, 0).key == record.key)

    # -- what holds after every rule -----------------------------------------------------------------------------------

    def contents(self) -> dict[Where, tuple[Node, dict[int, int]]]:
        found: dict[Where, tuple[Node, dict[int, int]]] = {}
        for number, tree in self.trees.items():
            if tree.erased or self.index.trees.get(tree.id) is tree:
                self.collect(number, tree.root, (), found)
        return found

    def collect(self, number: int, node: Node, path: Path, found: dict[Where, Any]) -> None:
        size = node.tree.token_bytes
        for at in range(node.blocks):
            token = int.from_bytes(node.tokens[at * size : at * size + 4], "little")
            path = (*path, (token, node.extra if at == 0 else b""))
            copies = {level: node.place(at, level) for level in LEVELS if node.place(at, level) != NOWHERE}
            if copies:
                found[number, path] = (node, copies)
        for child in node.children.values():
            self.collect(number, child, path, found)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "index"):
            return
        assert {where: copies for where, (_, copies) in self.contents().items()} == self.model.copies
        check_integrity(self.index, [lease.pin for lease in self.leases])

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for lease in self.leases:
            self.index.unpin(lease.pin)
        self.leases.clear()
        for level in LEVELS:
            while gone := self.index.evict(level, 1 << 40):
                self.lost(gone)
        while gone := self.index.bury():
            self.lost(gone)
        check_integrity(self.index, [])
        assert not self.model.copies
        assert (self.index.bytes, self.index.blocks, self.index.trees) == (0, 0, {})


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

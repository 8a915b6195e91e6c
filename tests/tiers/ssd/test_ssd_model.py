"""The ssd tier against a dictionary, through everything that an engine, an operator and bad luck may do to it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.place import segment_of
from kvpool.tiers.ssd.segment import RecoveredRecord
from kvpool.tiers.ssd.space import SMALL_FILES_BYTES
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

from .accounts import check_accounts
from .conftest import SHARED_MEMORY
from .disks import Fault, FaultyDisk, QuickDisk, nothing, the_nth
from .records import all_recovered, is_record, read, record, sound

MODELS = 3


class Stored(NamedTuple):
    model: int
    number: int
    pages: int


class SsdAgainstDictionary(RuleBasedStateMachine):
    """`stored` is what must be there, `maybe` what may come back after a restart: it was dropped, but not freed."""

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("kvpool").setLevel(logging.CRITICAL)
        where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.root = Path(tempfile.mkdtemp(dir=where, prefix="kvpool-test-"))
        self.tier: SsdTier | None = None
        self.stored: dict[int, Stored] = {}
        self.maybe: dict[int, Stored] = {}
        self.unsure: set[int] = set()
        self.number = self.lives = 0

    @initialize(segment_pages=st.integers(4, 24), segments=st.integers(2, 7), direct_io=st.booleans())
    def begin(self, segment_pages: int, segments: int, direct_io: bool) -> None:
        self.segment_bytes = segment_pages * PAGE_BYTES
        self.capacity_bytes = self.allowed_bytes = SMALL_FILES_BYTES + segments * self.segment_bytes
        self.direct_io = direct_io
        self.directory = self.root / "0"
        self.open()

    def open(self) -> None:
        self.disk = FaultyDisk(QuickDisk())
        self.tier = SsdTier.open(
            self.directory, capacity_bytes=self.capacity_bytes, segment_bytes=self.segment_bytes,
            direct_io=self.direct_io, disk=self.disk,
        )  # fmt: skip
        assert self.tier.used_bytes <= self.capacity_bytes
        self.allowed_bytes = self.capacity_bytes
        found = all_recovered(self.tier)
        assert len({record.place for record in found}) == len(found)
        whole = {number for _, number in sound(self.tier, found)}
        self.all_whole = len(whole) == len(found)
        before = {**self.maybe, **self.stored}
        recovered = {record.place: self.known(record, before) for record in found}
        if not self.tier.recovery.dropped["over-capacity"] and self.all_whole:
            assert self.stored.keys() <= recovered.keys()
        self.stored = {place: was for place, was in recovered.items() if was.number in whole}
        self.tier.drop([place for place in recovered if place not in self.stored])
        there = {info.id for info in self.tier.segments()}  # the ids of others may be given away again
        self.maybe = {
            place: was for place, was in before.items() if place not in self.stored and segment_of(place) in there
        }

    def known(self, record: RecoveredRecord, before: dict[int, Stored]) -> Stored:
        """What the record is: one that was stored, or one whose put failed after it was written."""
        was = before.get(record.place)
        if was is None:
            assert record.depth in self.unsure, "a record came back of which nobody knew"
            return Stored(int(record.fingerprint[6:7]), record.depth, record.record_bytes // PAGE_BYTES)
        assert (was.number, was.pages) == (record.depth, record.record_bytes // PAGE_BYTES)
        return was

    @rule(
        model=st.integers(0, MODELS - 1), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
        reclaim=st.booleans(), fault=st.none() | st.tuples(st.integers(1, 12), st.sampled_from(Fault)),
    )  # fmt: skip
    def put(self, model: int, sizes: list[int], reclaim: bool, fault: tuple[int, Fault] | None) -> None:
        assert self.tier is not None
        numbers = range(self.number, self.number + len(sizes))
        self.number += len(sizes)
        free = self.tier.free_segments
        if fault is not None:
            self.disk.plan = the_nth(self.disk.calls + fault[0], fault[1])
        buffers = [record(number, model=model, pages=pages) for number, pages in zip(numbers, sizes, strict=True)]
        try:
            places = self.tier.put(buffers, reclaim=reclaim)
        except TierUnavailableError:
            assert fault is not None
            self.unsure.update(numbers)
            places = [None] * len(sizes)
        self.disk.plan = nothing
        usual = (2 + 4 * sizes[0]) * PAGE_BYTES <= self.segment_bytes
        assert places[0] is not None or fault is not None or not free or not usual, "refused although there was room"
        for number, pages, place in zip(numbers, sizes, places, strict=True):
            if place is not None:
                assert place not in self.stored
                assert place not in self.maybe
                self.stored[place] = Stored(model, number, pages)

    @rule(pick=st.integers(0, 1000))
    def get(self, pick: int) -> None:
        assert self.tier is not None
        known = sorted(self.stored)
        if known:
            place = known[pick % len(known)]
            was = self.stored[place]
            assert is_record(read(self.tier, place), was.number, model=was.model, pages=was.pages)
        if self.maybe:
            place = sorted(self.maybe)[pick % len(self.maybe)]
            assert read(self.tier, place) is None

    @rule(pick=st.integers(0, 1000), count=st.integers(1, 8))
    def drop(self, pick: int, count: int) -> None:
        assert self.tier is not None
        known = sorted(self.stored)
        places = known[pick % len(known) :][:count] if known else []
        self.tier.drop(places)
        for place in places:
            self.maybe[place] = self.stored.pop(place)

    @rule(pick=st.integers(0, 1000))
    def free(self, pick: int) -> None:
        assert self.tier is not None
        infos = self.tier.segments()
        if infos:
            segment = infos[pick % len(infos)].id
            assert self.tier.free_segment(segment)
            self.forget(segment)

    def forget(self, segment: int) -> None:
        for known in (self.stored, self.maybe):
            for place in [place for place in known if segment_of(place) == segment]:
                del known[place]

    @rule()
    def seal(self) -> None:
        assert self.tier is not None
        self.tier.seal_all()
        assert all(info.sealed for info in self.tier.segments())

    @rule(segments=st.integers(2, 7))
    def resize(self, segments: int) -> None:
        assert self.tier is not None
        before = self.tier.used_bytes
        self.capacity_bytes = SMALL_FILES_BYTES + segments * self.segment_bytes
        self.tier.resize(self.capacity_bytes)
        self.allowed_bytes = max(self.capacity_bytes, min(before, self.tier.used_bytes))

    @rule(segments=st.none() | st.integers(2, 7))
    def restart(self, segments: int | None) -> None:
        assert self.tier is not None
        self.tier.close()
        if segments is not None:
            self.capacity_bytes = SMALL_FILES_BYTES + segments * self.segment_bytes
        self.open()

    @rule()
    def crash(self) -> None:
        self.next_life()
        self.open()

    @rule(where=st.floats(0, 1, exclude_max=True), pick=st.integers(0, 1000), bit=st.integers(0, 7))
    def crash_with_damage(self, where: float, pick: int, bit: int) -> None:
        self.next_life()
        files = sorted(self.directory.glob("*.segment"))
        if files:
            path = files[pick % len(files)]
            data = bytearray(path.read_bytes())
            data[int(where * len(data))] ^= 1 << bit
            path.write_bytes(data)
            segment = int(path.stem, 16)
            for place in [place for place in self.stored if segment_of(place) == segment]:
                self.maybe[place] = self.stored.pop(place)
        self.open()

    def next_life(self) -> None:
        """Go on with a copy of the directory, as a kill would leave it."""
        assert self.tier is not None
        self.lives += 1
        left = self.root / str(self.lives)
        shutil.copytree(self.directory, left)
        self.tier.close()
        shutil.rmtree(self.directory)
        self.directory = left

    @precondition(lambda self: self.tier is not None)
    @invariant()
    def the_bounds_hold(self) -> None:
        assert self.tier is not None
        used = self.tier.used_bytes
        assert used <= self.allowed_bytes
        self.allowed_bytes = max(self.capacity_bytes, used)
        on_disk = sum(path.stat().st_blocks * 512 for path in self.directory.iterdir())
        assert on_disk <= max(used, self.capacity_bytes)
        if used <= self.capacity_bytes:
            check_accounts(self.tier)

    @precondition(lambda self: self.tier is not None)
    @invariant()
    def the_tier_holds_what_the_dictionary_says(self) -> None:
        assert self.tier is not None
        held = {place for info in self.tier.segments() for place in self.tier.places_in(info.id)}
        assert held == self.stored.keys()
        assert self.tier.stats().live_records == len(held)

    def teardown(self) -> None:
        if self.tier is not None:
            for place, known in self.stored.items():
                found = read(self.tier, place)
                assert is_record(found, known.number, model=known.model, pages=known.pages)
            self.tier.close()
            assert self.disk.open_fds == set()
        shutil.rmtree(self.root)


SsdAgainstDictionary.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSsdAgainstDictionary = SsdAgainstDictionary.TestCase

"""The tier against a plain model: a dictionary from each place to its owner and its bytes.

On a device that works late, in a random order: whatever the order on the host, what the model says is there, is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.extents import Bytes
from kvpool.tiers.gpu.tier import GpuTier
from kvpool.tiers.gpu.transfer import Transfer

from .devices import LateDevice

PAGES = 48
SIZES = st.sampled_from([2, 3, 5, 8, 16]).map(lambda pages: pages * PAGE_BYTES)
OWNERS = st.sampled_from("abc")
PICKS = st.lists(st.integers(0, 1 << 16), max_size=6)


@dataclass
class Block:
    """`byte` fills the payload; None: whatever `owner` may see."""

    record_bytes: int
    owner: str | None
    byte: int | None = None
    transfers: list[Transfer] = field(default_factory=list)
    used_by_kernels: bool = False


class TierAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[int, Block] = {}
        self.downloads: list[tuple[Transfer, Bytes, int]] = []
        self.written_by: dict[int, str | None] = {0: None}
        """Byte -> the owner that wrote it; None: nobody's secret."""
        self.doomed: set[int] = set()

    @initialize(
        seed=st.integers(0, 1 << 30), direct=st.booleans(), streams=st.integers(1, 4), buffers=st.integers(1, 3)
    )
    def open(self, seed: int, direct: bool, streams: int, buffers: int) -> None:
        self.device = LateDevice(seed, direct=direct)
        self.tier = GpuTier(
            PAGES * PAGE_BYTES, device=self.device, streams=streams, extent_bytes=8 * PAGE_BYTES, margin_bytes=0,
            staging_buffer_bytes=3 * PAGE_BYTES + 5, staging_buffers=buffers,
        )  # fmt: skip

    @rule(record_bytes=SIZES, count=st.integers(0, 9), owner=OWNERS)
    def allocate(self, record_bytes: int, count: int, owner: str) -> None:
        for place in self.tier.allocate_many(record_bytes, count, owner):
            assert place not in self.blocks
            self.blocks[place] = Block(record_bytes, owner)
            self.device.queue(self.device.engine_stream, partial(self.look, self.tier.record(place).numpy(), owner))

    @rule(sizes=st.lists(SIZES, max_size=5))
    def put(self, sizes: Sequence[int]) -> None:
        marks = [self.new_byte(None) for _ in sizes]
        places = self.tier.put([np.full(nbytes, mark, np.uint8) for nbytes, mark in zip(sizes, marks, strict=True)])
        for place, nbytes, mark in zip(places, sizes, marks, strict=True):
            if place is not None:
                assert place not in self.blocks
                self.blocks[place] = Block(nbytes, None, mark)

    @rule(picks=PICKS)
    def engine_writes(self, picks: Sequence[int]) -> None:
        for place in self.idle(picks):
            block = self.blocks[place]
            block.byte = self.new_byte(block.owner)
            block.used_by_kernels = True
            self.device.queue(self.device.engine_stream, partial(self.tier.payload(place).numpy().fill, block.byte))

    @rule(picks=PICKS, wait=st.booleans())
    def upload(self, picks: Sequence[int], wait: bool) -> None:
        places = [place for place in self.idle(picks) if not self.blocks[place].used_by_kernels]
        if places:
            payloads = []
            for place in places:
                block = self.blocks[place]
                block.byte = self.new_byte(block.owner)
                payloads.append(np.full(block.record_bytes - PAGE_BYTES, block.byte, np.uint8))
            transfer = self.tier.upload(places, payloads)
            for place in places:
                self.blocks[place].transfers.append(transfer)
            if wait:
                assert transfer.wait(10)

    @rule(picks=PICKS)
    def download(self, picks: Sequence[int]) -> None:
        places = [place for place in self.idle(picks) if self.blocks[place].byte is not None]
        if places:
            into = [np.zeros(self.blocks[place].record_bytes - PAGE_BYTES, np.uint8) for place in places]
            transfer = self.tier.download(places, into)
            for place, target in zip(places, into, strict=True):
                byte = self.blocks[place].byte
                assert byte is not None
                self.blocks[place].transfers.append(transfer)
                self.downloads.append((transfer, target, byte))

    @rule(picks=PICKS)
    def drop(self, picks: Sequence[int]) -> None:
        """Even while transfers are under way."""
        places = self.picked(picks)
        self.tier.drop(places)
        for place in places:
            del self.blocks[place]
            self.doomed.discard(place)

    @rule(pages=st.sampled_from([PAGES, PAGES, 24, 8]))
    def resize(self, pages: int) -> None:
        self.doomed = set(self.tier.resize(pages * PAGE_BYTES))
        assert self.doomed <= self.blocks.keys()

    @rule(pages=st.integers(0, 20))
    def give_back(self, pages: int) -> None:
        assert set(self.tier.give_back(pages * PAGE_BYTES)) <= self.blocks.keys()

    @rule()
    def device_catches_up(self) -> None:
        self.device.run()

    @rule()
    def all_is_there(self) -> None:
        self.settle()
        for place, block in self.blocks.items():
            if block.byte is not None:
                assert (self.tier.payload(place).numpy() == block.byte).all()

    @invariant()
    def all_is_accounted_for(self) -> None:
        if hasattr(self, "tier"):
            self.tier.slab.check_integrity()
            assert self.tier.used_bytes >= sum(block.record_bytes for block in self.blocks.values())
            assert self.tier.stats().staging_bytes <= 3 * (3 * PAGE_BYTES + 5)

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.settle()
            assert self.tier.used_bytes == sum(block.record_bytes for block in self.blocks.values())
            self.tier.close()
            assert self.tier.stats().reserved_bytes == 0

    def settle(self) -> None:
        while self.tier.stats().in_flight:
            self.device.run()
        self.device.run()
        assert all((target == byte).all() for _, target, byte in self.downloads)
        self.downloads.clear()

    def look(self, record: Bytes, owner: str) -> None:
        """What the engine does first with a place that it was given."""
        seen = set(np.unique(record).tolist())
        assert all(self.written_by[byte] in (None if byte == 0 else owner, owner) for byte in seen), seen

    def new_byte(self, owner: str | None) -> int:
        """One that was not in use lately; whose it is from now on. 255 writes are more than a run has."""
        byte = len(self.written_by)
        self.written_by[byte] = owner
        return byte

    def picked(self, picks: Sequence[int]) -> list[int]:
        places = list(self.blocks)
        return list(dict.fromkeys(places[pick % len(places)] for pick in picks)) if places else []

    def idle(self, picks: Sequence[int]) -> list[int]:
        """Places that no transfer is under way for: nobody else may write them meanwhile."""
        return [place for place in self.picked(picks) if all(each.done for each in self.blocks[place].transfers)]


TestGpuTierAgainstModel = TierAgainstModel.TestCase
TestGpuTierAgainstModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

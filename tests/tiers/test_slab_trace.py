"""Five models share one slab, and their shares of the traffic drift: it stays usable, and serves from its pool."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from random import Random

import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.slab import Slab

MIB = 1 << 20
PAYLOAD_BYTES = [int(1.4 * MIB), 256 << 10, 2 * MIB, 8 * MIB, 640 << 10]
SCALE = 64
RECORD_BYTES = [PAGE_BYTES + payload // SCALE // PAGE_BYTES * PAGE_BYTES for payload in PAYLOAD_BYTES]
DRIFT = 400
"""Allocations after which the models' shares of the traffic are drawn anew."""


def requests(seed: int, count: int) -> Iterator[int]:
    """The sizes that are asked for; a model's share of the bytes goes from nothing to nearly all, and back."""
    random = Random(seed)
    for step in range(count):
        if step % DRIFT == 0:
            shares = [random.random() ** 3 + 0.01 for _ in RECORD_BYTES]
        yield random.choices(RECORD_BYTES, [share / size for share, size in zip(shares, RECORD_BYTES, strict=True)])[0]


class Cache:
    """Blocks in a slab, the least recently stored first; room is made as the engine makes it."""

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self.blocks: OrderedDict[int, int] = OrderedDict()
        self.evicted = 0

    def store(self, slot_bytes: int) -> None:
        slot = self.slab.allocate(slot_bytes)
        while slot is None:
            if self.blocks:
                self.slab.free(self.blocks.popitem(last=False)[0])
                self.evicted += 1
            slot = self.slab.allocate(slot_bytes)
            if slot is None and (occupied := self.slab.movable_extent(slot_bytes)) is not None:
                self.move(occupied)
        self.blocks[slot] = slot_bytes

    def move(self, slots: list[int]) -> None:
        """To the other end of the line, as if it had been used: good enough here."""
        for slot in slots:
            slot_bytes = self.blocks.pop(slot)
            fresh = self.slab.allocate(slot_bytes)
            assert fresh is not None
            self.slab.free(slot)
            self.blocks[fresh] = slot_bytes


@pytest.mark.parametrize("capacity_mib", [16, 64], ids=["16 largest records an eighth of it", "like 4 GiB and more"])
@pytest.mark.parametrize("seed", [1, 2])
def test_five_models_whose_mix_drifts_leave_90_percent_usable_and_95_percent_pooled(
    seed: int, capacity_mib: int
) -> None:
    count = 16_000
    slab = Slab(capacity_mib * MIB)
    cache = Cache(slab)
    least_usable = least_used = 1.0
    for step, slot_bytes in enumerate(requests(seed, count)):
        cache.store(slot_bytes)
        if cache.evicted and step % 20 == 0:
            stats = slab.stats()
            least_usable = min(least_usable, stats.usable_share)
            least_used = min(least_used, stats.used_bytes / stats.capacity_bytes)
    slab.check_integrity()
    assert cache.evicted > count / 2, "the slab was full most of the time"
    assert least_usable >= 0.90
    assert least_used >= 0.90
    assert 1 - slab.stats().mapped / count >= 0.95
    assert slab.stats().extents < 256, "extents do not get ever smaller"
    slab.close()

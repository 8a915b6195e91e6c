"""The slab allocator: how long a slot takes, and how much is served from memory that is there."""

import random
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import cast

from kvpool.bench.area import Conditions
from kvpool.bench.rounds import of_pairs
from kvpool.bench.row import Figure, Row, at_least, at_most
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.slab import Slab

SLOTS = 1_024
SHORT_ROUNDS = 15
SLOT_BYTES = 16 << 10
TRACE_STEPS = 60_000
TRACE_CAPACITY_BYTES = 2 << 30
"""Mapped, and never touched."""
FIVE_MODELS = tuple((kib << 10) + PAGE_BYTES for kib in (256, 1_440, 2_048, 4_096, 8_192))
"""Record sizes; the second is a small model's of three heads."""
_PHASE_STEPS = 5_000
_SAMPLED_EVERY = 100
_NS = 1e9


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `slots`."""
    slots = conditions.scaled(SLOTS)
    slab = Slab(SLOT_BYTES * slots * 2)
    _allocate_and_free(slab, slots)
    rounds = [(_allocate_and_free(slab, slots), _dictionary(slots)) for _ in range(SHORT_ROUNDS * conditions.rounds)]
    allocations = of_pairs([(ours[0], bare[0]) for ours, bare in rounds])
    frees = of_pairs([(ours[1], bare[1]) for ours, bare in rounds])
    yield Row("slots.allocate", "ns", allocations.in_unit(_NS), at_most(200))
    yield Row("slots.free", "ns", frees.in_unit(_NS), at_most(200))
    steps = conditions.scaled(TRACE_STEPS)
    slab = Slab(TRACE_CAPACITY_BYTES)
    usable = min(_five_models(slab, steps))
    yield Row("slots.served-from-the-pool", "%", Figure(100 * (1 - slab.stats().mapped / steps)), at_least(95))
    yield Row("slots.usable-capacity", "%", Figure(100 * usable), at_least(90))


def _allocate_and_free(slab: Slab, slots: int) -> tuple[float, float]:
    """Seconds of one call each."""
    allocate, free = slab.allocate, slab.free
    began_s = perf_counter()
    taken = cast(list[int], [allocate(SLOT_BYTES) for _ in range(slots)])  # there is room for all
    allocated_s = perf_counter()
    for slot in taken:
        free(slot)
    return (allocated_s - began_s) / slots, (perf_counter() - allocated_s) / slots


def _dictionary(slots: int) -> tuple[float, float]:
    """Seconds of an entry and a removal: the least that keeping track of slots takes."""
    taken: dict[int, int] = {}
    began_s = perf_counter()
    for slot in range(slots):
        taken[slot] = slot
    entered_s = perf_counter()
    for slot in range(slots):
        taken.pop(slot)
    return (entered_s - began_s) / slots, (perf_counter() - entered_s) / slots


def _five_models(slab: Slab, steps: int) -> Iterator[float]:
    """Plays a trace in which five models store by turns and the oldest block makes room, as in a pool.

    The mix changes every so many steps: one or two models store most, and others fall silent. Yields the share of the
    capacity that is usable, now and then.
    """
    blocks = _Blocks(slab)
    rng = random.Random(5)  # noqa: S311 - a trace, not a secret
    weights = [1] * len(FIVE_MODELS)
    for step in range(steps):
        if step % _PHASE_STEPS == 0:
            weights = [rng.choice((0, 1, 1, 8)) for _ in FIVE_MODELS[1:]] + [1]
        blocks.store(rng.choices(FIVE_MODELS, weights)[0])
        if step % _SAMPLED_EVERY == 0:
            yield slab.stats().usable_share


class _Blocks:
    """Blocks in slots, oldest first. A block is a list that holds its slot, for it may be moved to another."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._by_age: deque[list[int]] = deque()
        self._by_slot: dict[int, list[int]] = {}

    def store(self, slot_bytes: int) -> None:
        slot = self._slab.allocate(slot_bytes)
        while slot is None:
            self._evict_oldest()
            self._move_together(slot_bytes)
            slot = self._slab.allocate(slot_bytes)
        block = [slot]
        self._by_age.append(block)
        self._by_slot[slot] = block

    def _evict_oldest(self) -> None:
        (slot,) = self._by_age.popleft()
        del self._by_slot[slot]
        self._slab.free(slot)

    def _move_together(self, slot_bytes: int) -> None:
        """Empty an extent of another size, if its blocks fit elsewhere."""
        for old in self._slab.movable_extent(slot_bytes) or ():
            size = self._slab.slot_bytes(old)
            assert size is not None
            new = self._slab.allocate(size)
            assert new is not None
            self._by_slot[new] = block = self._by_slot.pop(old)
            block[0] = new
            self._slab.free(old)

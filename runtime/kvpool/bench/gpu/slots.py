"""Slots of the gpu tier: how long it takes to find a hit, and how many are served from memory that is there."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.rounds import Measure, alone, beside, seconds_per_call
from kvpool.bench.row import Figure, Row, at_least, at_most
from kvpool.blocks.layout import PAGE_BYTES

if TYPE_CHECKING:
    from kvpool.tiers.gpu.tier import GpuTier

BLOCKS = 4_096
CALLS = 20_000
STEPS = 30_000
CAPACITY_BYTES = 64 << 20
FIVE_MODELS = tuple((kib << 10) + PAGE_BYTES for kib in (16, 88, 128, 256, 512))
"""Record sizes: those of the engine's own benchmark, a sixteenth as large, in a capacity that is too."""
_PHASE_STEPS = 2_500
_NS, _US = 1e9, 1e6


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `slots`."""
    try:
        from kvpool.bench.gpu.machine import Machine
        from kvpool.tiers.gpu.tier import GpuTier
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed") from None
    rounds = 5 * conditions.rounds
    calls = conditions.scaled(CALLS)
    blocks = conditions.scaled(BLOCKS, least=64)
    tier = GpuTier(2 * blocks * 2 * PAGE_BYTES, device=Machine.any().device, margin_bytes=0)
    places = tier.allocate_many(2 * PAGE_BYTES, blocks, "bench")
    random.Random(1).shuffle(places)  # noqa: S311 - an order, not a secret
    found = beside(_per_place(tier.payload, places), _per_place(dict.fromkeys(places, 0).__getitem__, places), rounds)
    yield Row("slots.hit-found", "ns", found.in_unit(_NS), at_most(500))
    tier.drop(places)
    batch = 64

    def hand_out_and_take_back() -> None:
        tier.drop(tier.allocate_many(2 * PAGE_BYTES, batch, "bench"))

    cost = alone(seconds_per_call(hand_out_and_take_back, max(1, calls // batch)), rounds)
    yield Row("slots.handed-out-and-taken-back", "us/64", cost.in_unit(_US))
    tier.close()
    tier = GpuTier(CAPACITY_BYTES, device=Machine.any().device, margin_bytes=0)
    steps = conditions.scaled(STEPS, least=3_000)
    _store(tier, steps // 3, seed=4)
    warm = tier.stats()
    _store(tier, steps, seed=5)
    after = tier.stats()
    reused = 1 - (after.grown - warm.grown) / (after.handed_out - warm.handed_out)
    yield Row("slots.reused", "%", Figure(100 * reused), at_least(95))
    yield Row("slots.cleared", "%", Figure(100 * (after.cleared - warm.cleared) / (after.handed_out - warm.handed_out)))
    tier.close()


def _per_place(look: Callable[[int], object], places: Sequence[int]) -> Measure:
    """Seconds to look one of these up, in the order that they come in."""

    def measure() -> float:
        began_s = perf_counter()
        for place in places:
            look(place)
        return (perf_counter() - began_s) / len(places)

    return measure


def _store(tier: "GpuTier", steps: int, seed: int) -> None:
    """Five models of two tenants each store by turns; the oldest blocks make room. The mix changes now and then."""
    rng = random.Random(seed)  # noqa: S311 - a trace, not a secret
    held: deque[int] = deque()
    weights = [1] * len(FIVE_MODELS)
    for step in range(steps):
        if step % _PHASE_STEPS == 0:
            weights = [rng.choice((0, 1, 1, 8)) for _ in FIVE_MODELS[1:]] + [1]
        record_bytes = rng.choices(FIVE_MODELS, weights)[0]
        owner = record_bytes, rng.randrange(2)
        while (place := tier.allocate(record_bytes, owner)) is None:
            tier.drop([held.popleft()])
        held.append(place)
    tier.drop(list(held))

"""Plays a stream of requests through a small memory, with a predictor or without one."""

from collections.abc import Sequence
from typing import NamedTuple

from kvpool.bench.prefetch.memory import SmallMemory
from kvpool.bench.prefetch.predictors import Predictor
from kvpool.bench.prefetch.requests import Asked


class Played(NamedTuple):
    """Sums over requests, in blocks."""

    asked: int
    hits: int
    prefetch_hits: int
    """Of the hits, those on blocks that had been prefetched."""
    known: int
    """Blocks that were stored before, and so are on the SSD if they are not in RAM."""
    prefetched: int
    used: int
    """Of those prefetched, the ones that were asked for before they had to go."""

    @property
    def hit_percent(self) -> float:
        """Hits of all blocks asked for."""
        return _percent(self.hits, self.asked)

    @property
    def precision_percent(self) -> float:
        """Of what was prefetched, how much was asked for."""
        return _percent(self.used, self.prefetched)

    @property
    def recall_percent(self) -> float:
        """Of what would have been read from the SSD, how much was in RAM."""
        return _percent(self.prefetch_hits, self.known - self.hits + self.prefetch_hits)


def play(
    asked: Sequence[Asked],
    *,
    capacity_blocks: int,
    prefetch_blocks: int = 0,
    predictor: Predictor | None = None,
    blocks_at_once: int = 0,
) -> Played:
    """Play them all. After each request at most `blocks_at_once` are prefetched, and are there before the next one."""
    memory = SmallMemory(capacity_blocks, prefetch_blocks)
    seen: set[int] = set()
    total = hits = prefetch_hits = known = 0
    for number, request in enumerate(asked):
        prompt = request.blocks[: request.prompt_blocks]
        total += len(prompt)
        known += sum(block in seen for block in prompt)
        seen.update(request.blocks)
        found = memory.request(request.blocks, request.prompt_blocks)
        hits += found.all
        prefetch_hits += found.prefetched
        if predictor is not None:
            memory.prefetch(predictor(number, memory, blocks_at_once))
    return Played(total, hits, prefetch_hits, known, memory.prefetched_blocks, memory.used_blocks)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0

"""The prefix index itself: the memory that it takes, and how fast blocks come and go."""

import gc
import tracemalloc
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import NamedTuple

from kvpool.bench.area import Conditions
from kvpool.bench.engine.forest import RECORD_BYTES, Forest
from kvpool.bench.row import Figure, Row, at_most
from kvpool.prefix.node import RAM

CHATS = 3_000
CHAT_BLOCKS = 16
SYSTEM_PROMPTS = 12
SYSTEM_PROMPT_BLOCKS = 24
CHURN_BLOCKS = 64_000


class _Memory(NamedTuple):
    """Bytes per block, as traced by the interpreter and as the index itself reckons."""

    traced: float
    estimated: float

    def figure(self) -> Figure:
        """What the interpreter traced, beside the estimate."""
        return Figure(self.traced, self.estimated, self.traced / self.estimated)


class _Rates(NamedTuple):
    """Blocks per second."""

    inserted: float
    evicted: float


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `index`."""
    chats = _memory(conditions.scaled(CHATS), CHAT_BLOCKS)
    yield Row("index.memory-per-block", "bytes", chats.figure(), at_most(600))
    short = _memory(conditions.scaled(CHATS * CHAT_BLOCKS), 1)
    yield Row("index.memory-per-block.edges-of-one-block", "bytes", short.figure())
    for blocks in (CHAT_BLOCKS, 1):
        rates = [_churn(conditions.scaled(CHURN_BLOCKS // blocks), blocks) for _ in range(conditions.rounds)]
        edges = f"edges-of-{blocks}-blocks" if blocks > 1 else "edges-of-one-block"
        yield Row(f"index.inserted.{edges}", "blocks/s", Figure(median(rate.inserted for rate in rates)))
        yield Row(f"index.evicted.{edges}", "blocks/s", Figure(median(rate.evicted for rate in rates)))


def _memory(chats: int, blocks: int) -> _Memory:
    """Of an index with so many chats of so many blocks of their own, each after one of a few system prompts."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    forest = Forest()
    for _ in range(SYSTEM_PROMPTS):
        forest.plant_prompts(chats // SYSTEM_PROMPTS or 1, blocks=blocks, head=forest.prompt(SYSTEM_PROMPT_BLOCKS))
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return _Memory((after - before) / forest.index.blocks, forest.index.bytes / forest.index.blocks)


def _churn(prompts: int, blocks: int) -> _Rates:
    """Enter prompts in an empty index, then evict them all."""
    forest = Forest()
    tokens = [forest.prompt(blocks) for _ in range(prompts)]
    began_s = perf_counter()
    for prompt in tokens:
        forest.plant(prompt)
    entered_s = perf_counter()
    while forest.index.evict(RAM, 32 * RECORD_BYTES):
        pass
    ended_s = perf_counter()
    return _Rates(prompts * blocks / (entered_s - began_s), prompts * blocks / (ended_s - entered_s))

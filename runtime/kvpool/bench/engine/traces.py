"""A trace of real requests, through the index and policy alone, and through a small pool down to its disk."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import BLOCK_TOKENS, KIB, EngineMemory, InPlace, open_model, pool_config
from kvpool.bench.row import Figure, Row, at_least, at_most
from kvpool.policy import LRU
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.replay.index_replay import play
from kvpool.replay.reference import exact_lru_hits, offline_bound_hits, timed
from kvpool.replay.synthetic import synthetic_trace
from kvpool.replay.trace import Trace, read_traces

CAPACITIES = (2_000, 5_000, 10_000, 20_000, 50_000)
SYNTHETIC_REQUESTS = 12_000
PAYLOAD_BYTES = 12 * KIB
RECORD_BYTES = 16 * KIB
RAM_BLOCKS = 2_500
SSD_BLOCKS = 15_000
WEAR_REQUESTS = 6_000


def run_replay(conditions: Conditions) -> Iterator[Row]:
    """Rows of `replay`: hit ratios beside an exact LRU's, in percent of the blocks asked for."""
    trace = trace_of(conditions)
    for capacity in CAPACITIES:
        blocks = conditions.scaled(capacity)
        ours, exact = play(trace, blocks, LRU), timed(exact_lru_hits, trace, blocks)
        figure = Figure(ours.hit_percent, exact.hit_percent, ours.hit_percent / max(exact.hit_percent, 1e-9))
        name = f"{capacity // 1_000}k-blocks"
        yield Row(f"replay.hit-ratio.{name}", "%", figure, at_least(round(exact.hit_percent - 1, 2)))
        bound = timed(offline_bound_hits, trace, blocks).hit_percent
        yield Row(f"replay.offline-bound.{name}", "%", Figure(bound))
        yield Row(f"replay.speed.{name}", "requests/s", Figure(ours.requests_per_second))


def run_wear(conditions: Conditions) -> Iterator[Row]:
    """Rows of `wear`: bytes written to the disk for each byte of blocks saved there, played through a pool."""
    trace = trace_of(conditions)[:WEAR_REQUESTS]
    for second_hit, name in ((False, "everything-saved"), (True, "second-hit")):
        yield from _wear_rows(trace, name, conditions, second_hit=second_hit)


def _wear_rows(trace: Trace, name: str, conditions: Conditions, *, second_hit: bool) -> Iterator[Row]:
    config = pool_config(
        ram_bytes=conditions.scaled(RAM_BLOCKS, least=1_024) * RECORD_BYTES,
        ssd_bytes=conditions.scaled(SSD_BLOCKS, least=4_096) * RECORD_BYTES,
        second_hit=second_hit,
    )
    with conditions.place(name) as place, (opened := open_model(config, place / "pool", PAYLOAD_BYTES)).pool as pool:
        serve(trace, [opened.model], PAYLOAD_BYTES)
        pool.flush(60)
        stats = pool.stats()
    written = stats.write_behind
    yield Row(f"wear.write-amplification.{name}", "x", Figure(written.write_amplification), at_most(1.5))
    yield Row(f"wear.saved.{name}", "% of stored", Figure(100 * written.saved_blocks / max(stats.stored_blocks, 1)))
    yield Row(f"wear.hit-ratio.{name}", "%", Figure(100 * stats.hit_ratio))


def serve(trace: Trace, models: Sequence[Model], payload_bytes: int, *, at_once: int = 1) -> None:
    """Play a trace through models of one pool: a request loads what matches when it comes, and stores when it ends.

    That is before the next one comes, or with so many `at_once`. A conversation, known by its second block (the first
    may be the same for all), has one of the models.
    """
    memory, sink = EngineMemory(payload_bytes, 64), InPlace()
    running: deque[tuple[Model, bytes, Lease]] = deque()

    def end_first() -> None:
        model, tokens, lease = running.popleft()
        with lease:
            model.store(tokens, memory)

    for blocks in trace:
        model = models[blocks[min(1, len(blocks) - 1)] % len(models)]
        tokens = np.repeat(np.asarray(blocks, np.int32), BLOCK_TOKENS).tobytes()
        running.append((model, tokens, model.match(tokens)))
        running[-1][2].load(sink)
        if len(running) == at_once:
            end_first()
    while running:
        end_first()


def trace_of(conditions: Conditions) -> Trace:
    """The recorded trace that was given, or a made-up one."""
    if conditions.trace is not None:
        trace = read_traces([conditions.trace])
        return trace[: conditions.scaled(len(trace))]
    return synthetic_trace(conditions.scaled(SYNTHETIC_REQUESTS), seed=1)

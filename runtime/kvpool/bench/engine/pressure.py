"""A pool that is full, with writers at work: what a store gets of the memory's speed, and how long a match takes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from statistics import mean, median
from time import monotonic, perf_counter, sleep
from typing import NamedTuple

from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import MIB, EngineMemory, Prompts, open_model, pool_config
from kvpool.bench.probes import Memcpy, RawDisk
from kvpool.bench.rounds import bytes_per_second, of_pairs, percentile
from kvpool.bench.row import Figure, Row, at_most, ratio_at_least
from kvpool.pool.model import Model
from kvpool.pool.stats import PoolStats

PAYLOAD_BYTES = 2 * MIB
RAM_BYTES = 512 * MIB
SSD_BYTES = 3_072 * MIB
PROMPT_BLOCKS = 8
WRITERS = 2
MATCHED_BLOCKS = 64
"""4,096 tokens."""
SLICE_S = 0.25
PACE_S = 0.001
_GIB_PER_BYTE = 1 / (1 << 30)
_US = 1e6


def run_full(conditions: Conditions) -> Iterator[Row]:
    """Rows of `full`: every store evicts, everything is wanted on ssd, and ssd has to free segments for it."""
    ram_bytes = conditions.scaled(RAM_BYTES, least=8 * PROMPT_BLOCKS * PAYLOAD_BYTES)
    config = pool_config(ram_bytes=ram_bytes, ssd_bytes=conditions.scaled(SSD_BYTES, least=2 * ram_bytes))
    blocks = conditions.scaled(64, least=4)
    with RawDisk(conditions.directory / "raw", block_bytes=2 * PAYLOAD_BYTES, blocks=blocks, depth=WRITERS) as raw:
        raw.write_all()
        raw_rates = [_write_rate(raw) for _ in range(3)]
        pool, model = open_model(config, conditions.directory / "pool", PAYLOAD_BYTES)
        with pool:
            storing = _Storing(model)
            while pool.stats().write_behind.freed_segments < 2:
                storing.once()
                pool.flush(60)
            before = pool.stats()
            endured = _endure(storing, conditions.seconds)
            after = pool.stats()
        raw_rates += [_write_rate(raw) for _ in range(3)]
    yield from _full_rows(endured, before, after, median(raw_rates))


class _Endured(NamedTuple):
    """Seconds per call of each slice's stores, and of its copies of as many blocks."""

    stores: list[list[float]]
    copies: list[list[float]]
    seconds: float


class _Storing:
    """Stores prompts that nobody has stored before."""

    def __init__(self, model: Model, seed: int = 1) -> None:
        self._model = model
        self._memory = EngineMemory(PAYLOAD_BYTES, 8 * PROMPT_BLOCKS)
        self._prompts = Prompts(seed)

    def once(self) -> float:
        """Seconds of one store of so many blocks."""
        prompt = self._prompts.next(PROMPT_BLOCKS)
        began_s = perf_counter()
        self._model.store(prompt, self._memory)
        return perf_counter() - began_s


def _endure(storing: _Storing, seconds: float) -> _Endured:
    """Store for so long, a slice of time after the other, each followed by a shorter one of memcpy."""
    memcpy = Memcpy(PAYLOAD_BYTES, PROMPT_BLOCKS * 8)
    stores: list[list[float]] = []
    copies: list[list[float]] = []
    began_s = monotonic()
    while not stores or monotonic() - began_s < seconds:
        stores.append(_slice(storing.once, SLICE_S))
        copies.append(_slice(lambda: memcpy.copy_some(PROMPT_BLOCKS), SLICE_S / 5))
    return _Endured(stores, copies, monotonic() - began_s)


def _slice(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, as many as fit, one at least."""
    calls: list[float] = []
    until_s = perf_counter() + seconds
    ended_s = perf_counter()
    while not calls or ended_s < until_s:
        began_s = ended_s
        work()
        ended_s = perf_counter()
        calls.append(ended_s - began_s)
    return calls


def _full_rows(endured: _Endured, before: PoolStats, after: PoolStats, raw_rate: float) -> Iterator[Row]:
    nbytes = PROMPT_BLOCKS * PAYLOAD_BYTES
    rates = [
        (nbytes / mean(stores), nbytes / mean(copies))
        for stores, copies in zip(endured.stores, endured.copies, strict=True)
    ]
    yield Row("full.store", "GiB/s", of_pairs(rates).in_unit(_GIB_PER_BYTE), ratio_at_least(0.6))
    slow, bare = (percentile(list(chain(*calls)), 99) for calls in (endured.stores, endured.copies))
    p99 = Figure(slow, bare, slow / bare).in_unit(_US / PROMPT_BLOCKS)
    yield Row("full.store-p99", "us/block", p99)
    down, up = after.write_behind, before.write_behind
    written = (down.saved_bytes - up.saved_bytes) / endured.seconds
    disk = Figure(written, raw_rate, written / raw_rate).in_unit(_GIB_PER_BYTE)
    yield Row("full.ssd-written", "GiB/s", disk, ratio_at_least(0.5))
    stored = after.stored_blocks - before.stored_blocks
    dropped = sum(down.dropped_blocks.values()) - sum(up.dropped_blocks.values())
    yield Row("full.demoted", "%", Figure(100 * (down.saved_blocks - up.saved_blocks) / stored))
    yield Row("full.dropped", "%", Figure(100 * dropped / stored))


def run_latency(conditions: Conditions) -> Iterator[Row]:
    """Rows of `latency`: a prompt of 4,096 tokens is matched and its lease closed, 1,000 times a second."""
    yield from _latency_rows("beside-stores", None, conditions)
    yield from _latency_rows("beside-stores-and-ssd-writes", SSD_BYTES, conditions)


def _latency_rows(name: str, ssd_bytes: int | None, conditions: Conditions) -> Iterator[Row]:
    """Two threads store; with an ssd tier, the pool's own two write as well."""
    ram_bytes = conditions.scaled(RAM_BYTES, least=16 * PROMPT_BLOCKS * PAYLOAD_BYTES)
    config = pool_config(ram_bytes=ram_bytes, ssd_bytes=ssd_bytes and conditions.scaled(ssd_bytes, least=2 * ram_bytes))
    with conditions.place(name) as place, (opened := open_model(config, place / "pool", PAYLOAD_BYTES)).pool:
        model = opened.model
        prompt = Prompts(seed=2).next(MATCHED_BLOCKS)
        storing = [_Storing(model, seed) for seed in range(3, 3 + WRITERS)]
        model.store(prompt, EngineMemory(PAYLOAD_BYTES, 1))
        with model.match(prompt):
            idle = _paced(lambda: model.match(prompt).close(), conditions.seconds / 30)
            with _repeating([writer.once for writer in storing]):
                busy = _paced(lambda: model.match(prompt).close(), conditions.seconds / 6)
    for percent in (50, 99, 99.9):
        target = at_most(200) if percent == 99 else None
        yield Row(f"latency.p{percent:g}.{name}", "us", _percentile(percent, busy.call_s, idle.call_s), target)
    yield Row(f"latency.p99-since-due.{name}", "us", _percentile(99, busy.since_due_s, idle.since_due_s))


class _Paced(NamedTuple):
    """Seconds that each call took, and that passed from when it was due until it was done: waking up included."""

    call_s: list[float]
    since_due_s: list[float]


def _paced(work: Callable[[], object], seconds: float) -> _Paced:
    """Call `work` 1,000 times a second for so long; a call that is late delays those after it."""
    paced = _Paced([], [])
    due_s = perf_counter()
    until_s = due_s + seconds
    while due_s < until_s or not paced.call_s:
        due_s += PACE_S
        sleep(max(0, due_s - perf_counter()))
        began_s = perf_counter()
        work()
        ended_s = perf_counter()
        paced.call_s.append(ended_s - began_s)
        paced.since_due_s.append(ended_s - due_s)
        due_s = max(due_s, ended_s - PACE_S)
    return paced


def _percentile(percent: float, busy: Sequence[float], idle: Sequence[float]) -> Figure:
    """Of the calls made under load, beside that of those made before."""
    value, probe = percentile(busy, percent), percentile(idle, percent)
    return Figure(value, probe, value / probe).in_unit(_US)


@contextmanager
def _repeating(work: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Each of these again and again, on a thread of its own, until the context ends; what they raise is raised then."""
    ended = threading.Event()

    def repeat(act: Callable[[], object]) -> None:
        while not ended.is_set():
            act()

    with ThreadPoolExecutor(len(work)) as threads:
        running = [threads.submit(repeat, act) for act in work]
        try:
            yield
        finally:
            ended.set()
        for thread in running:
            thread.result()


def _write_rate(raw: RawDisk) -> float:
    return bytes_per_second(raw.write_all, raw.nbytes)()

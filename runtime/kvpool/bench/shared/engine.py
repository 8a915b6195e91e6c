"""What shared tiers cost the engine's thread, and what looking a prompt up takes: two pools beside each other.

Both have the same ram; one has dragonfly and database tiers too, with servers of this machine's own, and its queues are
empty before each measurement. A store leaves work for other threads, which take caches and memory bandwidth: before
each measured store of either pool the same memory is copied, so that both find the machine alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.engine.pools import (
    BLOCK_TOKENS,
    KIB,
    MIB,
    EngineMemory,
    InPlace,
    OpenModel,
    Prompts,
    open_model,
    pool_config,
)
from kvpool.bench.probes import touched
from kvpool.bench.rounds import beside, of_pairs, seconds_per_call
from kvpool.bench.row import Row, ratio_at_most
from kvpool.bench.shared.postgres import Bare, bare_connection
from kvpool.catalog.connections import SCHEMES
from kvpool.catalog.payload_statements import FIND
from kvpool.config import DatabaseConfig, DragonflyConfig, PostgresConfig, RuntimeConfig
from kvpool.config.service import read_service
from kvpool.pool.remote.lookup import FIRST_WINDOW_BLOCKS
from kvpool.tiers.tier import TierName

RAM_BYTES = 512 * MIB
PAYLOAD_BYTES = 256 * KIB
STORED_BLOCKS = 16
STORES, CALLS, LOOKUPS = 24, 2_000, 50
MATCHED = ((1_024, "1k"), (4_096, "4k"), (32_768, "32k"))
ABSENT = ((1, "1"), (32, "32"), (512, "512"))
COLD_BLOCKS = 64
BUDGET_S, DEADLINE_S = 10.0, 30.0
_US = 1e6


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `beside`: an engine's calls with shared tiers, beside the same without; and of looking up."""
    plain_config = pool_config(ram_bytes=RAM_BYTES)
    with (
        _opened(plain_config, conditions.directory / "plain") as plain,
        _opened(_with_shared_tiers(plain_config), conditions.directory / "shared") as shared,
    ):
        if shared.pool.degradations():
            raise UnmeasurableError(f"the servers did not start: {_faults(shared)}")
        yield from _matches(plain, shared, conditions)
        yield _stores(plain, shared, conditions)
        yield from _absent(shared, conditions)
        yield _cold(shared, conditions)


class _opened:  # noqa: N801 - used as a function
    """A pool and its model, closed without writing what is in memory."""

    def __init__(self, config: RuntimeConfig, directory: Path) -> None:
        self._opened = open_model(config, directory, PAYLOAD_BYTES)

    def __enter__(self) -> OpenModel:
        return self._opened

    def __exit__(self, *_: object) -> None:
        self._opened.pool.close(deadline_s=0)


def _with_shared_tiers(config: RuntimeConfig) -> RuntimeConfig:
    none = config.ram.codec
    dragonfly = DragonflyConfig(
        memory_bytes=1 << 30, codec=none, ttl_s=7200.0, connections=20, batch_size=200, budget_s=BUDGET_S, tls=False
    )
    database = DatabaseConfig(
        postgres=PostgresConfig(connections=10, tls=False),
        codec=none,
        inline_max_bytes=2 * MIB,
        inline_bytes=1 << 30,
        journal_bytes=64 * MIB,
        budget_s=BUDGET_S,
    )
    return config.model_copy(update={"dragonfly": dragonfly, "database": database})


def _faults(shared: OpenModel) -> str:
    tiers = shared.pool.stats().tiers.values()
    return "; ".join(f"{tier.name}: {tier.last_error}" for tier in tiers if tier.last_error)


def _matches(plain: OpenModel, shared: OpenModel, conditions: Conditions) -> Iterator[Row]:
    memory, prompts = EngineMemory(PAYLOAD_BYTES, 64), Prompts()
    for tokens, name in MATCHED:
        prompt = prompts.next(tokens // BLOCK_TOKENS)
        for opened in (plain, shared):
            opened.model.store(prompt, memory)
            opened.pool.flush(DEADLINE_S)
        calls = conditions.scaled(CALLS, least=50)
        subject, probe = (seconds_per_call(partial(_match_and_close, one, prompt), calls) for one in (shared, plain))
        figure = beside(subject, probe, 4 * conditions.rounds).in_unit(_US)
        yield Row(f"beside.match.{name}", "us", figure, ratio_at_most(1.05))


def _match_and_close(opened: OpenModel, prompt: bytes) -> None:
    opened.model.match(prompt).close()


def _stores(plain: OpenModel, shared: OpenModel, conditions: Conditions) -> Row:
    """Of prompts of 16 blocks, each new."""
    memory, prompts = EngineMemory(PAYLOAD_BYTES, STORED_BLOCKS), Prompts(seed=2)
    disturb = _disturbance()

    def seconds(opened: OpenModel, prompt: bytes) -> float:
        opened.pool.flush(DEADLINE_S)
        disturb()
        began_s = perf_counter()
        opened.model.store(prompt, memory)
        return perf_counter() - began_s

    pairs = []
    for number in range(conditions.scaled(STORES * conditions.rounds, least=4)):
        prompt = prompts.next(STORED_BLOCKS)
        order = (shared, plain) if number % 2 else (plain, shared)
        taken = {id(opened): seconds(opened, prompt) for opened in order}
        pairs.append((taken[id(shared)], taken[id(plain)]))
    figure = of_pairs(pairs)
    ratio = median(value for value, _ in pairs) / median(probe for _, probe in pairs)
    return Row("beside.store.16x256KiB", "us", figure._replace(ratio=ratio).in_unit(_US), ratio_at_most(1.05))


def _disturbance() -> Callable[[], None]:
    here, there = touched(16 * MIB), touched(16 * MIB)
    return lambda: np.copyto(there, here)


def _absent(shared: OpenModel, conditions: Conditions) -> Iterator[Row]:
    """`Lease.wait` for what nobody has, beside a bare round trip of the slower tier with as many keys."""
    folder = shared.pool.directory / "local" / "postgres" / "service"
    address = read_service(folder, schemes=SCHEMES)
    with bare_connection(address) as bare:
        for blocks, name in ABSENT:
            prompts = Prompts(seed=3)
            calls = conditions.scaled(LOOKUPS, least=5)
            asked = min(blocks, FIRST_WINDOW_BLOCKS)
            probe = seconds_per_call(partial(_bare_find, bare, asked), calls)
            wait = partial(_waited, shared, prompts, blocks, calls)
            figure = beside(wait, probe, conditions.rounds).in_unit(_US)
            yield Row(f"beside.wait.absent.{name}", "us", figure, ratio_at_most(1.5))


def _bare_find(bare: Bare, keys: int) -> None:
    wanted = [number.to_bytes(16, "little") for number in range(keys)]
    bare.cursor(binary=True).execute(FIND, {"keys": wanted, "codecs": [0]}).fetchall()


def _waited(shared: OpenModel, prompts: Prompts, blocks: int, calls: int) -> float:
    """Seconds of `wait` alone, a median."""
    taken = []
    for _ in range(calls):
        with shared.model.match(prompts.next(blocks)) as lease:
            began_s = perf_counter()
            lease.wait(DEADLINE_S)
            taken.append(perf_counter() - began_s)
    return median(taken)


def _cold(shared: OpenModel, conditions: Conditions) -> Row:
    """From match to the last block of a prompt that lies in dragonfly alone: fetched, verified, entered in the tree."""
    memory, sink, prompt = EngineMemory(PAYLOAD_BYTES, 64), InPlace(), Prompts(seed=4).next(COLD_BLOCKS)
    shared.model.store(prompt, memory)
    shared.pool.flush(DEADLINE_S)
    index = shared.pool._engine.index
    rates = []
    for _ in range(conditions.rounds):
        while gone := index.evict(1, RAM_BYTES):
            shared.pool._engine.copies.release(gone)
        began_s = perf_counter()
        with shared.model.match(prompt) as lease:
            lease.wait(DEADLINE_S)
            lease.load(sink)
            served = lease.served.get(TierName.DRAGONFLY, 0)
        taken_s = perf_counter() - began_s
        if served != COLD_BLOCKS:
            raise UnmeasurableError(f"{served} of {COLD_BLOCKS} blocks came from dragonfly")
        rates.append((COLD_BLOCKS * PAYLOAD_BYTES / MIB / taken_s, 1.0))
    return Row("beside.cold.64x256KiB", "MiB/s", of_pairs(rates)._replace(probe=None, ratio=None))

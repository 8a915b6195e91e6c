"""A pool with all its tiers, under random faults of all of them: nothing wrong is served, and nothing is left over."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from random import Random, SystemRandom
from typing import NamedTuple

import pytest

from kvpool.pool.pool import Pool
from kvpool.resilience import BreakerState
from kvpool.tiers.tier import TierName
from tests.local.servers import Server
from tests.pool.disks import SickDisk
from tests.pool.kv import MIB, WIDE, check, flushed
from tests.waiting import eventually

from .pools import catalog_of, open_shared, remote_of
from .soak import LONGEST_S, PROMPTS, SHORTEST_S, TENANTS, Ill, ask, in_use, schedule

SHORT_S, LONG_S = 15.0, 180.0
"""After a quarter of that, in which the pool gets warm."""
SEED: int | None = None
"""Of the long one; None: another one each time. It is printed, and a failure can be replayed by setting it here."""
WELL_S = 60.0
"""How long it may take until all is well again."""
MORE_BYTES = 64 * MIB
MORE_DESCRIPTORS = 32
MORE_THREADS = 16
"""Generous: connections and threads come when they are needed for the first time."""


class Held(NamedTuple):
    """What this process has of the system."""

    rss_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threading.active_count())


def test_nothing_wrong_is_served_under_random_faults(tmp_path: Path, own_redis: Server, own_postgres: Server) -> None:
    soak(tmp_path, own_redis, own_postgres, seed=1, seconds=SHORT_S)


@pytest.mark.slow
def test_nothing_wrong_is_served_and_nothing_grows_under_minutes_of_random_faults(
    tmp_path: Path, own_redis: Server, own_postgres: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = SystemRandom().getrandbits(32) if SEED is None else SEED
    with capsys.disabled():
        print(f"\nsoak: seed {seed}")
    soak(tmp_path, own_redis, own_postgres, seed=seed, seconds=LONG_S)


def soak(directory: Path, own_redis: Server, own_postgres: Server, *, seed: int, seconds: float) -> None:
    disk = SickDisk()
    options = {"budgetS": 0.3}
    with open_shared(
        directory / "pool", disk=disk, dragonfly=own_redis.folder, database=own_postgres.folder,
        dragonfly_options=options, database_options={**options, "inlineBytes": 3 * MIB},
        ram=48 * WIDE.record_bytes, ssd=4 * MIB, budgetS=0.3,
    ) as pool:  # fmt: skip
        with in_use(pool, seed):
            eventually(lambda: pool.stats().tiers[TierName.SSD].loaded_blocks > 50, "it is warm")
            make_faults(Ill(pool, own_redis, own_postgres, disk), seed, seconds / 4)
            before = Held.now()
            make_faults(Ill(pool, own_redis, own_postgres, disk), seed + 1, seconds)
        eventually(lambda: all_is_well(pool), "all is well again", WELL_S)
        after = Held.now()
        behind = catalog_of(pool).stats
        flushed(pool)
        assert catalog_of(pool).flush(WELL_S + seconds), f"the catalog is told of all that happened, and not {behind}"
        check(pool, [])
        stats = pool.stats()
    print(f"soak: {stats.requests} requests, {before} -> {after}, catalog {behind}")
    print({tier.value: (one.loaded_blocks, dict(one.corrupt)) for tier, one in stats.tiers.items()})
    print({tier.value: one for tier, one in stats.shared.items()})
    assert all(one.loaded_blocks > 0 for one in stats.tiers.values()), "every tier has served"
    assert set(catalog_of(pool).stats.dropped_rows) <= {"journal-full"}
    assert after.rss_bytes < before.rss_bytes + MORE_BYTES
    assert after.descriptors < before.descriptors + MORE_DESCRIPTORS
    assert after.threads < before.threads + MORE_THREADS


def make_faults(ill: Ill, seed: int, seconds: float) -> None:
    """Faults for so long, one or two at a time; all are over afterwards."""
    random = Random(seed)
    until = time.monotonic() + seconds
    lasting = threading.Event()  # never set: it lasts
    for together in schedule(random):
        if time.monotonic() >= until:
            return
        with ExitStack() as stack:
            for fault in together:
                print(f"soak: {until - time.monotonic():.1f} s left: {getattr(fault, '__name__', fault)}")
                stack.enter_context(fault(ill, random))
            lasting.wait(random.uniform(SHORTEST_S, LONGEST_S))
        lasting.wait(random.uniform(SHORTEST_S, LONGEST_S))


def all_is_well(pool: Pool) -> bool:
    """Use the pool a little; whether no tier is out, and every breaker closed."""
    for tenant in TENANTS:
        for model in pool.models():
            ask(model, tenant, PROMPTS[0], 1.0)
            ask(model, tenant, PROMPTS[-1], 1.0)
    store = pool._engine.store
    breakers = [store.reads, store.writes]
    breakers += [breaker for one in remote_of(pool).stores for breaker in (one.breaker, one.writes)]
    return pool.stats().mode == "normal" and all(breaker.state is BreakerState.CLOSED for breaker in breakers)

"""Pools whose shared tiers are servers of their own: those are started, started again, and never left behind."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

from kvpool.pool.pool import Pool
from kvpool.tiers.tier import TierName
from tests.local.servers import runs
from tests.pool.kv import MIB, check, empty_ram, load, prompt, spec, store
from tests.waiting import eventually

from .neighbour import neighbour
from .pools import EMBEDDED_QDRANT, in_normal_mode, looked_up, open_shared, prompts_of, reported, shared_config

DRAGONFLY, DATABASE, RAM = TierName.DRAGONFLY, TierName.DATABASE, TierName.RAM
MANAGED: dict[str, Any] = {"dragonfly": {"memoryBytes": 64 * MIB}, "database": {}}
START_S = 60.0
"""How long a server may take on a busy machine."""


def pid_of(pool: Pool, name: str) -> int | None:
    return next((server.pid for server in pool.local_servers() if server.name == name), None)


def is_out(pool: Pool, tier: TierName) -> bool:
    return not pool.stats().tiers[tier].available


def runs_anew(pool: Pool, name: str, killed: int) -> bool:
    return pid_of(pool, name) not in (None, killed)


def test_a_server_that_is_killed_is_started_again_by_the_pool_and_serves_hits(tmp_path: Path) -> None:
    with open_shared(tmp_path / "pool", **MANAGED) as pool:
        model = pool.register(spec())
        in_normal_mode(pool, START_S)
        for name, tier in (("dragonfly", DRAGONFLY), ("postgres", DATABASE)):
            tokens = prompt(8, seed=ord(name[0]))
            store(model, tokens)
            reported(pool)
            killed = pid_of(pool, name)
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            eventually(partial(is_out, pool, tier), "it is missed")
            assert load(model, tokens) == 8, "what is in memory is served meanwhile"
            eventually(partial(runs_anew, pool, name, killed), "it runs again", START_S)
            in_normal_mode(pool, START_S)
            assert load(model, tokens) == 8
            reported(pool)
            empty_ram(pool)
            assert looked_up(model, tokens) == {DRAGONFLY: 8}
        check(pool, [])


def test_a_qdrant_that_is_killed_is_started_again_and_remembers_what_it_did(tmp_path: Path, postgres: Path) -> None:
    with open_shared(tmp_path / "pool", database=postgres, database_options=EMBEDDED_QDRANT) as pool:
        model, prompts = pool.register(spec()), prompts_of(pool)
        in_normal_mode(pool, START_S)
        store(model, prompt(8, seed=1))
        assert prompts.flush(START_S)
        killed = pid_of(pool, "qdrant")
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        store(model, prompt(8, seed=2))
        assert looked_up(model, prompt(8, seed=2)) == {RAM: 8}, "nobody waits for it"
        eventually(lambda: prompts.flush(1.0), "what was asked for meanwhile is remembered", START_S)
        assert runs_anew(pool, "qdrant", killed), "it is started by who needs it"
        in_normal_mode(pool, START_S)
        vectors = prompts._vectors
        assert vectors is not None
        eventually(lambda: vectors.count() == 2, "both are")


def test_a_pool_that_is_killed_leaves_no_server_behind_and_the_next_one_finds_what_it_had(tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    with neighbour(directory, shared_config(directory, **MANAGED)) as process:
        eventually(lambda: process.ask("mode") == "normal", "its servers run", START_S)
        assert process.ask("store", "m", "acme", 12, 1) == [12, 0]
        assert process.ask("flush")
        servers = process.ask("servers")
        assert set(servers) == {"dragonfly", "postgres"}
        assert all(runs(pid) for pid in servers.values())
        process.kill()
        eventually(lambda: not any(runs(pid) for pid in servers.values()), "they end with it", START_S)
    for tier in (DRAGONFLY, DATABASE):
        config = {tier.value: MANAGED[tier.value]}
        with open_shared(directory, **config) as pool:
            in_normal_mode(pool, START_S)
            assert looked_up(pool.register(spec()), prompt(12, seed=1), "acme") == {tier: 12}
    assert not pool.local_servers()


def test_servers_that_stall_when_the_pool_is_closed_do_not_keep_it_open(tmp_path: Path) -> None:
    pool = open_shared(tmp_path / "pool", **MANAGED)
    model = pool.register(spec())
    in_normal_mode(pool, START_S)
    store(model, prompt(8))
    pids = [server.pid for server in pool.local_servers()]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    store(model, prompt(8, seed=2))
    pool.close(deadline_s=1.0)
    eventually(lambda: not any(runs(pid) for pid in pids), "they are ended", START_S)

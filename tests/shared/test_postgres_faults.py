"""A PostgreSQL server that dies, is away, slow, read-only or full: rows arrive once, and nobody waits for it."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest

from kvpool.blocks.tokens import token_bytes
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import StoreResult
from kvpool.resilience import Degradation
from kvpool.tiers.tier import TierName
from tests.local.clients import postgres_client
from tests.local.servers import Server
from tests.pool.crashing import TINY
from tests.pool.kv import BLOCK_TOKENS, MIB, check, empty_ram, flushed, load, prompt, spec, store
from tests.tiers.dragonfly.servers import client_of
from tests.waiting import eventually

from .pools import catalog_of, in_normal_mode, looked_up, open_shared, reported
from .slow_socket import SlowSocket

DRAGONFLY, DATABASE, RAM, SSD = TierName.DRAGONFLY, TierName.DATABASE, TierName.RAM, TierName.SSD
BUDGET_S = 0.2
SLACK_S = 9 * BUDGET_S
"""Of a machine that does other things too."""
QUICK = {"budgetS": BUDGET_S}
ROWS_ONLY = {"inlineMaxBytes": 0}
"""The database is a catalog, and holds no records."""
DEADLINE_S = 60.0


def asked(service: Path, query: LiteralString, *parameters: Any) -> list[Any]:
    with postgres_client(service) as connection:
        return connection.execute(query, parameters).fetchall()


def blocks_here(pool: Pool) -> set[bytes]:
    """The keys of all blocks in this pool's index."""
    index = pool._engine.index
    with index.lock:
        joined = [bytes(node.keys) for tree in index.trees.values() for node in tree.nodes()]
    return {keys[at : at + 16] for keys in joined for at in range(0, len(keys), 16)}


def one_block(number: int) -> list[int]:
    """A prompt of one block, another one for each number."""
    return [number, *range(1, BLOCK_TOKENS)]


def store_one_block(model: Model, number: int) -> StoreResult:
    return store(model, one_block(number))


def key_of(model: Model, number: int) -> bytes:
    tree = model._tree("default")
    return tree.keys_after(tree.chain.root, 0, token_bytes(one_block(number)), None)


def test_rows_of_ten_thousand_stores_arrive_once_though_the_server_is_killed_twice_meanwhile(
    tmp_path: Path, own_postgres: Server
) -> None:
    with open_shared(
        tmp_path / "pool", database=own_postgres.folder, database_options=ROWS_ONLY, ram=160 * MIB
    ) as pool:
        model = pool.register(spec(layout=TINY))
        starting: list[threading.Thread] = []
        for number in range(10_000):
            store_one_block(model, number)
            if number in (2_000, 6_000):
                own_postgres.kill()
            if number in (4_000, 8_000):
                starting.append(threading.Thread(target=own_postgres.start))
                starting[-1].start()
                if number == 4_000:
                    starting[-1].join()
        starting[-1].join()
        reported_here = blocks_here(pool)
        assert len(reported_here) == 10_000
        reported(pool)
        assert not catalog_of(pool).stats.dropped_rows
        assert catalog_of(pool).stats.replayed_batches > 0
        assert catalog_of(pool).reporter.dropped == 0
        in_normal_mode(pool)
    service = own_postgres.folder
    assert {bytes(key) for (key,) in asked(service, "select key from kvpool.blocks")} == reported_here
    assert asked(service, "select tier, count(*) from kvpool.locations group by 1") == [("ram", 10_000)]
    assert asked(service, "select tier, sum(blocks) from kvpool.holdings group by 1") == [("ram", 10_000)]
    assert asked(service, "select asks, count(*) from kvpool.prompts group by 1") == [(1, 10_000)]


def test_of_rows_that_a_small_journal_cannot_hold_the_oldest_are_dropped_and_counted(
    tmp_path: Path, own_postgres: Server
) -> None:
    options = {**ROWS_ONLY, "journalBytes": MIB}
    with open_shared(tmp_path / "pool", database=own_postgres.folder, database_options=options, ram=160 * MIB) as pool:
        model = pool.register(spec(layout=TINY))
        for number in range(500):
            store_one_block(model, number)
        reported(pool)
        own_postgres.kill()
        for number in range(500, 8_000):
            store_one_block(model, number)
        eventually(lambda: catalog_of(pool).stats.dropped_rows.get("journal-full", 0) > 0, "the journal is full")
        own_postgres.start()
        reported(pool)
        keys = [key_of(model, number) for number in range(8_000)]
        assert set(keys) == blocks_here(pool)
        stats = catalog_of(pool).stats
        assert set(stats.dropped_rows) == {"journal-full"}
    there = {bytes(key) for (key,) in asked(own_postgres.folder, "select key from kvpool.blocks")}
    kept = [key in there for key in keys]
    first = kept.index(False)
    last = len(kept) - 1 - kept[::-1].index(False)
    assert first == 500, "what had arrived before is there"
    assert not any(kept[first : last + 1]), "the oldest of the others are missing"
    assert kept[-1], "and the newest are there"
    assert last + 1 - first <= stats.dropped_rows["journal-full"], "which was counted"


@contextmanager
def read_only(service: Path) -> Iterator[None]:
    """For the time of the block the server takes no changes."""
    with postgres_client(service) as connection:
        connection.execute("set default_transaction_read_only = off")
        connection.execute("alter system set default_transaction_read_only = on")
        connection.execute("select pg_reload_conf()")
        try:
            yield
        finally:
            connection.execute("alter system reset default_transaction_read_only")
            connection.execute("select pg_reload_conf()")


def test_a_server_that_takes_no_changes_is_read_and_what_happens_meanwhile_is_told_later(
    tmp_path: Path, own_postgres: Server
) -> None:
    with ExitStack() as stack:
        pools = [
            stack.enter_context(open_shared(tmp_path / name, database=own_postgres.folder)) for name in ("one", "two")
        ]
        (one, ours), (_, theirs) = ((pool, pool.register(spec())) for pool in pools)
        for seed in range(20):
            store(ours, prompt(4, seed=seed))
        reported(one)
        with read_only(own_postgres.folder):
            store(ours, prompt(6, seed=100))
            eventually(lambda: one.degradations() == {Degradation.NO_POSTGRES}, "it says that it is not as it should")
            eventually(lambda: catalog_of(one).stats.journal_rows > 0, "rows wait in the journal")
            for seed in range(10):
                assert looked_up(theirs, prompt(4, seed=seed)) == {DATABASE: 4}
            with open_shared(tmp_path / "three", database=own_postgres.folder) as three:
                model = three.register(spec())
                assert looked_up(model, prompt(4, seed=11)) == {DATABASE: 4}, "a pool that opens now reads as well"
        for pool in pools:
            in_normal_mode(pool)
        eventually(
            lambda: load(ours, prompt(6, seed=100)) == 6 and payloads(own_postgres.folder) == 86,
            "what is used is sent again",
        )
        reported(one)
        assert not catalog_of(one).stats.dropped_rows
        for pool in pools:
            check(pool, [])
    assert asked(own_postgres.folder, "select count(*) from kvpool.blocks") == [(86,)]


def payloads(service: Path) -> int:
    """How many records there are."""
    ((count,),) = asked(service, "select count(*) from kvpool.payloads")
    return int(count)


@contextmanager
def without_connections(service: Path) -> Iterator[None]:
    """For the time of the block others have all of the server's connections."""
    with ExitStack() as stack:
        ours = [stack.enter_context(postgres_client(service))]
        while True:
            try:
                ours.append(stack.enter_context(postgres_client(service)))
            except psycopg.OperationalError:
                pids = [connection.info.backend_pid for connection in ours]
                if ours[0].execute(_END_OTHERS, [pids]).fetchone() == (0,):
                    break
        yield


_END_OTHERS: LiteralString = """
    select count(pg_terminate_backend(pid)) from pg_stat_activity
    where backend_type = 'client backend' and coalesce(datname, current_database()) = current_database()
        and pid <> all(%s)
"""


def test_a_server_without_a_free_connection_is_as_one_that_is_away(tmp_path: Path, own_postgres: Server) -> None:
    with open_shared(tmp_path / "pool", database=own_postgres.folder) as pool:
        model = pool.register(spec())
        store(model, prompt(4, seed=1))
        reported(pool)
        with without_connections(own_postgres.folder):
            store(model, prompt(4, seed=2))
            eventually(lambda: pool.degradations() == {Degradation.NO_POSTGRES}, "it is out")
            eventually(lambda: catalog_of(pool).stats.journal_rows > 0, "rows wait in the journal")
            empty_ram(pool)
            assert looked_up(model, prompt(4, seed=1)) == {}
            store(model, prompt(4, seed=3))
            began = time.perf_counter()
            with open_shared(tmp_path / "late", database=own_postgres.folder) as late:
                assert time.perf_counter() - began < 10.0
                assert late.degradations() == {Degradation.NO_POSTGRES}
                assert looked_up(late.register(spec()), prompt(4, seed=1)) == {}
        in_normal_mode(pool)
        assert looked_up(model, prompt(4, seed=1)) == {DATABASE: 4}
        eventually(
            lambda: load(model, prompt(4, seed=3)) == 4 and payloads(own_postgres.folder) == 8,
            "what is used is sent again",
        )
        reported(pool)
        assert not catalog_of(pool).stats.dropped_rows
        check(pool, [])
    assert asked(own_postgres.folder, "select count(*) from kvpool.blocks") == [(12,)]


def test_a_server_that_takes_two_seconds_for_a_statement_costs_one_budget_once(
    tmp_path: Path, own_postgres: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with SlowSocket(own_postgres.folder, tmp_path / "slow") as slow:
        with open_shared(tmp_path / "warm", database=slow.folder) as warm:
            store(warm.register(spec()), prompt(10, seed=1))
            reported(warm)
        with open_shared(tmp_path / "cold", database=slow.folder, database_options=QUICK) as pool:
            model = pool.register(spec())
            in_normal_mode(pool)
            reported(pool)
            slow.delay_s = 2.0
            seconds = []
            for seed in range(100):
                with model.match(prompt(10, seed=2 + seed)) as lease:
                    began = time.perf_counter()
                    lease.wait(30.0)
                    seconds.append(time.perf_counter() - began)
            assert pool.stats().mode == "no-postgres"
            store(model, prompt(10, seed=500))
            assert load(model, prompt(10, seed=500)) == 10
            began = time.perf_counter()
            with open_shared(tmp_path / "late", database=slow.folder, database_options=QUICK) as late:
                opened = time.perf_counter() - began
                assert late.stats().mode == "no-postgres"
                slow.delay_s = 0.0
                in_normal_mode(late)
            in_normal_mode(pool)
            assert looked_up(model, prompt(10, seed=1)) == {DATABASE: 10}
            reported(pool)
            assert not catalog_of(pool).stats.dropped_rows
            check(pool, [])
    with capsys.disabled():
        print(f"\n2 s a statement: first wait {seconds[0] * 1e3:.0f} ms (budget {BUDGET_S * 1e3:.0f}), then "
              f"{statistics.median(seconds[1:]) * 1e6:.0f} us (median); a pool opens in {opened:.2f} s")  # fmt: skip
    assert seconds[0] < BUDGET_S + SLACK_S
    assert statistics.median(seconds[1:]) < 1e-3
    assert opened < 10.0


def test_what_lies_on_ssd_and_in_dragonfly_waits_for_the_authority_on_epochs_and_is_used_once_it_answers(
    tmp_path: Path, own_postgres: Server, dragonfly: Path
) -> None:
    servers: dict[str, Any] = {"dragonfly": dragonfly, "database": own_postgres.folder}
    with open_shared(tmp_path / "pool", **servers, ssd=8 * MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(8, seed=1))
        reported(pool)
    own_postgres.stop()
    with open_shared(tmp_path / "pool", **servers, ssd=8 * MIB) as pool, client_of(dragonfly) as client:
        model = pool.register(spec())
        before = client.dbsize()
        assert pool.stats().mode == "memory-only"
        assert looked_up(model, prompt(8, seed=1)) == {}
        store(model, prompt(8, seed=2))
        flushed(pool)
        assert load(model, prompt(8, seed=2)) == 8, "what is stored now is served from memory"
        assert client.dbsize() == before, "and written nowhere else"
        assert pool.stats().write_behind.saved_blocks == 0
        own_postgres.start()
        in_normal_mode(pool)
        assert looked_up(model, prompt(8, seed=1)) == {SSD: 8}
        eventually(
            lambda: load(model, prompt(8, seed=2)) == 8 and client.dbsize() == before + 8, "what is used goes there"
        )
        reported(pool)
        check(pool, [])
    with open_shared(tmp_path / "cold", **servers) as cold:
        assert looked_up(cold.register(spec()), prompt(8, seed=2)) == {DRAGONFLY: 8}
    own_postgres.stop()
    with open_shared(tmp_path / "colder", **servers) as cold:
        model = cold.register(spec())
        assert looked_up(model, prompt(8, seed=2)) == {}
        own_postgres.start()
        in_normal_mode(cold)
        assert looked_up(model, prompt(8, seed=2)) == {DRAGONFLY: 8}

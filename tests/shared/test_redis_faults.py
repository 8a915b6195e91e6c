"""A server of the dragonfly tier that stalls, dies, forgets, refuses or lies: it costs misses, and one short wait."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import redis

from kvpool.blocks.identity import BlockKey
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.pool.model import Model
from kvpool.resilience import Degradation
from kvpool.tiers.dragonfly.names import PREFIX
from kvpool.tiers.tier import TierName
from tests.local.servers import Server
from tests.pool.kv import BLOCK_TOKENS, KIB, MIB, RECORD, check, empty_ram, flushed, load, prompt, spec, store
from tests.tiers.dragonfly.servers import client_of
from tests.waiting import eventually

from .pools import in_normal_mode, looked_up, open_shared, remote_of

DRAGONFLY, DATABASE, RAM = TierName.DRAGONFLY, TierName.DATABASE, TierName.RAM
BUDGET_S = 0.1
SLACK_S = 9 * BUDGET_S
"""Of a machine that does other things too."""
QUICK: dict[str, Any] = {"dragonfly_options": {"budgetS": BUDGET_S}}
LARGE = KVLayout(layers=2, kv_heads=8, head_size=512, dtype=Dtype.FLOAT32, block_tokens=BLOCK_TOKENS)
"""256 KiB of payload: a stop comes in the middle of one."""


def stored_elsewhere(tmp_path: Path, server: Server, *prompts: list[int], **options: Any) -> None:
    """Another pool has stored these prompts."""
    with open_shared(tmp_path / "elsewhere", dragonfly=server.folder, ram=64 * MIB) as pool:
        model = pool.register(spec(**options))
        for tokens in prompts:
            store(model, tokens)
        flushed(pool)
        assert not pool.stats().shared[DRAGONFLY].dropped_blocks


def wait_seconds(model: Model, tokens: list[int], deadline_s: float = 30.0) -> float:
    """How long a lease waits for a prompt."""
    with model.match(tokens) as lease:
        began = time.perf_counter()
        lease.wait(deadline_s)
        return time.perf_counter() - began


def test_a_stalled_server_costs_one_budget_once_and_is_used_again_within_seconds(
    tmp_path: Path, own_redis: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    stored_elsewhere(tmp_path, own_redis, prompt(10, seed=1))
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder, **QUICK) as pool:
        model = pool.register(spec())
        in_normal_mode(pool)
        own_redis.freeze()
        first = wait_seconds(model, prompt(10, seed=2))
        assert pool.stats().mode == "no-dragonfly"
        rest = [wait_seconds(model, prompt(10, seed=3 + at)) for at in range(1000)]
        own_redis.thaw()
        began = time.perf_counter()
        eventually(lambda: looked_up(model, prompt(10, seed=1)) == {DRAGONFLY: 10}, "hits are back")
        back = time.perf_counter() - began
    median = statistics.median(rest)
    with capsys.disabled():
        print(f"\nstalled: first wait {first * 1e3:.0f} ms (budget {BUDGET_S * 1e3:.0f}), then {median * 1e6:.0f} us "
              f"(median), {max(rest) * 1e3:.1f} ms at most; hits {back:.2f} s after SIGCONT")  # fmt: skip
    assert first < BUDGET_S + SLACK_S
    assert median < 1e-3
    assert max(rest) < BUDGET_S + SLACK_S
    assert back < 5.0


def test_two_tiers_that_stall_at_once_cost_one_budget(tmp_path: Path, own_redis: Server, own_postgres: Server) -> None:
    servers: dict[str, Any] = {"dragonfly": own_redis.folder, "database": own_postgres.folder}
    budget = {"budgetS": 1.0}
    with open_shared(tmp_path / "p", **servers, dragonfly_options=budget, database_options=budget) as pool:
        model = pool.register(spec())
        in_normal_mode(pool)
        wait_seconds(model, prompt(10, seed=1))  # from now on there are connections
        postmaster = psutil.Process(own_postgres.pid)
        stopped = [psutil.Process(own_redis.pid), postmaster, *postmaster.children(recursive=True)]
        try:
            for process in stopped:
                process.suspend()
            took_s = wait_seconds(model, prompt(10, seed=2))
        finally:
            for process in stopped:
                process.resume()
        assert pool.stats().mode == "no-dragonfly+no-postgres"
        assert 0.9 < took_s < 1.8
        in_normal_mode(pool)


def test_while_one_tier_stalls_what_the_other_has_is_served_without_waiting_for_it(
    tmp_path: Path, own_redis: Server, postgres: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers: dict[str, Any] = {"dragonfly": own_redis.folder, "database": postgres}
    tenants = [f"tenant-{at}" for at in range(20)]
    with open_shared(tmp_path / "warm", **servers) as pool:
        model = pool.register(spec())
        for tenant in tenants:
            store(model, prompt(4), tenant)
        flushed(pool)
    with open_shared(tmp_path / "cold", **servers, **QUICK) as pool:
        model = pool.register(spec())
        in_normal_mode(pool)
        own_redis.freeze()
        seconds = []
        for tenant in tenants:
            began = time.perf_counter()
            assert looked_up(model, prompt(4), tenant) == {DATABASE: 4}
            seconds.append(time.perf_counter() - began)
        own_redis.thaw()
        in_normal_mode(pool)
    with capsys.disabled():
        print(f"\nbeside a stalled tier: first {seconds[0] * 1e3:.0f} ms, then "
              f"{statistics.median(seconds[1:]) * 1e3:.1f} ms")  # fmt: skip
    assert seconds[0] < BUDGET_S + SLACK_S
    assert statistics.median(seconds[1:]) < BUDGET_S


def test_no_wait_is_longer_than_its_deadline_though_the_budget_is(tmp_path: Path, own_redis: Server) -> None:
    stored_elsewhere(tmp_path, own_redis, prompt(10, seed=1))
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder) as pool:
        model = pool.register(spec())
        own_redis.freeze()
        assert wait_seconds(model, prompt(10, seed=1), deadline_s=0.05) < 0.05 + SLACK_S
        own_redis.thaw()
        eventually(lambda: looked_up(model, prompt(10, seed=1)) != {}, "it is served")
        check(pool, [])


@contextmanager
def in_the_background(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each until the block has ended; what one raises is raised then."""
    ended = threading.Event()
    errors: list[BaseException] = []

    def run(work: Callable[[threading.Event], None]) -> None:
        try:
            work(ended)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_bytes_that_arrive_after_the_deadline_change_nobodys_slot(tmp_path: Path, own_redis: Server) -> None:
    prompts = [prompt(12, seed=seed) for seed in range(12)]
    stored_elsewhere(tmp_path, own_redis, *prompts, layout=LARGE)
    ram = 40 * LARGE.record_bytes
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder, ram=ram, **QUICK) as pool:
        model, small = pool.register(spec(layout=LARGE)), pool.register(spec("small"))
        arrived: list[int] = []

        def look_up(number: int) -> Callable[[threading.Event], None]:
            def work(ended: threading.Event) -> None:
                random = Random(number)
                while not ended.is_set():
                    deadline_s = random.choice([0.002, 0.01, 0.05, 5.0])
                    arrived.append(sum(looked_up(model, random.choice(prompts), deadline_s=deadline_s).values()))

            return work

        def store_others(ended: threading.Event) -> None:
            seed = 1000
            while not ended.is_set():
                seed += 1
                store(small, prompt(20, seed=seed))
                assert load(small, prompt(20, seed=seed)) <= 20

        with in_the_background(*map(look_up, range(3)), store_others):
            for _ in range(8):
                before = len(arrived)
                eventually(lambda before=before: len(arrived) > before + 3, "lookups go on")  # type: ignore[misc]
                own_redis.freeze()
                eventually(lambda: pool.degradations() != frozenset(), "the stall is noticed")
                own_redis.thaw()
                in_normal_mode(pool)
        assert max(arrived) == 12
        eventually(lambda: not remote_of(pool)._running, "lookups end")
        check(pool, [])


def test_a_server_that_is_killed_with_writes_in_flight_costs_nothing_but_hits(
    tmp_path: Path, own_redis: Server
) -> None:
    with open_shared(tmp_path / "warm", dragonfly=own_redis.folder, ram=64 * MIB) as pool:
        model = pool.register(spec(layout=LARGE))

        def sent() -> int:
            return pool.stats().shared[DRAGONFLY].sent_blocks

        for seed in range(15):
            store(model, prompt(10, seed=seed))
            if seed == 7:
                eventually(lambda: sent() > 0, "some are sent")
                own_redis.kill()
        flushed(pool)
        assert pool.degradations() == {Degradation.NO_DRAGONFLY}
        assert sent() < 150
        assert sum(pool.stats().shared[DRAGONFLY].dropped_blocks.values()) + sent() == 150
        assert load(model, prompt(10, seed=14)) == 10, "what is here needs no server"
        own_redis.start()
        in_normal_mode(pool)
        for seed in range(15):
            assert sum(looked_up(model, prompt(10, seed=seed)).values()) == 10
        flushed(pool)
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder, ram=64 * MIB) as pool:
        model = pool.register(spec(layout=LARGE))
        for seed in range(15):
            assert looked_up(model, prompt(10, seed=seed)) == {DRAGONFLY: 10}, "what was used again is there"


def test_a_server_that_comes_back_empty_is_filled_by_what_is_used(tmp_path: Path, own_redis: Server) -> None:
    with open_shared(tmp_path / "warm", dragonfly=own_redis.folder) as pool:
        model = pool.register(spec())
        for seed in range(3):
            store(model, prompt(8, seed=seed))
        flushed(pool)
        own_redis.kill()
        assert looked_up(model, prompt(8, seed=9)) == {}
        own_redis.start()
        in_normal_mode(pool)
        with client_of(own_redis.folder) as client:
            assert client.dbsize() == 0
            assert looked_up(model, prompt(8, seed=0)) == {RAM: 8}
            eventually(lambda: client.dbsize() == 8, "what was used is sent again, and nothing else")
        check(pool, [])


@pytest.mark.parametrize("first", ["server", "file"])
def test_a_password_that_is_changed_on_both_sides_is_used_from_then_on(
    tmp_path: Path, own_redis: Server, first: str
) -> None:
    with open_shared(tmp_path / "warm", dragonfly=own_redis.folder) as pool:
        model = pool.register(spec())
        store(model, prompt(8, seed=1))
        flushed(pool)
        folder = own_redis.folder
        with client_of(folder) as client:
            change = [
                lambda: client.execute_command("ACL", "SETUSER", "default", "resetpass", ">new-word"),
                lambda: (folder / "password").write_text("new-word"),
            ]
            for act in change if first == "server" else reversed(change):
                act()
            # those that are logged in stay so: the server ends them, as a restart would
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        empty_ram(pool)
        eventually(lambda: looked_up(model, prompt(8, seed=1)) == {DRAGONFLY: 8}, "the new password is used")
        in_normal_mode(pool)


def test_a_server_that_is_restarted_with_another_password_is_used_once_the_file_says_so(
    tmp_path: Path, own_redis: Server
) -> None:
    with open_shared(tmp_path / "warm", dragonfly=own_redis.folder) as pool:
        model = pool.register(spec())
        with client_of(own_redis.folder) as client:
            client.execute_command("ACL", "SETUSER", "default", "resetpass", ">new-word")
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        store(model, prompt(8, seed=1))
        eventually(lambda: "password" in pool.stats().tiers[DRAGONFLY].last_error, "it says why")
        assert pool.stats().mode == "no-dragonfly"
        password = (own_redis.folder / "password").read_text()
        assert password not in pool.stats().tiers[DRAGONFLY].last_error
        (own_redis.folder / "password").write_text("new-word")
        in_normal_mode(pool)
        assert looked_up(model, prompt(8, seed=1)) == {RAM: 8}
        flushed(pool)
        empty_ram(pool)
        assert looked_up(model, prompt(8, seed=1)) == {DRAGONFLY: 8}


def test_a_server_without_room_refuses_writes_and_serves_what_it_has(
    tmp_path: Path, own_redis: Server, redis_client: redis.Redis
) -> None:
    stored_elsewhere(tmp_path, own_redis, prompt(10, seed=1))
    redis_client.config_set("maxmemory-policy", "noeviction")
    redis_client.config_set("maxmemory", 1)
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder, ram=8 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(20, 40):
            store(model, prompt(10, seed=seed))
            flushed(pool)
            empty_ram(pool)
            assert looked_up(model, prompt(10, seed=1)) == {DRAGONFLY: 10}, "a full tier is still read"
        shared = pool.stats().shared[DRAGONFLY]
        assert shared.sent_blocks == 0
        assert sum(shared.dropped_blocks.values()) == 200
        assert pool.degradations() == {Degradation.NO_DRAGONFLY}, "it says that it does not work as it should"
        assert "OOM" in pool.stats().tiers[DRAGONFLY].last_error
        redis_client.config_set("maxmemory", 64 * MIB)
        store(model, prompt(10, seed=50))
        eventually(
            lambda: load(model, prompt(10, seed=50)) == 10 and redis_client.dbsize() == 20,
            "what is used is sent again, now that there is room",
        )
        in_normal_mode(pool)
        check(pool, [])


@pytest.mark.parametrize("seed", range(3))
def test_each_value_that_is_changed_on_the_server_is_a_miss_and_is_dropped(
    tmp_path: Path, own_redis: Server, redis_client: redis.Redis, seed: int
) -> None:
    random = Random(seed)
    prompts = [prompt(6, seed=at) for at in range(30)]
    stored_elsewhere(tmp_path, own_redis, *prompts)
    pristine = values(redis_client)
    damaged = {name for name in pristine if random.random() < 0.2}
    for name in damaged:
        value = bytearray(pristine[name])
        at = random.choice([random.randrange(RECORD), random.randrange(256), RECORD - 1])
        value[at] ^= 1 << random.randrange(8)
        redis_client.set(name, bytes(value), keepttl=True)
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder) as pool:
        model = pool.register(spec())
        found = 0
        while damaged:
            for tokens in prompts:
                names = [name_of(report.key, pristine) for report in model.explain(tokens)]
                first = next((at for at, name in enumerate(names) if name in damaged), None)
                assert sum(looked_up(model, tokens).values()) == (6 if first is None else first)
                if first is not None:
                    assert not redis_client.exists(names[first])
                    damaged.remove(names[first])
                    found += 1
                store(model, tokens)
            flushed(pool)
            assert sum(pool.stats().tiers[DRAGONFLY].corrupt.values()) == found
            assert pool.stats().mode == "normal", "a bad record says nothing of the tier"
            check(pool, [])
            empty_ram(pool)
        assert values(redis_client) == pristine, "what was computed again took their place"


def values(client: redis.Redis) -> dict[bytes, bytes]:
    """All records, by name."""
    return {name: client.get(name) for name in sorted(client.scan_iter(f"{PREFIX}*"))}  # type: ignore[misc]


def name_of(key: BlockKey, names: Iterable[bytes]) -> bytes:
    return next(name for name in names if name.endswith(key.hex().encode()))


@pytest.mark.parametrize("value", [b"", b"x", b"y" * RECORD, b"z" * (RECORD + 4096), b"w" * (8 * KIB)])
def test_values_of_other_programs_under_our_keys_are_misses(
    tmp_path: Path, own_redis: Server, redis_client: redis.Redis, value: bytes
) -> None:
    stored_elsewhere(tmp_path, own_redis, prompt(6, seed=1), prompt(6, seed=2))
    for name in redis_client.scan_iter(f"{PREFIX}*"):
        redis_client.set(name, value)
    with open_shared(tmp_path / "cold", dragonfly=own_redis.folder) as pool:
        model = pool.register(spec())
        assert looked_up(model, prompt(6, seed=1)) == {}
        store(model, prompt(6, seed=2))
        flushed(pool)
        empty_ram(pool)
        looked_up(model, prompt(6, seed=2))
        assert pool.stats().mode == "normal"
        check(pool, [])


def test_a_pool_that_is_closed_while_the_server_stalls_is_closed_in_time(tmp_path: Path, own_redis: Server) -> None:
    pool = open_shared(tmp_path / "warm", dragonfly=own_redis.folder, **QUICK)
    model = pool.register(spec())
    store(model, prompt(50))
    own_redis.freeze()
    store(model, prompt(50, seed=2))
    began = time.perf_counter()
    pool.close()
    assert time.perf_counter() - began < 5.0
    own_redis.thaw()

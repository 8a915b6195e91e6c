"""Everything at once, from several threads, in very little memory."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

import pytest

from kvpool.blocks.record import Buffer
from kvpool.errors import PoolClosedError
from kvpool.pool.events import BlockRemoved, BlockStored, Event
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.prefix.node import LEVELS
from kvpool.tiers.tier import TierName
from tests.footprint import footprint, holds_no_more_than
from tests.waiting import eventually

from .disks import SickDisk
from .kv import (
    KIB,
    LAYOUT,
    MIB,
    RECORD,
    WIDE,
    Prompt,
    check,
    check_chains_on_ssd,
    config,
    disk_usage,
    flushed,
    is_within_capacity,
    load,
    loaded_blocks,
    open_pool,
    prompt,
    spec,
    store,
)

TENANTS = ("a", "b", "c")


class Crowd:
    """Threads that each do their seeded work; what they raise, the test raises."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def add(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=self._run, args=(work,)))

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
        if self.errors:
            raise self.errors[0]

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)
            raise


class Ledger:
    """A listener that keeps what the events say is there."""

    def __init__(self) -> None:
        self.there: dict[TierName, set[bytes]] = {TierName.RAM: set(), TierName.SSD: set()}
        self.sequences: list[int] = []

    def __call__(self, event: Event) -> None:
        self.sequences.append(event.sequence)
        match event.what:
            case BlockStored(keys=keys, medium=medium):
                self.there[medium].update(keys)
            case BlockRemoved(keys=keys, medium=medium):
                self.there[medium].difference_update(keys)


def keys_in_index(pool: Pool) -> dict[TierName, set[bytes]]:
    there: dict[TierName, set[bytes]] = {TierName.RAM: set(), TierName.SSD: set()}
    with pool._engine.index.lock:
        for tree in pool._engine.index.trees.values():
            for node in tree.nodes():
                for level, tier in zip(LEVELS[1:], there, strict=True):
                    for at, place in enumerate(node.places[level] or ()):
                        if place >= 0:
                            there[tier].add(bytes(node.keys[16 * at : 16 * at + 16]))
    return there


def some_prompt(random: Random) -> list[int]:
    return prompt(random.randint(0, 3), seed=random.randrange(3)) + prompt(
        random.randint(0, 5), seed=10 + random.randrange(12), extra_tokens=random.randrange(3)
    )


def work(pool: Pool, models: Sequence[Model], seed: int, operations: int) -> None:
    random = Random(seed)
    leases: list[tuple[Lease, Callable[[], int]]] = []
    try:
        for _ in range(operations):
            model, tenant, tokens = random.choice(models), random.choice(TENANTS), some_prompt(random)
            match random.choices(["store", "load", "hold", "let go", "erase", "reload", "look"], WEIGHTS)[0]:
                case "store":
                    result = store(model, tokens, tenant)
                    assert result.stored + result.already_there + sum(result.refused.values()) == len(tokens) // 4
                case "load":
                    load(model, tokens, tenant)
                case "hold" if len(leases) < 2:
                    lease = model.match(tokens, tenant=tenant)
                    leases.append((lease, partial(loaded_blocks, lease, model, tokens, tenant)))
                case "let go" if leases:
                    lease, load_it = leases.pop(random.randrange(len(leases)))
                    with lease:
                        load_it()
                case "erase":
                    pool.erase(tenant=tenant)
                case "reload":
                    pool.reload(config(ram=random.choice([16, 24, 40]) * RECORD, ssd=random.choice([MIB, MIB // 2])))
                case "look":
                    model.explain(tokens, tenant=tenant)
                    pool.stats()
                    pool.subscribe(lambda event: None)()
    finally:
        for lease, _ in leases:
            lease.close()


WEIGHTS = [40, 40, 8, 8, 2, 2, 3]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("second_hit", [False, True])
def test_threads_that_do_everything_at_once_see_only_what_is_right(
    quick_path: Path, seed: int, second_hit: bool
) -> None:
    threads, before = running_threads(), footprint()
    ledger = Ledger()
    pool = open_pool(quick_path, ram=24 * RECORD, ssd=MIB, secondHit=second_hit)
    with pool:
        models = [pool.register(spec("small", layout=LAYOUT)), pool.register(spec("wide", layout=WIDE))]
        unsubscribe = pool.subscribe(ledger)
        crowd = Crowd()
        for number in range(4):
            crowd.add(partial(work, pool, models, 100 * seed + number, operations=1200))
        crowd.run()
        pool.reload(config(ram=24 * RECORD, ssd=MIB))
        eventually(lambda: is_within_capacity(pool), "capacities hold")
        eventually(lambda: not pool._engine.index.has_graves, "nothing is left of what was erased")
        check(pool, leases=())
        check_chains_on_ssd(pool)
        adds_up(pool, ledger)
        unsubscribe()
        assert ledger.sequences == list(range(len(ledger.sequences)))
    eventually(partial(_no_others_run, threads), "no thread is left")
    holds_no_more_than(before)
    with open_pool(quick_path, ram=24 * RECORD, ssd=MIB) as again:
        check(again, leases=())


@pytest.mark.parametrize("seed", range(3))
def test_threads_on_a_disk_that_comes_and_goes_see_only_what_is_right(quick_path: Path, seed: int) -> None:
    threads, before = running_threads(), footprint()
    disk, ledger = SickDisk(), Ledger()
    with open_pool(quick_path, ram=24 * RECORD, ssd=MIB, budgetS=0.05, disk=disk) as pool:
        models = [pool.register(spec("small", layout=LAYOUT)), pool.register(spec("wide", layout=WIDE))]
        unsubscribe = pool.subscribe(ledger)
        crowd, done = Crowd(), threading.Event()
        for number in range(3):
            crowd.add(partial(work, pool, models, 100 * seed + number, operations=600))
        sickness = threading.Thread(target=_ail, args=(disk, Random(seed), done))
        sickness.start()
        try:
            crowd.run()
        finally:
            done.set()
            sickness.join(20)
            disk.recover()
        pool.reload(config(ram=24 * RECORD, ssd=MIB))
        seeds = iter(range(1000, 1_000_000))
        eventually(lambda: bool(store(models[0], prompt(1, seed=next(seeds)))) and _is_well(pool), "all is well again")
        eventually(lambda: is_within_capacity(pool), "capacities hold")
        eventually(lambda: not pool._engine.index.has_graves, "nothing is left of what was erased")
        check(pool, leases=())
        adds_up(pool, ledger)
        unsubscribe()
    eventually(partial(_no_others_run, threads), "no thread is left")
    holds_no_more_than(before)
    with open_pool(quick_path, ram=24 * RECORD, ssd=MIB) as again:
        check(again, leases=())
        for tenant in TENANTS:
            load(again.model("small"), prompt(3, seed=0), tenant)


def _ail(disk: SickDisk, random: Random, done: threading.Event) -> None:
    """Fails or stalls one kind of call, then is well for a while, over and over."""
    while not done.wait(random.uniform(0, 0.03)):
        call = random.choice(["pwritev", "preadv", "fallocate", "create", "fdatasync", "rename", "unlink", "open"])
        if random.random() < 0.6:
            disk.errors = {call: random.choice([errno.EIO, errno.ENOSPC])}
        else:
            disk.go_on.clear()
            disk.stalls = lambda name, call=call: name == call  # type: ignore[misc]
        done.wait(random.uniform(0, 0.1))
        disk.recover()


def adds_up(pool: Pool, ledger: Ledger) -> None:
    """What the events say is there, the index has, and the files of ssd too, once the housekeeper is at rest."""
    tier = pool._engine.store.tier
    assert tier is not None
    eventually(lambda: tier.stats().live_records == pool.stats().tiers[TierName.SSD].blocks, "ssd has what it should")

    def differences() -> dict[TierName, tuple[int, int]]:
        there = keys_in_index(pool)
        return {name: (len(keys - there[name]), len(there[name] - keys)) for name, keys in ledger.there.items()}

    eventually(lambda: set(differences().values()) == {(0, 0)}, "the events add up to what is there")


def _is_well(pool: Pool) -> bool:
    return pool.flush(0.1) and pool.stats().mode == "normal"


def running_threads() -> Counter[str]:
    return Counter(thread.name for thread in threading.enumerate() if thread.name.startswith("kvpool"))


def test_one_prompt_that_many_threads_store_at_once_is_kept_once(tmp_path: Path) -> None:
    tokens = prompt(30)
    with open_pool(tmp_path, ram=128 * RECORD) as pool:
        model = pool.register(spec())
        stored: list[int] = []
        start = threading.Barrier(4)
        crowd = Crowd()

        def store_it() -> None:
            start.wait(20)
            result = store(model, tokens)
            assert result.stored + result.already_there == 30
            stored.append(result.stored)
            assert load(model, tokens) == 30

        for _ in range(4):
            crowd.add(store_it)
        crowd.run()
        assert sum(stored) == 30
        assert pool.stats().tiers[TierName.RAM].used_bytes == 30 * RECORD
        check(pool, leases=())


def test_many_threads_load_one_prompt_from_ssd_at_once(tmp_path: Path) -> None:
    tokens = prompt(60)
    with open_pool(tmp_path, ssd=8 * MIB, ram=300 * RECORD) as pool:
        store(pool.register(spec()), tokens)
    with open_pool(tmp_path, ssd=8 * MIB, ram=300 * RECORD) as pool:  # room for what all of them have in flight
        model = pool.register(spec())
        crowd = Crowd()
        for _ in range(4):
            crowd.add(lambda: _all_arrive(model, tokens))
        crowd.run()
        check(pool, leases=())
        assert pool.stats().tiers[TierName.RAM].used_bytes == 60 * RECORD


def _all_arrive(model: Model, tokens: list[int]) -> None:
    assert load(model, tokens) == 60


def test_closing_while_others_work_ends_them_with_a_clear_error(quick_path: Path) -> None:
    for round_ in range(5):
        threads = running_threads()
        pool = open_pool(quick_path, ram=24 * RECORD, ssd=MIB)
        models = [pool.register(spec("small", layout=LAYOUT)), pool.register(spec("wide", layout=WIDE))]
        crowd = Crowd()
        for number in range(3):
            crowd.add(partial(_work_until_closed, pool, models, 10 * round_ + number))
        crowd.add(pool.close)
        crowd.run()
        eventually(partial(_no_others_run, threads), "no thread is left")
    with open_pool(quick_path, ram=24 * RECORD, ssd=MIB) as pool:
        check(pool, leases=())
    assert disk_usage(quick_path) <= MIB


def _work_until_closed(pool: Pool, models: Sequence[Model], seed: int) -> None:
    with pytest.raises(PoolClosedError, match="pool was closed"):
        work(pool, models, seed, operations=1_000_000)


def _no_others_run(threads: Counter[str]) -> bool:
    return not running_threads() - threads


def test_a_pool_that_is_closed_while_a_sink_takes_its_time_waits_for_it(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Prompt):
        def write_block(self, index: int, payload: Buffer) -> None:
            entered.set()
            assert leave.wait(20)
            super().write_block(index, payload)

    pool = open_pool(tmp_path, ssd=256 * KIB)
    model = pool.register(spec())
    store(model, prompt(4))
    flushed(pool)
    sink = Slow(model, prompt(4), "default")
    lease = model.match(prompt(4))
    crowd = Crowd()
    crowd.add(lambda: _loads_all(lease, sink))
    crowd.add(lambda: _close_once(pool, entered, leave))
    crowd.run()
    assert (sink.written, sink.wrong) == ([0, 1, 2, 3], [])
    lease.close()


def _loads_all(lease: Lease, sink: Prompt) -> None:
    assert lease.load(sink) == 16


def _close_once(pool: Pool, entered: threading.Event, leave: threading.Event) -> None:
    assert entered.wait(20)
    closing = threading.Thread(target=pool.close)
    closing.start()
    eventually(lambda: pool._engine.gate.is_shut, "the pool is being closed")
    leave.set()
    closing.join(20)
    assert not closing.is_alive()

"""Hours of bad luck in seconds: threads that use a pool with all tiers, while what it relies on fails in every way.

Which faults come in which order follows from the seed, and so does what each thread asks for; how far the threads are
when a fault comes does not. Every byte that is ever handed out is compared with what was stored.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeAlias

import psycopg
import redis

from kvpool.blocks.layout import KVLayout
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.tiers.dragonfly.names import PREFIX
from tests.local.clients import postgres_client
from tests.local.servers import Server
from tests.pool.crashing import TINY
from tests.pool.disks import SickDisk
from tests.pool.kv import LAYOUT, WIDE, loaded_blocks, prompt, segment_files, spec, store
from tests.tiers.dragonfly.servers import client_of

LAYOUTS: dict[str, KVLayout] = {"small": LAYOUT, "wide": WIDE, "tiny": TINY}
TENANTS = ("acme", "beta", "corp")
PROMPTS = [prompt(3 + trunk, seed=trunk) + prompt(1 + tail, seed=10 + tail) for trunk in range(3) for tail in range(6)]
DEADLINES_S = (0.0, 0.005, 0.1, 2.0)
CLIENTS = 4
SHORTEST_S, LONGEST_S = 0.2, 1.2
"""How long a fault lasts, and how long there is none."""


class Ill(NamedTuple):
    """All that can fail, and the means to make it."""

    pool: Pool
    redis: Server
    postgres: Server
    disk: SickDisk


def use(pool: Pool, number: int, seed: int, ended: threading.Event) -> int:
    """What one thread does: look prompts up, load what there is, store what there is not. Its requests."""
    random = Random(f"{seed} {number}")
    models = [pool.register(spec(name, layout=layout)) for name, layout in LAYOUTS.items()]
    requests = 0
    while not ended.is_set():
        model, tenant, tokens = random.choice(models), random.choice(TENANTS), random.choice(PROMPTS)
        ask(model, tenant, tokens, random.choice(DEADLINES_S))
        requests += 1
    return requests


def ask(model: Model, tenant: str, tokens: list[int], deadline_s: float) -> None:
    """One request. Fails if a block comes back other than it was stored."""
    with model.match(tokens, tenant=tenant) as lease:
        lease.wait(deadline_s)
        arrived = loaded_blocks(lease, model, tokens, tenant)
    if arrived * model.layout.block_tokens < len(tokens):
        store(model, tokens, tenant)


@contextmanager
def in_use(pool: Pool, seed: int) -> Iterator[Counter[int]]:
    """Clients use the pool while the block runs; what went wrong for one of them is raised at its end."""
    ended = threading.Event()
    errors: list[BaseException] = []
    requests = Counter[int]()

    def run(number: int) -> None:
        try:
            requests[number] = use(pool, number, seed, ended)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield requests
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


# -- faults: each begins, lasts for the time of its block, and is over afterwards --------------------------------------


@contextmanager
def redis_stalls(ill: Ill, random: Random) -> Iterator[None]:
    with stopped([ill.redis.pid]):
        yield


@contextmanager
def postgres_stalls(ill: Ill, random: Random) -> Iterator[None]:
    with stopped([ill.postgres.pid, *children_of(ill.postgres.pid)]):
        yield


@contextmanager
def redis_dies(ill: Ill, random: Random) -> Iterator[None]:
    ill.redis.kill()
    yield
    ill.redis.start()


@contextmanager
def postgres_dies(ill: Ill, random: Random) -> Iterator[None]:
    ill.postgres.kill()
    yield
    ill.postgres.start()


@contextmanager
def redis_is_full(ill: Ill, random: Random) -> Iterator[None]:
    with client_of(ill.redis.folder) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        yield
        client.config_set("maxmemory", 256 << 20)


@contextmanager
def redis_is_emptied(ill: Ill, random: Random) -> Iterator[None]:
    with client_of(ill.redis.folder) as client:
        client.flushall()
    yield


@contextmanager
def redis_cuts_connections(ill: Ill, random: Random) -> Iterator[None]:
    with client_of(ill.redis.folder) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    yield


@contextmanager
def postgres_cuts_connections(ill: Ill, random: Random) -> Iterator[None]:
    with postgres_client(ill.postgres.folder) as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'kvpool'"
        ).fetchall()
    yield


@contextmanager
def values_change_in_redis(ill: Ill, random: Random) -> Iterator[None]:
    with client_of(ill.redis.folder) as client:
        for name in sorted(client.scan_iter(f"{PREFIX}*")):
            if random.random() < 0.3:
                with suppress(redis.ResponseError):  # another kind of value
                    client.setrange(name, random.randrange(256), random.randbytes(1))
    yield


@contextmanager
def values_change_in_postgres(ill: Ill, random: Random) -> Iterator[None]:
    with postgres_client(ill.postgres.folder) as connection, suppress(psycopg.OperationalError):
        connection.execute(
            "update kvpool.payloads set record = set_byte(record, %s, (get_byte(record, %s) + 1) %% 256)"
            " where get_byte(key, 0) %% 3 = 0",
            [at := random.randrange(4200), at],
        )
    yield


@contextmanager
def bytes_change_on_disk(ill: Ill, random: Random) -> Iterator[None]:
    for path in segment_files(ill.pool.directory):
        with suppress(FileNotFoundError), path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            for _ in range(4):
                at = random.randrange(max(1, size))
                os.pwrite(file.fileno(), random.randbytes(1), at)
    yield


@contextmanager
def disk_fails(ill: Ill, random: Random) -> Iterator[None]:
    call = random.choice(["pwritev", "preadv", "fdatasync", "create", "unlink"])
    ill.disk.errors = {call: random.choice([errno.EIO, errno.ENOSPC, errno.EROFS])}
    yield
    ill.disk.recover()


@contextmanager
def disk_stalls(ill: Ill, random: Random) -> Iterator[None]:
    call = random.choice(["pwritev", "preadv"])
    ill.disk.go_on.clear()
    ill.disk.stalls = lambda name: name == call
    yield
    ill.disk.recover()


Fault: TypeAlias = Callable[[Ill, Random], AbstractContextManager[None]]
FAULTS: list[list[Fault]] = [
    [redis_stalls, redis_dies, redis_is_full, redis_is_emptied, redis_cuts_connections, values_change_in_redis],
    [postgres_stalls, postgres_dies, postgres_cuts_connections, values_change_in_postgres],
    [disk_fails, disk_stalls, bytes_change_on_disk],
]
"""Of each part."""


def schedule(random: Random) -> Iterator[list[Fault]]:
    """Faults that come together: of one part, or of several. Each part's in a random order, again and again."""
    decks: list[list[Fault]] = [[] for _ in FAULTS]
    while True:
        together: list[Fault] = []
        for part in random.sample(range(len(FAULTS)), random.choice([1, 1, 2, 3])):
            decks[part] = decks[part] or random.sample(FAULTS[part], len(FAULTS[part]))
            together.append(decks[part].pop())
        yield together


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """These processes are stopped, those of them that there are."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

"""The ten scenarios, on servers that each pool runs for itself: see `scenarios` for what they say."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from kvpool.api.codec import Codec
from kvpool.config import RuntimeConfig
from kvpool.local import local_postgres
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec
from kvpool.resilience import Degradation
from kvpool.tiers.gpu.cpu import CpuDevice
from tests.pool.kv import DEADLINE_S, MIB, RECORD, identity, spec
from tests.pool.test_pool_codecs import LARGE as FLOATS
from tests.pool.test_pool_gpu import Devices

from . import scenarios
from .pools import in_normal_mode, shared_config

RAM_BLOCKS, GPU_BLOCKS = 64, 24
DRAGONFLY = {"memoryBytes": 64 * MIB}
"""A server of the pool's own."""
DATABASE: dict[str, Any] = {}


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of a PostgreSQL server that was never used: making them takes seconds."""
    directory = tmp_path_factory.mktemp("new")
    server = local_postgres(directory, connections=6)
    try:
        server.start(DEADLINE_S)
    finally:
        server.stop(DEADLINE_S)
    yield server.folder.parent
    shutil.rmtree(directory)


class Site:
    """Where the pools of one scenario lie."""

    def __init__(self, directory: Path, new_database: Path) -> None:
        self.directory = directory
        self.node = directory / "node"
        Pool.open(shared_config(self.node, ram=MIB), directory=self.node).close()
        shutil.copytree(new_database, self.node / "local" / "postgres")

    @contextmanager
    def pool(self, *, gpu: int | None = GPU_BLOCKS, ram: int = RAM_BLOCKS, **options: Any) -> Iterator[Pool]:
        """A pool with servers of its own; opened again, it finds what they hold."""
        with opened(self.config(gpu=gpu, ram=ram, **options), self.node) as pool:
            yield pool

    def config(self, *, gpu: int | None, ram: int, **options: Any) -> RuntimeConfig:
        """Of that pool."""
        plain = shared_config(self.node, dragonfly=DRAGONFLY, database=DATABASE, **defaults(ram, options))
        return with_gpu(plain, gpu)

    @contextmanager
    def cold(self, *, ram: int = RAM_BLOCKS, **options: Any) -> Iterator[Pool]:
        """A pool elsewhere, without a gpu, that uses those servers."""
        directory, local = self.directory / "cold", self.node / "local"
        config = shared_config(
            directory,
            dragonfly=local / "dragonfly" / "service",
            database=local / "postgres" / "service",
            **defaults(ram, options),
        )
        with opened(config, directory) as pool:
            yield pool

    def ask(self, query: str) -> list[Any]:
        """Rows from the database of the pool's server."""
        folder = self.node / "local" / "postgres" / "service"
        address, password = (folder / "url").read_text(), (folder / "password").read_text()
        with psycopg.connect(address, user="kvpool", password=password) as connection:
            return connection.execute(query.encode()).fetchall()


def defaults(ram: int, options: dict[str, Any]) -> dict[str, Any]:
    return {"ram": ram * RECORD, "ssd": 64 * MIB, "eviction": "lru", **options}


def with_gpu(config: RuntimeConfig, blocks: int | None) -> RuntimeConfig:
    plain = config.model_dump(mode="json", by_alias=True)
    plain["gpu"] = None if blocks is None else {"capacityBytes": blocks * RECORD}
    return RuntimeConfig.model_validate(plain)


@contextmanager
def opened(config: RuntimeConfig, directory: Path) -> Iterator[Pool]:
    with Pool.open(config, directory=directory, gpu=Devices(CpuDevice)) as pool:
        assert pool.degradations() <= {Degradation.NO_QDRANT}, "all tiers are there at once"
        in_normal_mode(pool)
        touching = pool._engine.ram._prefault_thread
        if touching is not None:  # a small tier would lack a block meanwhile
            touching.join()
        yield pool


@pytest.fixture
def site(tmp_path: Path, new_database: Path) -> Iterator[Site]:
    yield Site(tmp_path / "site", new_database)
    shutil.rmtree(tmp_path / "site")  # large, and pytest keeps what it finds for days


def test_five_tier_waterfall(site: Site) -> None:
    with site.pool(secondHit=True) as pool:
        scenarios.five_tier_waterfall(pool, pool.register(spec()))


def test_hit_path_order(site: Site) -> None:
    with site.pool(gpu=48, ram=160) as pool, site.cold() as cold:
        scenarios.hit_path_order(pool, pool.register(spec()), cold)


def test_eviction_cascade(site: Site) -> None:
    with site.pool(gpu=8, ram=32, ssd=2 * MIB) as pool:
        scenarios.eviction_cascade(pool, pool.register(spec()), prompts=40)


def test_prefix_sharing_across_tiers(site: Site) -> None:
    sharing = {"minPrefixTokens": 8}
    with site.pool(sharing=sharing) as pool, site.cold(sharing=sharing) as cold:
        scenarios.prefix_sharing_across_tiers(pool, pool.register(spec()), cold)


def test_compression_with_the_database(site: Site) -> None:
    int8 = {"codec": Codec.INT8_ASYMMETRIC.value}
    with site.pool(gpu=None, database_options=int8) as pool, site.cold(database_options=int8) as cold:
        scenarios.compression_with_the_database(pool, pool.register(spec(layout=FLOATS)), cold, site.ask)


def test_slab_reuse(site: Site) -> None:
    with site.pool(gpu=None) as pool:
        scenarios.slab_reuse(pool)


def test_end_to_end_latency(site: Site) -> None:
    with site.pool(gpu=48, ram=160) as pool, site.cold() as cold:
        slow = ModelSpec(identity=identity(), prefill_tokens_per_second=scenarios.PREFILL_TOKENS_PER_SECOND)
        cold.register(slow)
        scenarios.end_to_end_latency(pool, pool.register(slow), cold)


def test_concurrent_stress(site: Site) -> None:
    with site.pool(gpu=12, ram=24, ssd=MIB) as pool, site.cold(ram=16, ssd=MIB) as cold:
        scenarios.concurrent_stress(pool, cold, operations=60)


def test_memory_pressure(site: Site) -> None:
    with site.pool(gpu=8, ram=16) as pool:
        scenarios.memory_pressure(pool, pool.register(spec()), lambda blocks: site.config(gpu=8, ram=blocks))


def test_persistence_over_a_restart(site: Site) -> None:
    options: dict[str, Any] = {
        "sharing": {"minPrefixTokens": 8},
        "database_options": {"qdrant": {"tls": False}},
    }
    with site.pool(**options) as pool:
        scenarios.before_a_restart(pool, pool.register(spec()))
    with site.pool(**options) as pool:
        scenarios.after_a_restart(pool)
    shutil.rmtree(site.node / "ssd")
    with site.pool(**options) as pool:
        scenarios.after_losing_the_disk(pool)

"""Pools with servers of their own, below the bench's directory, which are stopped with them however a run ends."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path

import psycopg

from kvpool.api import Eviction
from kvpool.api.codec import Codec
from kvpool.bench.area import UnmeasurableError
from kvpool.bench.engine.pools import MIB, OpenModel, pool_config, spec_of
from kvpool.catalog.connections import SCHEMES
from kvpool.config import DatabaseConfig, DragonflyConfig, PostgresConfig, RuntimeConfig
from kvpool.config.service import read_service
from kvpool.local import LocalServerError, local_postgres
from kvpool.pool.pool import Pool
from kvpool.pool.remote.opening import LOCAL_NAME
from kvpool.tiers.tier import TierName

CONNECTIONS = 4
BUDGET_S = 10.0
"""So long that a busy machine keeps it: a tier that falls out would be none."""
TTL_S = 7200.0
Capacities = Mapping[TierName, int]
"""Bytes of each tier that a pool has; ram is always one."""


class Nodes:
    """Opens one pool after the other, each as if nothing had been before, and removes its files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count()

    @contextmanager
    def opened(
        self,
        capacities: Capacities,
        payload_bytes: int,
        *,
        codec: Codec = Codec.NONE,
        eviction: Eviction = Eviction.ADAPTIVE,
    ) -> Iterator[OpenModel]:
        """A pool with these tiers, and its model; `codec` is that of all tiers but ram."""
        config = _config(capacities, codec, eviction)
        directory = self._directory / f"node-{next(self._numbers)}"
        try:
            if TierName.DATABASE in capacities:
                Pool.open(_config({TierName.RAM: MIB}, codec, eviction), directory=directory).close()
                shutil.copytree(self._new_database, directory / LOCAL_NAME / self._new_database.name)
            pool = Pool.open(config, directory=directory)
            try:
                if pool.degradations():
                    raise UnmeasurableError(f"not all tiers can be used here: {_faults(pool)}")
                yield OpenModel(pool, pool.register(spec_of(payload_bytes)))
            finally:
                pool.close(deadline_s=0)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @cached_property
    def _new_database(self) -> Path:
        """The files of a PostgreSQL server that was never used: making them takes seconds."""
        try:
            server = local_postgres(self._directory / "new", connections=CONNECTIONS)
            try:
                server.start()
            finally:
                server.stop()
        except LocalServerError as error:
            raise UnmeasurableError(str(error)) from error
        return server.folder.parent


def vacuum(pool: Pool) -> None:
    """Have the database server of a pool from here give the room of removed records free.

    It does so by itself, about once a minute: in a run that passes in less, that would be never.
    """
    address = read_service(pool.directory / LOCAL_NAME / "postgres" / "service", schemes=SCHEMES)
    with psycopg.connect(address.url, user=address.username, password=address.password, autocommit=True) as connection:
        connection.execute("vacuum kvpool.payloads")


def _config(capacities: Capacities, codec: Codec, eviction: Eviction) -> RuntimeConfig:
    config = pool_config(ram_bytes=capacities[TierName.RAM], ssd_bytes=capacities.get(TierName.SSD), eviction=eviction)
    dragonfly = database = None
    if (nbytes := capacities.get(TierName.DRAGONFLY)) is not None:
        dragonfly = DragonflyConfig(
            memory_bytes=nbytes, codec=codec, ttl_s=TTL_S, connections=CONNECTIONS, batch_size=200,
            budget_s=BUDGET_S, tls=False,
        )  # fmt: skip
    if (nbytes := capacities.get(TierName.DATABASE)) is not None:
        database = DatabaseConfig(
            postgres=PostgresConfig(connections=CONNECTIONS, tls=False), codec=codec, inline_max_bytes=2 * MIB,
            inline_bytes=nbytes, journal_bytes=64 * MIB, budget_s=BUDGET_S,
        )  # fmt: skip
    ssd = None if config.ssd is None else config.ssd.model_copy(update={"codec": codec, "budget_s": BUDGET_S})
    return config.model_copy(update={"dragonfly": dragonfly, "database": database, "ssd": ssd})


def _faults(pool: Pool) -> str:
    return "; ".join(f"{tier.name}: {tier.last_error}" for tier in pool.stats().tiers.values() if tier.last_error)

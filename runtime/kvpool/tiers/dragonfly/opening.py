"""Connecting and logging in, by redis-py: addresses, TLS, ACL users. The socket is then ours alone.

Each connection reads the service's folder anew, so a rotated password is used from the next one on. What a server says
to a login may repeat it: the password is taken out of every text.
"""

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from redis import exceptions
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection

from kvpool.config.service import ServiceAddress
from kvpool.errors import ConfigError
from kvpool.tiers.dragonfly.faults import RefusedError, StalledError
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.streams import stream_of
from kvpool.tiers.dragonfly.wire import Wire

_UNIX: Any = UnixDomainSocketConnection
_TCP: Any = Connection
_TLS: Any = SSLConnection
SCHEMES = ("redis", "rediss", "unix")
DEFAULT_PORT = 6379
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
"""In seconds, and a count: a peer that vanished is noticed while its connection is idle."""


class Node(NamedTuple):
    """A node of a cluster."""

    host: str
    port: int


class Opener:
    """Makes connections to the service at `address()`, or to a node of the cluster that it belongs to."""

    def __init__(self, address: Callable[[], ServiceAddress], *, tls: bool) -> None:
        self._address = address
        self._tls = tls

    def open(self, node: Node | None, patience: Patience) -> Wire:
        """A new connection, logged in; `node` None: to the address itself. Raises `RefusedError` or `StalledError`."""
        try:
            address = self._address()
        except ConfigError as error:
            raise RefusedError(str(error)) from None
        try:
            peer = _peer(address, node)
            connection = self._connection(address, node, patience.left_s)
        except ValueError as error:
            raise RefusedError(f"{address.url}: {error}") from None
        try:
            connection.connect()
        except exceptions.TimeoutError:
            raise StalledError(f"{peer}: no connection within {patience.budget_s * 1000:.0f} ms") from None
        except (exceptions.RedisError, OSError, ValueError) as error:  # ValueError: what is no name of a host
            with suppress(exceptions.RedisError, OSError):
                connection.disconnect()
            raise RefusedError(f"{peer}: {_said(error, address.password)}") from None
        patience.moved()
        return Wire(stream_of(connection._sock, connection.disconnect), peer)

    def _connection(self, address: ServiceAddress, node: Node | None, timeout_s: float) -> Any:
        parts = address.parts
        options: dict[str, Any] = {
            "username": address.username,
            "password": address.password,
            "socket_timeout": max(timeout_s, 0.001),
            "socket_connect_timeout": max(timeout_s, 0.001),
            "protocol": 2,
        }
        if parts.scheme == "unix":
            database = parse_qs(parts.query).get("db", ["0"])[0]
            return _UNIX(path=unquote(parts.path), db=_database(database), **options)
        host, port = node or (parts.hostname or "localhost", parts.port or DEFAULT_PORT)
        options |= {"host": host, "port": port, "db": _database(parts.path.strip("/")), "socket_keepalive": True}
        options |= {"socket_keepalive_options": _KEEPALIVE}
        if not self._tls and parts.scheme != "rediss":
            return _TCP(**options)
        ca_file = None if address.ca_file is None else str(address.ca_file)
        return _TLS(
            ssl_cert_reqs="required", ssl_check_hostname=True, ssl_ca_certs=ca_file,
            ssl_min_version=ssl.TLSVersion.TLSv1_2, **options,
        )  # fmt: skip


def _database(text: str) -> int:
    if text and not text.isdigit():
        raise ValueError(f"it names database {text!r}, which is no number")
    return int(text or 0)


def _peer(address: ServiceAddress, node: Node | None) -> str:
    """What a server is called in messages."""
    if node is not None:
        return f"{node.host}:{node.port}"
    parts = address.parts
    return parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or DEFAULT_PORT}"


def _said(error: Exception, password: str | None) -> str:
    """What went wrong, as the server or the system says it, without the password."""
    text = str(error) or type(error).__name__
    return text.replace(password, "***") if password else text

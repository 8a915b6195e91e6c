"""The socket under a wire: in the clear, where the kernel keeps the time, or in TLS, where we do.

A plain socket blocks, with a timeout of the kernel's: one system call per receive. TLS may need several reads for one,
so its socket does not block and is polled. Either way a wait ends when the call's patience does.
"""

import select
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from kvpool.tiers.dragonfly.commands import Bytes
from kvpool.tiers.dragonfly.patience import Patience

_TIMEVAL = struct.Struct("@ll")
_NOW = int(socket.MSG_DONTWAIT)


class Stream(Protocol):
    """Bytes in and out. Errors are `OSError`, too long a wait is `TimeoutError`. `cut` is safe from any thread."""

    def send(self, parts: Sequence[Bytes]) -> int:
        """Write what goes without waiting; how many bytes went."""
        ...

    def receive(self, into: memoryview, patience: Patience) -> int:
        """Wait for bytes; how many came, 0 at the end."""
        ...

    def receive_unless_writable(self, into: memoryview, patience: Patience) -> int | None:
        """Wait for bytes, as `receive`, or until something can be written: then None."""
        ...

    def is_quiet(self) -> bool:
        """Whether nothing has come, an end neither."""
        ...

    def cut(self) -> None:
        """End it under whoever waits for it."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class PlainStream:
    """In the clear, over TCP or a unix socket."""

    def __init__(self, sock: socket.socket, close: Callable[[], None]) -> None:
        sock.settimeout(None)
        self.close = close
        self._socket = sock
        self._kernel_s = -1.0
        """The timeout that the kernel has; below 0: none yet, so it would wait for ever."""
        self._either = _polled(sock, select.POLLIN | select.POLLOUT)
        self._in = _polled(sock, select.POLLIN)

    def send(self, parts: Sequence[Bytes]) -> int:
        """As `Stream` says."""
        try:
            return self._socket.sendmsg(parts, (), _NOW)
        except BlockingIOError:
            return 0

    def receive(self, into: memoryview, patience: Patience) -> int:
        """As `Stream` says."""
        while True:
            left_s = patience.left_s
            if not 0.5 * left_s <= self._kernel_s <= 1.05 * left_s:
                self._limit(left_s)
            try:
                return self._socket.recv_into(into)
            except BlockingIOError:
                if not patience.left_s:
                    raise TimeoutError from None

    def receive_unless_writable(self, into: memoryview, patience: Patience) -> int | None:
        """As `Stream` says."""
        ready = _wait(self._either, patience)
        return self._socket.recv_into(into, 0, _NOW) if ready & ~select.POLLOUT else None

    def is_quiet(self) -> bool:
        """As `Stream` says."""
        return not self._in.poll(0)

    def cut(self) -> None:
        """As `Stream` says."""
        with suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _limit(self, seconds: float) -> None:
        """Have the kernel wait no longer than this; a zero would be for ever."""
        self._kernel_s = max(seconds, 0.001)
        whole_s = int(self._kernel_s)
        microseconds = int((self._kernel_s - whole_s) * 1e6)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(whole_s, microseconds))


class TlsStream:
    """In TLS."""

    def __init__(self, sock: ssl.SSLSocket, close: Callable[[], None]) -> None:
        sock.settimeout(0.0)
        self.close = close
        self._socket = sock
        self._either = _polled(sock, select.POLLIN | select.POLLOUT)
        self._in = _polled(sock, select.POLLIN)

    def send(self, parts: Sequence[Bytes]) -> int:
        """As `Stream` says."""
        try:
            return self._socket.send(parts[0])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0

    def receive(self, into: memoryview, patience: Patience) -> int:
        """As `Stream` says."""
        while True:
            try:
                return self._socket.recv_into(into)
            except ssl.SSLWantReadError:
                _wait(self._in, patience)

    def receive_unless_writable(self, into: memoryview, patience: Patience) -> int | None:
        """As `Stream` says."""
        while True:
            try:
                return self._socket.recv_into(into)
            except ssl.SSLWantReadError:
                if not _wait(self._either, patience) & ~select.POLLOUT:
                    return None

    def is_quiet(self) -> bool:
        """As `Stream` says. What came may be a session ticket, which is nothing."""
        try:
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            return False
        return False

    def cut(self) -> None:
        """As `Stream` says. `SSLSocket.shutdown` would have whoever reads get what is encrypted."""
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def stream_of(sock: socket.socket, close: Callable[[], None]) -> Stream:
    """The stream over a connected socket."""
    return TlsStream(sock, close) if isinstance(sock, ssl.SSLSocket) else PlainStream(sock, close)


def _polled(sock: socket.socket, events: int) -> select.poll:
    poll = select.poll()
    poll.register(sock, events)
    return poll


def _wait(poll: select.poll, patience: Patience) -> int:
    """Wait for the events of one socket; those that there are. Raises `TimeoutError`."""
    ready = poll.poll(1000 * patience.left_s)
    if not ready:
        raise TimeoutError
    return ready[0][1]

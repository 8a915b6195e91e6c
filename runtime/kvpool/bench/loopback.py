"""A probe for tiers across a socket: another process that sends and takes as many bytes over loopback TCP.

It runs this file by its path, for a package's modules are not wanted there.
"""

import socket
import subprocess
import sys
from typing import Self

from kvpool.bench.area import UnmeasurableError
from kvpool.bench.probes import touched

_SEND, _TAKE, _TAKEN = b"s", b"t", b"k"
_START_S = 60


class Loopback:
    """A process at the other end of a connection, with `nbytes` of memory like ours."""

    def __init__(self, nbytes: int) -> None:
        self._memory = memoryview(touched(nbytes))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(_START_S)
            command = [sys.executable, "-P", __file__, str(listener.getsockname()[1]), str(nbytes)]
            self._process = subprocess.Popen(command)  # noqa: S603
            try:
                self._peer, _ = listener.accept()
            except TimeoutError:
                self._process.kill()
                self._process.wait()
                raise UnmeasurableError("the probe's other process did not start") from None
        self._peer.settimeout(None)
        self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.close()
        self._process.wait()

    def receive(self) -> None:
        """All bytes, from there to here."""
        self._peer.sendall(_SEND)
        _receive(self._peer, self._memory)

    def send(self) -> None:
        """All bytes, from here to there; returns when they have arrived."""
        self._peer.sendall(_TAKE)
        self._peer.sendall(self._memory)
        if self._peer.recv(1) != _TAKEN:
            raise UnmeasurableError("the probe's other process ended")


def _receive(peer: socket.socket, into: memoryview) -> None:
    came = 0
    while came < len(into):
        more = peer.recv_into(into[came:])
        if not more:
            raise UnmeasurableError("the probe's other process ended")
        came += more


def _serve(port: int, nbytes: int) -> None:
    memory = memoryview(touched(nbytes))
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while asked := peer.recv(1):
            if asked == _SEND:
                peer.sendall(memory)
            else:
                _receive(peer, memory)
                peer.sendall(_TAKEN)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))

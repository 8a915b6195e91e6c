"""The probe beside a tier that a server has: the same bytes from another process over loopback TCP.

That process connects to the port that it is told, and sends as many bytes as it is asked for, in 8 bytes, big-endian.
"""

import socket
import subprocess
import sys
from typing import Self

from kvpool.bench.area import UnmeasurableError
from kvpool.bench.probes import touched

TIMEOUT_S = 20.0
_COUNT_BYTES = 8
_CODE = "import sys; from kvpool.bench.waterfall.loopback import send; send(int(sys.argv[1]), int(sys.argv[2]))"


class Loopback:
    """The receiving side, and the owner of the other process."""

    def __init__(self, most_bytes: int) -> None:
        self._into = memoryview(touched(most_bytes))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(TIMEOUT_S)
            port = str(listening.getsockname()[1])
            self._process = subprocess.Popen([sys.executable, "-c", _CODE, port, str(most_bytes)])  # noqa: S603 - our own
            try:
                self._connection, _ = listening.accept()
            except BaseException:
                self._end()
                raise
        self._connection.settimeout(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._end()

    def receive(self, nbytes: int) -> None:
        """Ask for so many bytes, and return when they are here."""
        self._connection.sendall(nbytes.to_bytes(_COUNT_BYTES, "big"))
        left = self._into[:nbytes]
        while left:
            received = self._connection.recv_into(left)
            if not received:
                raise UnmeasurableError("the other process of the loopback probe ended")
            left = left[received:]

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


def send(port: int, most_bytes: int) -> None:
    """The other process, until the connection is closed."""
    data = memoryview(touched(most_bytes))
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.settimeout(None)
        with connection.makefile("rb") as asked:
            while count := asked.read(_COUNT_BYTES):
                connection.sendall(data[: int.from_bytes(count, "big")])

"""TLS in front of a PostgreSQL server that has none: what ends it on a loopback address passes the rest on.

The servers that tests start are built without TLS. Clients see what they would see of one that has it: the request for
TLS in PostgreSQL's protocol, then the handshake.
"""

from __future__ import annotations

import select
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.catalog.connecting import DEADLINE_S, address_of

_TLS_REQUEST = struct.pack(">ii", 8, 80877103)
_PIECE = 1 << 16


class TlsFront:
    """Listens on `host`:`port`; `ca.crt` in its directory has signed its certificate, `other-ca.crt` has not."""

    def __init__(self, folder: Path, directory: Path) -> None:
        self.directory = directory
        self._folder = folder
        self._server_socket = address_of(folder).url.partition("host=")[2] + "/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        _make_certificates(directory, self.host)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "server.crt", directory / "server.key")
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()

    def service_folder(self, ca: str = "ca.crt", url: str | None = None) -> Path:
        """A service folder for it, with this authority."""
        folder = self.directory / f"service-{len(list(self.directory.iterdir()))}"
        shutil.copytree(self._folder, folder)
        (folder / "url").write_text(url or f"postgresql://{self.host}:{self.port}/kvpool")
        shutil.copy(self.directory / ca, folder / "ca.crt")
        return folder

    def run(self) -> None:
        """Take connections until `end`."""
        self._listener.settimeout(0.05)
        while not self._ended.is_set():
            with suppress(TimeoutError):
                client, _ = self._listener.accept()
                client.settimeout(DEADLINE_S)
                thread = threading.Thread(target=self._serve, args=(client,))
                thread.start()
                self._threads.append(thread)

    def end(self) -> None:
        self._ended.set()

    def close(self) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            server.connect(self._server_socket)
            first = client.recv(8, socket.MSG_PEEK | socket.MSG_WAITALL)
            if first != _TLS_REQUEST:
                self._relay(client, server)
                return
            client.recv(8)
            client.sendall(b"S")
            with self._context.wrap_socket(client, server_side=True) as encrypted:
                self._relay(encrypted, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([client, server], [], [], 0.05)
            for source, target in ((client, server), (server, client)):
                while source in ready or (isinstance(source, ssl.SSLSocket) and source.pending()):
                    piece = source.recv(_PIECE)
                    if not piece:
                        return
                    target.sendall(piece)
                    ready = [other for other in ready if other is not source]


@contextmanager
def tls_front(folder: Path, directory: Path) -> Iterator[TlsFront]:
    """A front of the server of `folder`, with its files in `directory`."""
    front = TlsFront(folder, directory)
    thread = threading.Thread(target=front.run)
    thread.start()
    try:
        yield front
    finally:
        front.end()
        thread.join(DEADLINE_S)
        front.close()


def _make_certificates(directory: Path, host: str) -> None:
    """`ca.crt`, `other-ca.crt`, and `server.crt` with its key, signed by the first for this address."""
    (directory / "extensions").write_text(f"subjectAltName=IP:{host}\n")
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for authority in ("ca", "other-ca"):
        _openssl(
            directory, f"req -x509 {new_key} -days 2 -subj /CN={authority} -keyout {authority}.key -out {authority}.crt"
        )
    _openssl(directory, f"req {new_key} -subj /CN=kvpool -keyout server.key -out server.csr")
    sign = "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extensions"
    _openssl(directory, f"{sign} -out server.crt")


def _openssl(directory: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=directory, check=True, capture_output=True)  # noqa: S607

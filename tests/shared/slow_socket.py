"""Stands between PostgreSQL's clients and its server, and holds up what they say for as long as it is told."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvpool.config.service import read_service

SOCKET_NAME = ".s.PGSQL.5432"


class SlowSocket:
    """A socket in a directory of its own; `folder` is the service behind it. `delay_s` counts for each statement."""

    def __init__(self, service: Path, folder: Path) -> None:
        self.folder = folder
        self.delay_s = 0.0
        url = read_service(service, schemes=("postgresql",)).url
        before, _, directory = url.partition("?host=")
        self._target = f"{directory}/{SOCKET_NAME}"
        self._directory = Path(tempfile.mkdtemp(prefix="kvpool-slow-"))  # a socket's path must not be long
        shutil.copytree(service, folder)
        (folder / "url").write_text(f"{before}?host={self._directory}")
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / SOCKET_NAME))
        self._listener.listen(64)
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        _end(self._listener)
        while self._threads:
            with self._lock:
                for each in self._sockets:
                    _end(each)
            self._threads.pop().join()
        for each in (self._listener, *self._sockets):
            each.close()
        shutil.rmtree(self._directory)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                with self._lock:
                    self._sockets += [near, far]
                try:
                    far.connect(self._target)
                except OSError:
                    _end(near)
                    continue
                self._start(self._pass, near, far, True)
                self._start(self._pass, far, near, False)

    def _pass(self, source: socket.socket, target: socket.socket, is_slow: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if is_slow and self.delay_s and self._closed.wait(self.delay_s):
                    break
                target.sendall(data)
        _end(source)
        _end(target)


def _end(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)

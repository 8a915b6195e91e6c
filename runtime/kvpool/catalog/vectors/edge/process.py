"""The parent's side of the process that has the collection open: starts it, asks it, stops it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from kvpool.catalog.vectors.contract import VectorsMismatchError, VectorsUnavailableError
from kvpool.catalog.vectors.edge.frames import BrokenChannelError, Channel, Frame
from kvpool.errors import DirectoryInUseError

_MOST_UNANSWERED = 8
"""So many questions on which we gave up may wait for a process that stands still."""
_KILLED_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a process is started with."""

    directory: Path
    max_points: int
    index_after: int


class EdgeProcess:
    """A process that runs, or ran. Safe from any thread: searches and updates do not wait for each other."""

    def __init__(self, service: Service) -> None:
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        fds = [str(sock.fileno()) for sock in theirs]
        numbers = [str(service.max_points), str(service.index_after)]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "kvpool.catalog.vectors.edge", "serve", str(service.directory), *numbers, *fds],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[sock.fileno() for sock in theirs],
                start_new_session=True,  # Ctrl-C is for us: we then stop it
            )
        except OSError as error:
            for sock in ours:
                sock.close()
            raise VectorsUnavailableError(f"its process cannot be started: {error}") from None
        finally:
            for sock in theirs:
                sock.close()
        self.searches, self.updates = (_Line(Channel(sock)) for sock in ours)
        self.unreadable = ""
        """Why the points that were there could not be opened; it began without them."""
        self._is_open = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it ended, or cannot be talked to any more."""
        return self.searches.is_broken or self.updates.is_broken or self._process.poll() is not None

    @property
    def result(self) -> int | None:
        """The exit code that it ended with, minus the signal's number where one ended it; None while it runs."""
        return self._process.poll()

    def wait_until_open(self, deadline: float) -> None:
        """Wait until the points are open; again and again, if need be.

        Raises `DirectoryInUseError`, `VectorsMismatchError`, or `VectorsUnavailableError`.
        """
        if self._is_open:
            return
        said = self.searches.hear_first(deadline)
        match said:
            case {"busy": reason}:
                raise DirectoryInUseError(f"{reason}; stop it, or use another directory")
            case {"mismatch": reason}:
                raise VectorsMismatchError(reason)
            case {"error": reason}:
                raise VectorsUnavailableError(f"its points cannot be opened: {reason}")
        self.unreadable = said["unreadable"]
        self._is_open = True

    def stop(self, patience_s: float) -> None:
        """Have it close its files and end; kill it where it does not in this time."""
        deadline = time.monotonic() + patience_s
        with suppress(VectorsUnavailableError):  # it is killed then
            if self._is_open:
                self.searches.ask({"ask": "close"}, b"", deadline)
        self.searches.close()
        self.updates.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End it at once. What it answered is in its log."""
        self.searches.close()
        self.updates.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # in a system call that never returns
            self._process.wait(_KILLED_S)


class _Line:
    """Questions and answers on one channel, one at a time. An answer that came too late is passed over."""

    def __init__(self, channel: Channel) -> None:
        self.is_broken = False
        self._channel = channel
        self._lock = Lock()
        self._first: Mapping[str, Any] | None = None
        self._asked = 0
        self._answered = 0

    def ask(self, said: Mapping[str, Any], vectors: bytes, deadline: float) -> Mapping[str, Any]:
        """The answer. Raises `VectorsUnavailableError` at the deadline, when it ended, and for an error it tells."""
        with self._turn(deadline):
            return self._ask(said, vectors, deadline)

    def hear_first(self, deadline: float) -> Mapping[str, Any]:
        """What it says when it has opened the points, or cannot; the same to all who ask."""
        with self._turn(deadline):
            if self._first is None:
                self._first = self._channel.receive(deadline).said
            return self._first

    def close(self) -> None:
        """Close our end. A question that waits on it fails."""
        self.is_broken = True
        self._channel.close()

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise VectorsUnavailableError("its process is busy with another question")
        try:
            yield
        except TimeoutError:
            raise VectorsUnavailableError("its process gave no answer in time") from None
        except BrokenChannelError as error:
            self.is_broken = True
            raise VectorsUnavailableError(f"its process is gone: {error}") from None
        finally:
            self._lock.release()

    def _ask(self, said: Mapping[str, Any], vectors: bytes, deadline: float) -> Mapping[str, Any]:
        if self._asked - self._answered >= _MOST_UNANSWERED:
            self._hear(deadline)
        self._asked += 1
        self._channel.send(Frame(self._asked, said, vectors), deadline)
        while self._answered < self._asked:
            answer = self._hear(deadline)
        if "error" in answer:
            raise VectorsUnavailableError(answer["error"])
        return answer

    def _hear(self, deadline: float) -> Mapping[str, Any]:
        frame = self._channel.receive(deadline)
        self._answered = frame.number
        return frame.said

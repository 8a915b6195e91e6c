"""A server on this machine that lives as long as its pool: the same for all, which differ in their `Recipe`."""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from kvpool.local.errors import LocalServerError
from kvpool.local.guard import Job
from kvpool.local.guarded import KILLED, Guarded
from kvpool.local.lock import lock_directory
from kvpool.local.log_file import last_lines, put_by
from kvpool.local.place import Place, make_private
from kvpool.local.programs import Program
from kvpool.local.sockets import is_temporary, remove_sockets, socket_directory
from kvpool.local.unprivileged import needs_another_user

START_S = 60.0
"""How long a start may take: PostgreSQL makes its first files, Redis reads its values."""
_FIRST_POLL_S, _LAST_POLL_S = 0.005, 0.1
_log = logging.getLogger(__name__)


class Command(NamedTuple):
    """A program of a server, with its arguments."""

    words: list[str]
    not_as_root: Path | None = None
    """The directory that is to be its own, for a program that refuses to be root."""


class Recipe(Protocol):
    """What is particular to a product. Called by one thread at a time, while the directory is locked."""

    program: Program
    socket_name: str
    """The name of its socket's file."""
    username: str
    stop_signal: signal.Signals
    """What makes it stop in order, and save what is to be saved."""
    grace_s: float
    """How long that may take when nobody is there to say how long."""

    def url(self, place: Place) -> str:
        """Where it will be reached, as in the file `url` of a service folder."""
        ...

    def prepare(self, place: Place) -> Command | None:
        """Write its settings and remove what a crash left; the command that makes its first files, if it has none."""
        ...

    def prepared(self, place: Place) -> None:
        """The command that `prepare` gave has ended well."""
        ...

    def command(self, place: Place) -> Command:
        """How it is run, in the foreground."""
        ...

    def answers(self, place: Place, timeout_s: float) -> bool:
        """Whether it is ready for everybody who has the service folder. Raises `LocalServerError` if it never will."""
        ...

    def set_data_aside(self, place: Place) -> bool:
        """It ended at its start: whether it may be the data's fault, and it can do without them; they are set aside."""
        ...

    def settle_data(self, place: Place, *, wanted: bool) -> None:
        """Bring back what was set aside, or, where it is not `wanted`, remove it."""
        ...


class LocalServer:
    """A server in a directory of its own. Safe from any thread; stopped at the latest when this process ends.

    `folder` is where it is described, as any external service (`kvpool.config.service`); it is written by `start`.
    """

    def __init__(self, name: str, home: Path, recipe: Recipe) -> None:
        self.name = name
        self._home = home.absolute()
        self._recipe = recipe
        self._lock = threading.RLock()
        self._running: Guarded | None = None
        self._sockets: Path | None = None

    @property
    def version(self) -> str:
        """The program and its version, as `redis 8.2.3`."""
        return f"{self._recipe.program.product} {self._recipe.program.version}"

    @property
    def folder(self) -> Path:
        """The service folder."""
        return self._home / "service"

    @property
    def pid(self) -> int | None:
        """The server's process, while it is alive."""
        running = self._running
        return running.pid if running is not None and not running.ended else None

    @property
    def alive(self) -> bool:
        """Whether the server's process runs; it may be stuck all the same."""
        return self.pid is not None

    def start(self, deadline_s: float = START_S) -> None:
        """Start the server and return once it answers; at once if it is alive.

        Waits for an earlier server in the directory that is still stopping. Raises `LocalServerError` that says what
        is wrong; then nothing runs.
        """
        with self._lock:
            if self.alive:
                return
            end = time.monotonic() + deadline_s
            try:
                self._start(end)
            except OSError as error:
                raise LocalServerError(f"the server {self.name} cannot be started in {self._home}: {error}") from error

    def stop(self, deadline_s: float | None = None) -> None:
        """Have the server save what it keeps, and end; killed after `deadline_s`. Safe to call again.

        Without a deadline it gets the time that saving takes on a slow disk. Raises `LocalServerError` where even
        SIGKILL did not end it.
        """
        with self._lock:
            self._end(self._recipe.grace_s if deadline_s is None else deadline_s)
            self._remove_sockets()

    def restart(self, deadline_s: float = START_S) -> None:
        """Stop the server, if it is alive, and start it again at the same address with the data that it has."""
        with self._lock:
            end = time.monotonic() + deadline_s
            self._end(deadline_s / 2)
            self.start(max(0.0, end - time.monotonic()))

    def _end(self, grace_s: float) -> None:
        running = self._running
        if running is not None:
            if not running.stop(grace_s):
                _log.warning("%s in %s was killed: what it had not saved is lost", self.version, self._home)
            self._running = None

    def _remove_sockets(self) -> None:
        sockets, self._sockets = self._sockets, None
        if sockets is None or not is_temporary(sockets):
            return
        with suppress(LocalServerError):  # somebody has started a server there since: now it is theirs
            lock = lock_directory(self._home, time.monotonic())
            try:
                remove_sockets(self._home, sockets)
            finally:
                os.close(lock)

    def _start(self, end: float) -> None:
        self._end(0.0)  # it ended by itself
        make_private(self._home)
        lock = lock_directory(self._home, end)
        try:
            place = Place(self._home, socket_directory(self._home, self._recipe.socket_name))
            self._sockets = place.sockets
            put_by(place.log)
            place.introduce(self._recipe.url(place), self._recipe.username)
            self._make_first_files(place, lock, end)
            self._run_with_or_without_data(place, lock, end)
        finally:
            os.close(lock)  # guard and server have it now
            if self._running is None:
                self._remove_sockets()

    def _make_first_files(self, place: Place, lock: int, end: float) -> None:
        command = self._recipe.prepare(place)
        if command is None:
            return
        making = self._guarded(command, place, lock)
        try:
            status = making.wait(end)
        finally:
            making.stop(0.0)
        if status != 0:
            why = "took too long" if status is None else f"ended with status {status}"
            raise LocalServerError(self._failed(place, f"{Path(command.words[0]).name} {why}"))
        self._recipe.prepared(place)

    def _run_with_or_without_data(self, place: Place, lock: int, end: float) -> None:
        try:
            self._run(place, lock, end)
        except _EndedAtStartError as ended:
            if ended.was_killed or not self._recipe.set_data_aside(place):
                raise
            try:
                self._run(place, lock, end)
            except LocalServerError:
                raise ended from None
            finally:
                self._recipe.settle_data(place, wanted=self._running is None)
            _log.warning("%s could not read the data in %s and begins without", self.version, place.data)

    def _run(self, place: Place, lock: int, end: float) -> None:
        running = self._guarded(self._recipe.command(place), place, lock)
        try:
            self._wait_until_it_answers(running, place, end)
        except BaseException:
            running.stop(0.0)
            raise
        self._running = running

    def _wait_until_it_answers(self, running: Guarded, place: Place, end: float) -> None:
        pause_s = _FIRST_POLL_S
        while True:
            left_s = end - time.monotonic()
            if running.ended:
                was_killed = running.wait(end) == KILLED
                raise _EndedAtStartError(self._failed(place, "it ended at its start"), was_killed=was_killed)
            if left_s <= 0:
                raise LocalServerError(self._failed(place, "it did not answer in time"))
            if self._recipe.answers(place, left_s):
                return
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LAST_POLL_S)

    def _guarded(self, command: Command, place: Place, lock: int) -> Guarded:
        own = command.not_as_root if needs_another_user() else None
        job = Job(
            command=command.words,
            log=str(place.log),
            stop_signal=self._recipe.stop_signal,
            grace_s=self._recipe.grace_s,
            lock=lock,
            parent=os.getpid(),
            unprivileged=str(own or ""),
            sockets=str(place.sockets) if is_temporary(place.sockets) else "",
        )
        return Guarded.run(job, place.home)

    def _failed(self, place: Place, why: str) -> str:
        last = last_lines(place.log)
        return f"the server {self.name} ({self.version}) did not start: {why}; its log {place.log} ends:\n{last}"


class _EndedAtStartError(LocalServerError):
    """The program ended before it answered."""

    def __init__(self, message: str, *, was_killed: bool) -> None:
        super().__init__(message)
        self.was_killed = was_killed

"""The process between a pool and its server: it starts the server, and stops it when the pool ends, however that ends.

    pool --pipe--> guard --child--> server

It is told what to run in one line of JSON (`Job`) on its standard input, and answers with one line on its standard
output, the server's process id. Then a line `stop SECONDS` means: stop the server within so many seconds; the end of
the input, or of the process that wrote it: the pool is gone, stop. To stop is to send the server its own signal for it,
and SIGKILL to what is left when the time is over. It ends when the server and all that the server started have ended,
with the server's exit status (128 and the signal's number, where a signal ended it).

It lives in a session of its own, so that a Ctrl-C in the terminal reaches neither it nor the server. When it is killed
itself, the kernel sends the server its signal to stop. The server's output goes to a log of bounded length. It imports
little, and nothing from outside the standard library and this package: a pool waits for its start.
"""

import json
import os
import resource
import selectors
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from kvpool.local import kernel
from kvpool.local.log_file import LogFile
from kvpool.local.unprivileged import become_unprivileged

LEFTOVERS_S = 1.0
"""How long processes may outlive the server that started them."""
_READ_BYTES = 64 << 10
_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ)


class Job(NamedTuple):
    """What to run, and how to end it."""

    command: list[str]
    log: str
    """The file for what it prints."""
    stop_signal: int
    grace_s: float
    """How long it may take to stop when the pool is gone."""
    lock: int
    """The descriptor of the lock on the server's directory: the server has it too, so that the lock outlives us."""
    parent: int
    """The process to watch."""
    unprivileged: str = ""
    """The directory that is to be the server's own, where it must not run as root."""
    sockets: str = ""
    """A directory to remove once the server has stopped because the pool is gone."""


def main() -> int:
    """Run the job on standard input to its end; the exit status is the server's."""
    job = Job(**json.loads(_line(0)))
    return _Guard(job).run()


class _Guard:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._log = LogFile(Path(job.log))
        self._told = b""
        self._server = 0
        self._status: int | None = None
        self._kill_at: float | None = None
        self._pool_is_gone = False

    def run(self) -> int:
        os.umask(0o077)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts, and nobody would bound it
        kernel.adopt_orphans()
        wake, wake_end = os.pipe()
        output, output_end = os.pipe()
        for end in (wake, wake_end, output):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in _OURS:
            signal.signal(number, _noted)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._server = self._spawn(output_end)
        os.close(output_end)
        self._note_processes()
        with suppress(BrokenPipeError):  # the pool is gone already: seen below
            os.write(1, b"%d\n" % self._server)
        os.dup2(2, 1)
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ, self._hear)
            selector.register(wake, selectors.EVENT_READ, self._wake)
            selector.register(output, selectors.EVENT_READ, self._copy_output)
            parent = self._watch_parent()
            if parent is not None:
                selector.register(parent, selectors.EVENT_READ, self._parent_ended)
            while self._reap():
                for key, _ in selector.select(self._kill_if_late()):
                    if not key.data(key.fd):
                        selector.unregister(key.fd)
        with suppress(BlockingIOError):  # somebody may hold the other end still
            while self._copy_output(output):
                pass  # what it said last
        if self._pool_is_gone and self._job.sockets:
            _remove(Path(self._job.sockets))
        return self._exit_status()

    def _spawn(self, output: int) -> int:
        guard = os.getpid()
        child = os.fork()
        if child == 0:
            self._become_server(guard, output)
        return child

    def _become_server(self, guard: int, output: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            for number in _OURS:
                signal.signal(number, signal.SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if self._job.unprivileged:
                become_unprivileged(Path(self._job.unprivileged))
            os.set_inheritable(self._job.lock, True)
            kernel.die_with_parent(self._job.stop_signal)  # after the change of user, which would undo it
            if os.getppid() == guard:
                os.execv(self._job.command[0], self._job.command)  # noqa: S606 - no shell is what we want
        except BaseException as error:
            os.write(2, f"{self._job.command[0]} cannot be started: {error}\n".encode())
        finally:
            os._exit(127)

    def _note_processes(self) -> None:
        """Write into the lock who holds it, for the error message of the next one who wants it."""
        text = f"process {self._server} (under {os.getpid()}, for {self._job.parent})"
        with suppress(OSError):  # a full disk: the message will be poorer
            os.pwrite(self._job.lock, text.encode().ljust(128), 0)

    def _watch_parent(self) -> int | None:
        """A descriptor that tells of the parent's end; our input would not while a fork of it holds the pipe."""
        try:
            parent = kernel.open_process(self._job.parent)
        except ProcessLookupError:
            self._parent_ended(-1)
            return None
        except OSError:  # the kernel is too old: the pipe must do
            return None
        if os.getppid() != self._job.parent:  # it ended before, and somebody else has its number
            self._parent_ended(-1)
        return parent

    # --- what may happen: each handler returns whether to go on listening ---------------------------------------------

    def _hear(self, fd: int) -> bool:
        data = os.read(fd, _READ_BYTES)
        self._told += data
        if self._told.startswith(b"stop ") and self._told.endswith(b"\n"):
            self._stop(float(self._told.removeprefix(b"stop ")))
            return False
        return bool(data) or self._parent_ended(fd)

    def _parent_ended(self, _: int) -> bool:
        if self._kill_at is None:
            self._pool_is_gone = True
            self._stop(self._job.grace_s)
        return False

    def _wake(self, fd: int) -> bool:
        if signal.SIGTERM in os.read(fd, _READ_BYTES):
            self._stop(self._job.grace_s)
        return True  # a child ended: reaped by the loop

    def _copy_output(self, fd: int) -> bool:
        data = os.read(fd, _READ_BYTES)
        self._log.write(data)
        return bool(data)

    # --- ending ------------------------------------------------------------------------------------------------------

    def _stop(self, grace_s: float) -> None:
        if self._status is None:
            self._signal(self._server, self._job.stop_signal)
            self._signal(self._server, signal.SIGCONT)  # a stopped process would not hear
        self._kill_by(grace_s)

    def _kill_by(self, grace_s: float) -> None:
        end = time.monotonic() + grace_s
        self._kill_at = end if self._kill_at is None else min(end, self._kill_at)

    def _kill_if_late(self) -> float | None:
        """SIGKILL to all that is left, if it is time; for how long there is nothing to do otherwise."""
        if self._kill_at is None:
            return None
        left_s = self._kill_at - time.monotonic()
        if left_s > 0:
            return left_s
        for child in self._children():
            self._signal(child, signal.SIGKILL)
        return 0.1  # new ones may come to us, of parents that have just ended

    def _children(self) -> list[int]:
        """The processes that are ours to end."""
        try:
            return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        except OSError:  # the kernel does not tell: the one that we know
            return [self._server] if self._status is None else []

    def _signal(self, process: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, number)

    def _reap(self) -> bool:
        """Take the exit status of whoever ended; whether anybody is left."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if process == 0:
                return True
            if process == self._server:
                self._status = os.waitstatus_to_exitcode(status)
                self._kill_by(LEFTOVERS_S)

    def _exit_status(self) -> int:
        status = self._status or 0
        return status if status >= 0 else 128 - status


def _noted(number: int, frame: object) -> None:
    """Do nothing: the wake-up pipe says that a signal came."""


def _remove(directory: Path) -> None:
    with suppress(OSError):  # it is a directory for temporary things: somebody may have been faster
        for entry in directory.iterdir():
            entry.unlink()
        directory.rmdir()


def _line(fd: int) -> bytes:
    """The first line of a pipe, and nothing beyond it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            sys.exit(0)  # the pool ended before it said what to do
        line += byte
    return line

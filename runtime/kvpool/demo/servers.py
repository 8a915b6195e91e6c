"""The servers that a pool runs: noted while they run, stopped in the middle, and looked for when the demo is over."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from kvpool.errors import KvpoolError
from kvpool.pool.pool import Pool
from kvpool.pool.remote.servers import RunningServer
from kvpool.resilience import Degradation

BACK_S = 180.0
"""How long a server may take until it is in use again: much longer than the seconds that it is on an idle machine."""
PROCESSES = "processes.jsonl"
"""The file that names every server's process that was seen."""
GONE_S = 90.0
"""How long a server may outlive its pool: where that was killed, as long as it takes to save what it holds."""
_POLL_S = 0.05
_IN_STAT_STATE, _IN_STAT_PARENT, _IN_STAT_STARTED = 0, 1, 19
"""Fields of /proc/PID/stat, counted from the one behind the name, which may have blanks in it."""
DEGRADATIONS = {
    "dragonfly": Degradation.NO_DRAGONFLY,
    "postgres": Degradation.NO_POSTGRES,
    "qdrant": Degradation.NO_QDRANT,
}
"""What a pool calls it when the server of this name does not answer."""


class NotBackError(KvpoolError):
    """A server that was stopped goes on, or should have been started again, and the pool does not use it."""


class How(StrEnum):
    """What happens to a server."""

    STOPPED = "stopped"
    """All its processes are halted (SIGSTOP) and go on later: it keeps connections and gives no answers."""
    KILLED = "killed"
    """It ends at once (SIGKILL); the pool has to start it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A server's first process. `started` tells it from a later one with the same number."""

    name: str
    version: str
    pid: int
    started: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutageReport:
    """One server that was stopped in the middle."""

    server: str
    version: str
    how: How
    chat: str
    """During which turn: as `acme 2.1`."""
    back_s: float
    """From when it went on, or was killed, until the pool had it in use."""


class Servers:
    """The servers of one pool. Each that is seen is written to `file`, a line of JSON, for who looks for it later."""

    def __init__(self, pool: Pool, file: Path) -> None:
        self._pool = pool
        self._file = file
        self._seen: list[Process] = []
        self.outages: list[OutageReport] = []

    def note(self) -> list[RunningServer]:
        """Those that run now; new ones are noted."""
        running = self._pool.local_servers()
        for server in running:
            started = _started(server.pid)
            process = Process(name=server.name, version=server.version, pid=server.pid, started=started or "")
            if started is not None and process not in self._seen:
                self._seen.append(process)
                with self._file.open("a") as file:
                    file.write(f"{json.dumps(asdict(process))}\n")
        return running

    def wait_until_all_answer(self, deadline_s: float = BACK_S) -> None:
        """Wait until no tier is out, but for one of a GPU that is not there. Raises `NotBackError`."""
        end = time.monotonic() + deadline_s
        while out := self._pool.degradations() - {Degradation.NO_GPU}:
            if time.monotonic() >= end:
                raise NotBackError(f"{self._pool.stats().mode} for {deadline_s:.0f} s: {self._last_errors() or out}")
            time.sleep(_POLL_S)
        self.note()

    def running(self, name: str) -> RunningServer | None:
        """The server of this name, if it runs."""
        return next((server for server in self.note() if server.name == name), None)

    @contextmanager
    def out(self, server: RunningServer, how: How, chat: str) -> Iterator[None]:
        """Have a server stopped, or killed, for the time of the context, and wait until it is in use again.

        Whatever happens meanwhile, also Ctrl-C, it goes on afterwards. Raises `NotBackError`.
        """
        if how is How.STOPPED:
            with _halted(server.pid):
                yield
        with _Watch(lambda: self._is_used(server, how)) as watch:
            if how is How.KILLED:
                _signal(server.pid, signal.SIGKILL)
                yield
            back_s = watch.wait(BACK_S)
        if back_s is None:
            reason = f"{server.name} was {how.value}, and is not in use {BACK_S:.0f} s later: {self._last_errors()}"
            raise NotBackError(reason)
        outage = OutageReport(server=server.name, version=server.version, how=how, chat=chat, back_s=back_s)
        self.outages.append(outage)

    def _is_used(self, server: RunningServer, how: How) -> bool:
        now = self.running(server.name)
        is_there = now is not None and (how is How.STOPPED or now.pid != server.pid)
        return is_there and DEGRADATIONS[server.name] not in self._pool.degradations()

    def _last_errors(self) -> str:
        tiers = self._pool.stats().tiers
        return "; ".join(f"{name}: {tier.last_error}" for name, tier in tiers.items() if tier.last_error)


class _Watch:
    """Waits, on a thread of its own, until something is so; for the time of a context."""

    def __init__(self, is_so: Callable[[], bool]) -> None:
        self._is_so = is_so
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        self._thread.join()

    def wait(self, deadline_s: float) -> float | None:
        """How long it took from the start; None where it is not so at the deadline, which begins now."""
        self._thread.join(deadline_s)
        return self._seconds

    def _run(self) -> None:
        while not self._is_so():
            if self._given_up.wait(_POLL_S):
                return
        self._seconds = time.monotonic() - self._began


def read_processes(file: Path) -> list[Process]:
    """What `Servers` has written; none where nothing was."""
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [Process(**json.loads(line)) for line in lines]


def left_running(processes: Sequence[Process], deadline_s: float = GONE_S) -> list[Process]:
    """Those that still run at the deadline; returns as soon as none does."""
    end = time.monotonic() + deadline_s
    while left := [process for process in processes if _started(process.pid) == process.started]:
        if time.monotonic() >= end:
            return left
        time.sleep(_POLL_S)
    return []


@contextmanager
def _halted(pid: int) -> Iterator[None]:
    """A process and all that it has started stand still for the time of the context."""
    halted: list[int] = []
    try:
        waiting = [pid]
        while waiting:
            for process in waiting:
                halted.append(process)
                _signal(process, signal.SIGSTOP)
            waiting = [process for process in _descendants(pid) if process not in halted]  # started until just now
        yield
    finally:
        for process in reversed(halted):  # children first, so that their parent finds them awake
            _signal(process, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[_IN_STAT_PARENT]), []).append(int(entry.name))
    found = list(children.get(pid, ()))
    for child in found:  # grows meanwhile
        found += children.get(child, ())
    return found


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None where it does not run."""
    stat = _stat(pid)
    return None if not stat or stat[_IN_STAT_STATE] == "Z" else stat[_IN_STAT_STARTED]


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()

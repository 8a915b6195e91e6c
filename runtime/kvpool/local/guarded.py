"""A program under guard (`guard`), as seen from the pool."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvpool.local import guard, kernel
from kvpool.local.errors import LocalServerError
from kvpool.local.log_file import last_lines, open_log

_ROOT = Path(__file__).parents[2]
_CODE = "import sys; sys.path.append(sys.argv[1]); from kvpool.local.guard import main; sys.exit(main())"
"""With -I and -S: nothing of the user's environment or of other packages takes part, or takes time."""
_KEPT_OF_THE_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
_START_S = 20.0
KILLED = 128 + signal.SIGKILL
"""The status of a program that SIGKILL ended."""
_MARGIN_S = 2 * guard.LEFTOVERS_S + 3.0
"""How long the guard may take beyond what it allows the program."""


class Guarded:
    """One run of a program. `ended` may be read by any thread; the rest is for one at a time."""

    def __init__(self, process: subprocess.Popen[bytes], job: guard.Job) -> None:
        self._process = process
        self._job = job
        self._handle: int | None = None
        self.pid = 0

    @classmethod
    def run(cls, job: guard.Job, directory: Path) -> Self:
        """Start the program in `directory`; it has been started when this returns. Raises `LocalServerError`."""
        with open_log(Path(job.log)) as log:
            process = subprocess.Popen(  # noqa: S603 - our own guard
                [sys.executable, "-I", "-S", "-c", _CODE, _ROOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=directory,
                env=_environment(),
                pass_fds=(job.lock,),
                start_new_session=True,
            )
        self = cls(process, job)
        try:
            self._tell(json.dumps(job._asdict()))
            self.pid = self._told_pid()
            with suppress(OSError):  # it may have ended already; and old kernels cannot
                self._handle = kernel.open_process(self.pid)
        except BaseException:
            process.kill()  # the program, if it runs by now, goes with it
            process.wait()
            self._give_back()
            raise
        return self

    @property
    def ended(self) -> bool:
        """Whether the program has ended, and all that it started; or nobody guards it any more."""
        return self._process.poll() is not None

    def wait(self, end: float) -> int | None:
        """The program's exit status; None where it still runs at `end` (monotonic)."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(0.0, end - time.monotonic()))
        return None

    def stop(self, grace_s: float) -> bool:
        """Ask the program to stop, kill it when it has not after `grace_s`, and give back pipes and process.

        Returns whether it ended without being killed. Raises `LocalServerError` where even that did not end it. Safe
        to call again.
        """
        end = time.monotonic() + grace_s
        self._tell(f"stop {grace_s}")
        status = self.wait(end + _MARGIN_S)
        if status is None or (status < 0 and not self._end_unguarded(end)):
            raise LocalServerError(f"{self._job.command[0]}, process {self.pid}, does not end, not even by SIGKILL")
        self._give_back()
        return status != KILLED

    def _end_unguarded(self, end: float) -> bool:
        """Somebody killed the guard; the kernel has told the program to stop. Whether it did, or does when killed."""
        if self._handle is None:
            return True
        with suppress(ProcessLookupError):
            kernel.signal_process(self._handle, signal.SIGCONT)  # a stopped process would not hear
            if _has_ended(self._handle, end):
                return True
            kernel.signal_process(self._handle, signal.SIGKILL)
            return _has_ended(self._handle, end + _MARGIN_S)
        return True

    def _tell(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        if not pipe.closed:
            with suppress(BrokenPipeError):
                pipe.write(f"{line}\n".encode())
                pipe.flush()

    def _told_pid(self) -> int:
        """What the guard says first."""
        pipe = self._process.stdout
        assert pipe is not None
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        line = pipe.readline() if poll.poll(1000 * _START_S) else b""
        if not line.endswith(b"\n"):
            last = last_lines(Path(self._job.log))
            raise LocalServerError(f"the guard of {self._job.command[0]} did not start; {self._job.log} ends:\n{last}")
        return int(line)

    def _give_back(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def _has_ended(handle: int, end: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(max(0.0, 1000 * (end - time.monotonic()))))


def _environment() -> dict[str, str]:
    """Little: settings of the user's, as PGPORT or PYTHONPATH, do not concern the program."""
    kept = {name: os.environ[name] for name in _KEPT_OF_THE_ENVIRONMENT if name in os.environ}
    return {**kept, "LC_ALL": "C"}

"""A program under guard (`guard`), as seen from the pool."""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from kvpool.local import guard
from kvpool.local.errors import LocalServerError
from kvpool.local.log_file import open_log

_ROOT = Path(__file__).parents[2]
_CODE = "import sys; sys.path.append(sys.argv[1]); from kvpool.local.guard import main; sys.exit(main())"
"""With -I and -S: nothing of the user's environment or of other packages takes part, or takes time."""
_KEPT_OF_THE_ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
_START_S = 10.0
_MARGIN_S = 2 * guard.LEFTOVERS_S + 3.0
"""How long the guard may take beyond what it allows the program."""


class Guarded:
    """One run of a program. Methods may be called from any thread; `stop` and `release` by one at a time."""

    def __init__(self, process: subprocess.Popen[bytes], pid: int, program: str) -> None:
        self._process = process
        self._program = program
        self.pid = pid

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
        self = cls(process, 0, job.command[0])
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job._asdict()).encode() + b"\n")
                process.stdin.flush()
            self.pid = self._told_pid()
        except BaseException:
            process.kill()  # the program, if it runs by now, goes with it
            self._release()
            raise
        return self

    @property
    def ended(self) -> bool:
        """Whether the program has ended, and all that it started."""
        return self._process.poll() is not None

    def wait(self, end: float) -> int | None:
        """The program's exit status; None where it still runs at `end` (monotonic)."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(0.0, end - time.monotonic()))
        return None

    def stop(self, grace_s: float) -> None:
        """Ask the program to stop, kill it when it has not after `grace_s`, and give back pipes and process.

        Raises `LocalServerError` where even that did not end it. Safe to call again.
        """
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.write(f"stop {grace_s}".encode())
                self._process.stdin.flush()
            self._close_pipes()
        if self.wait(time.monotonic() + grace_s + _MARGIN_S) is None:
            raise LocalServerError(f"{self._program}, process {self.pid}, cannot be stopped, not even by SIGKILL")

    def _told_pid(self) -> int:
        """What the guard says first."""
        output = self._process.stdout
        assert output is not None
        poll = select.poll()
        poll.register(output, select.POLLIN)
        line = output.readline() if poll.poll(1000 * _START_S) else b""
        if not line.endswith(b"\n"):
            raise LocalServerError(f"the guard of {self._program} did not start: see its log")
        return int(line)

    def _release(self) -> None:
        self._close_pipes()
        self._process.wait()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def _environment() -> dict[str, str]:
    """Little: settings of the user's, as PGPORT or PYTHONPATH, do not concern the program."""
    kept = {name: os.environ[name] for name in _KEPT_OF_THE_ENVIRONMENT if name in os.environ}
    return {**kept, "LC_ALL": "C"}

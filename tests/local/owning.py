"""Starts owners of servers (`owner`), as other users too, and ends them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvpool.local import kernel
from tests.interruptible import interruptible
from tests.local.servers import lay_first_files

_CODE = Path(__file__).parents[2]
NOBODY = 65534
NAMELESS = 54_321
"""No user of this machine."""


class Owner:
    """The process, in a group of its own, and what it says."""

    def __init__(self, command: Sequence[str | Path], preexec: Callable[[], None] | None) -> None:
        self._forked: list[int] = []

        def begin() -> None:
            interruptible()
            if preexec is not None:
                preexec()

        self.process = subprocess.Popen(
            command,
            cwd=_CODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=begin,
        )

    def hear(self) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it ended"
        return json.loads(line)

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def fork(self) -> int:
        """Have it fork a process, which ends with the test."""
        self.tell("fork")
        self._forked.append(self.hear()["forked"])
        return self._forked[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def interrupt_group(self) -> None:
        """What a Ctrl-C in a terminal does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.kill()
        for pid in self._forked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def owner(
    directory: Path, *names: str, around: Sequence[str | Path] = (), preexec: Callable[[], None] | None = None
) -> Iterator[Owner]:
    """An owner of these servers; `around` is a command that runs it, `preexec` what it does first."""
    if "postgres" in names:
        lay_first_files(directory)
    owning = Owner([*around, sys.executable, "-m", "tests.local.owner", directory, *names], preexec)
    try:
        yield owning
    finally:
        owning.close()


def as_user(number: int) -> Callable[[], None]:
    """Be that user, without any right of root's, in a namespace whose other users are nobody's."""
    user, group = os.geteuid(), os.getegid()

    def become() -> None:
        kernel.enter_user_namespace()
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{number} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{number} {group} 1")

    return become


def needs_namespaces() -> None:
    """Skip the test where a process may not make namespaces."""
    try:
        subprocess.run(["/bin/true"], preexec_fn=as_user(NOBODY), check=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"user namespaces are forbidden here: {error}")


def without_namespaces(directory: Path) -> list[str | Path]:
    """A command that runs another in a changed root: there the kernel forbids root to make user namespaces."""
    directory.mkdir()
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or unshare is None:
        pytest.skip("only root, with util-linux, can change its root")
    script = 'mount --rbind / "$0" && exec chroot "$0" env --chdir="$PWD" "$@"'
    around: list[str | Path] = [unshare, "--mount", "sh", "-c", script, directory]
    if subprocess.run([*around, "/bin/true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("root may not mount here")
    return around

"""Builds the graph of a copy, in a process of its own with a lower priority, while the original is searched."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from kvpool.catalog.vectors.edge.shard import Shard

COPIED = b"copied\n"
_COPY_LIMIT_S, _LIMIT_S = 60.0, 7_200.0
"""A copy, or a build, that takes longer hangs, and is given up."""
_LOWER_PRIORITY = 10
_PR_SET_PDEATHSIG = 1


class Progress(NamedTuple):
    """How far a build is."""

    copied: bool
    """From now on the original may change."""
    result: int | None
    """How it ended: 0 well; None while it runs."""


class Build:
    """A build that runs. The original must not change until it is `copied`."""

    def __init__(self, original: Path, copy: Path) -> None:
        self.copy = copy
        self._began = time.monotonic()
        self._copied = False
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "kvpool.catalog.vectors.edge", "build", str(original), str(copy), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        self._said = self._process.stdout
        os.set_blocking(self._said.fileno(), False)

    def progress(self) -> Progress:
        """Look, without waiting."""
        if not self._copied:
            self._copied = self._said.read(len(COPIED)) == COPIED
        result = self._process.poll()
        if result is None and time.monotonic() > self._began + (_LIMIT_S if self._copied else _COPY_LIMIT_S):
            self._process.kill()
        return Progress(self._copied or result is not None, result)

    def stop(self) -> None:
        """Kill it, if it runs; what it has made is the caller's to remove."""
        self._process.kill()
        self._process.wait()
        self._said.close()


def build(original: Path, copy: Path, parent: int) -> None:
    """What the process does: copy, build, end."""
    _end_with(parent)
    os.nice(_LOWER_PRIORITY)
    shutil.copytree(original, copy)
    os.write(sys.stdout.fileno(), COPIED)
    shard = Shard.load(copy)
    shard.build_graph()
    shard.close()


def _end_with(parent: int) -> None:
    """The kernel kills this process when the one that started it ends: a build is of no use to anybody else."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)

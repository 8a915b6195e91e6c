"""Runs the `kvpool` command as a user does: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.interruptible import interruptible

COMMAND = [sys.executable, "-m", "kvpool.cli.main"]
TIMEOUT_S = 120
POOL = """\
apiVersion: kvpool.dev/v1alpha1
kind: KVCachePool
metadata: {name: testing}
spec:
  tiers:
    ram: {capacity: 16Mi, indexBytes: 16Mi}
    ssd: {capacity: 64Mi, secondHit: false}
"""


def kvpool(*arguments: str | Path, stdin: bytes = b"", env: dict[str, str] | None = None) -> Ended:
    ended = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False, env=env
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        preexec_fn=interruptible,
    )


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def complaint(self) -> str:
        """The one line that says what went wrong."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("kvpool: ")
        return line.removeprefix("kvpool: ")

"""The lock on a server's directory: nobody starts a server where another still runs, or is about to stop.

`flock` on a file whose descriptor guard and server inherit: it is free once the last process of the old server has
ended, however that was. The file says who holds it, and stays.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from kvpool.local.errors import LocalServerError

LOCK_NAME = "LOCK"
_POLL_S = 0.02


def lock_directory(home: Path, end: float) -> int:
    """Take the directory; the descriptor that holds it. Waits for an old server to stop until `end` (monotonic).

    Raises `LocalServerError` naming the server that still runs.
    """
    path = home / LOCK_NAME
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while not _taken(fd):
            if time.monotonic() >= end:
                holder = _holder(fd)
                raise LocalServerError(f"{home} is still in use by {holder}: stop it, or use another directory")
            time.sleep(_POLL_S)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _taken(fd: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _holder(fd: int) -> str:
    with suppress(OSError):  # who it is only makes the message better
        text = os.pread(fd, 128, 0).decode(errors="replace").strip()
        return text or "another process"
    return "another process"

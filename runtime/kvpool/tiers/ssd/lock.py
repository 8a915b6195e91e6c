"""The lock that keeps a second process out of the tier's directory.

`flock` on a file that says who holds it. The kernel gives the lock back however the process ends, so a lock left by a
`kill -9` is no lock; the file itself stays and means nothing by itself.
"""

import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from kvpool.errors import DirectoryInUseError
from kvpool.tiers.ssd.disk import Disk

LOCK_NAME = "LOCK"
_MAX_BYTES = 512


class DirectoryLock:
    """Held from `acquire` until `release`."""

    def __init__(self, disk: Disk, fd: int) -> None:
        self._disk = disk
        self._fd: int | None = fd

    @classmethod
    def acquire(cls, disk: Disk, directory: Path, now: float) -> "DirectoryLock":
        """Take the directory, or raise `DirectoryInUseError` naming its holder, or `OSError`."""
        fd = disk.open_lock(directory / LOCK_NAME)
        try:
            disk.lock(fd)
            _write_holder(disk, fd, now)
        except BlockingIOError:
            holder = _holder(disk, fd)
            disk.close(fd)
            raise DirectoryInUseError(f"{directory} is in use by {holder}; stop it, or use another directory") from None
        except BaseException:
            disk.close(fd)
            raise
        return cls(disk, fd)

    def release(self) -> None:
        """Let others in. Safe to call again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # the descriptor is gone all the same, and the lock with it
                self._disk.close(fd)


def _write_holder(disk: Disk, fd: int, now: float) -> None:
    started = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    text = f"process {os.getpid()} on {socket.gethostname()}, since {started}".encode()
    disk.pwritev(fd, [text[: _MAX_BYTES - 1].ljust(_MAX_BYTES - 1) + b"\n"], 0)  # of one length: no room needed later


def _holder(disk: Disk, fd: int) -> str:
    buffer = bytearray(_MAX_BYTES)
    size = 0
    with suppress(OSError):  # who it is only makes the message better
        size = disk.preadv(fd, [buffer], 0)
    return bytes(buffer[:size]).decode(errors="replace").strip() or "another process"

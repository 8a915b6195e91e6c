"""The ssd tier's only system calls, behind a protocol, so that tests can make each of them fail, stall or fall short.

Every method raises `OSError` as the call does. Files are made 0600 and directories 0700: records hold prompts.
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvpool.blocks.record import Buffer

DIRECTORY_MODE, FILE_MODE = 0o700, 0o600


class Disk(Protocol):
    """What the tier asks of an operating system. Descriptors are plain integers; offsets and sizes are bytes."""

    def make_directory(self, path: Path) -> None:
        """Make `path` and its parents, and take from others every right to it."""
        ...

    def names(self, directory: Path) -> list[str]:
        """The names in `directory`, in any order."""
        ...

    def stat(self, path: Path) -> os.stat_result:
        """What `path` itself is; links are not followed."""
        ...

    def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
        """Open for reading and writing. `create`: it must not exist. `direct`: past the page cache."""
        ...

    def open_lock(self, path: Path) -> int:
        """Open, or make, the lock's file."""
        ...

    def lock(self, fd: int) -> None:
        """Take the exclusive lock of an open file, or raise `BlockingIOError` at once."""
        ...

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        ...

    def fallocate(self, fd: int, size: int) -> None:
        """Give a file `size` bytes of real space, so that ENOSPC comes now or never."""
        ...

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Read into `buffers`, one after the other; the bytes that came."""
        ...

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write `buffers`, one after the other; the bytes that went."""
        ...

    def fdatasync(self, fd: int) -> None:
        """Return once what was written is durable."""
        ...

    def sync_directory(self, directory: Path) -> None:
        """Return once the names that were given and taken in `directory` are durable."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Give `old` the name `new`, in one step."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a name, and the file with it once nobody has it open."""
        ...


class PosixDisk:
    """The real one."""

    def make_directory(self, path: Path) -> None:
        """As the protocol says."""
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(DIRECTORY_MODE)

    def names(self, directory: Path) -> list[str]:
        """As the protocol says."""
        return os.listdir(directory)  # noqa: PTH208 - names are what is asked for

    def stat(self, path: Path) -> os.stat_result:
        """As the protocol says."""
        return path.lstat()

    def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
        """As the protocol says."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        flags |= os.O_CREAT | os.O_EXCL if create else 0
        flags |= os.O_DIRECT if direct else 0
        return os.open(path, flags, FILE_MODE)

    def open_lock(self, path: Path) -> int:
        """As the protocol says."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT, FILE_MODE)

    def lock(self, fd: int) -> None:
        """As the protocol says."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self, fd: int) -> None:
        """As the protocol says."""
        os.close(fd)

    def fallocate(self, fd: int, size: int) -> None:
        """As the protocol says."""
        os.posix_fallocate(fd, 0, size)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """As the protocol says."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """As the protocol says."""
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        """As the protocol says."""
        os.fdatasync(fd)

    def sync_directory(self, directory: Path) -> None:
        """As the protocol says."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """As the protocol says."""
        old.rename(new)

    def unlink(self, path: Path) -> None:
        """As the protocol says."""
        path.unlink()

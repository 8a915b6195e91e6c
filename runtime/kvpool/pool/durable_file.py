"""Files of the pool's directory that are replaced whole: after a crash either the old bytes are there or the new ones.

Unlike the ssd tier's small files they are durable by name too: the directory is synced as well. The caller holds the
directory's lock, so that nobody else writes the same file.
"""

import os
from contextlib import suppress
from pathlib import Path

FILE_MODE = 0o600
TEMPORARY_SUFFIX = ".tmp"


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` these bytes, and return once they and their name are durable.

    Raises `OSError`; then `path` has its old bytes, or all of the new ones when only the last sync failed.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        _write(temporary, data)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):  # a full disk is what we may be here for: leave it no fuller
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Return once the names in `directory` are durable. Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    with open(fd, "wb", buffering=0) as file:  # noqa: PTH123 - the mode is given at creation, which Path.open cannot
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(fd)

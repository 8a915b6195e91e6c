"""The directory of one pool on this machine: 0700, held by one process at a time, and never somebody else's.

    FORMAT        says that the directory is a pool's, and of which version
    LOCK          locked by the process that has the pool open; names it
    SECRET        the pool secret (`secret`)
    EPOCHS        the epochs of tenants (`epochs`)
    models.json   the models that were registered (`registry`)
    HISTORY       why blocks were lost, from one close to the next start (`history_file`)
    SHARED        which prefixes were shared when the pool was closed last (`shared_file`)
    ssd/          the ssd tier's own directory

`FORMAT`'s first line, `kvpool-pool format=1`, keeps this shape in every version to come.
"""

import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from kvpool.errors import ConfigError, IncompatibleDataError
from kvpool.pool.durable_file import TEMPORARY_SUFFIX, replace_file
from kvpool.tiers.ssd.disk import DIRECTORY_MODE, PosixDisk
from kvpool.tiers.ssd.lock import LOCK_NAME, DirectoryLock

MARKER_NAME = "FORMAT"
FORMAT_VERSION = 1
_LINE = re.compile(rb"kvpool-pool format=(\d{1,9})\n")
_OURS = b"kvpool-pool format=%d\n" % FORMAT_VERSION
_IN_A_NEW_DIRECTORY = {LOCK_NAME, MARKER_NAME + TEMPORARY_SUFFIX, "lost+found"}
"""What an interrupted first start, or making a file system, may leave behind."""


class PoolDirectory:
    """Held from `open` until `close`; a context manager. `is_new`: no pool was ever opened here before."""

    def __init__(self, path: Path, lock: DirectoryLock, *, is_new: bool) -> None:
        self.path = path
        self.is_new = is_new
        self._lock = lock

    @classmethod
    def open(cls, path: Path, *, clock: Callable[[], float] = time.time) -> Self:
        """Make `path` if need be and take it for this process.

        Raises `ConfigError` where it cannot be used or holds something else (its rights are left alone then),
        `DirectoryInUseError` naming the process that holds it, `IncompatibleDataError` if a newer program wrote it.
        """
        try:
            return cls._open(path, clock)
        except OSError as error:
            raise ConfigError(
                f"the pool's directory {path} cannot be used ({error.strerror or error}): "
                f"choose one that this user owns and may write to"
            ) from error

    @classmethod
    def _open(cls, path: Path, clock: Callable[[], float]) -> Self:
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        _check_format(path)
        if stat.S_IMODE(path.stat().st_mode) != DIRECTORY_MODE:
            path.chmod(DIRECTORY_MODE)
        lock = DirectoryLock.acquire(PosixDisk(), path, clock())
        try:
            is_new = _check_format(path)  # again: another process may have been first since
            if is_new:
                replace_file(path / MARKER_NAME, _OURS)
            return cls(path, lock, is_new=is_new)
        except BaseException:
            lock.release()
            raise

    @property
    def ssd(self) -> Path:
        """Where the ssd tier keeps its segments; the tier makes it."""
        return self.path / "ssd"

    @property
    def secret(self) -> Path:
        """The file of the pool secret."""
        return self.path / "SECRET"

    @property
    def epochs(self) -> Path:
        """The file of the epochs."""
        return self.path / "EPOCHS"

    @property
    def models(self) -> Path:
        """The file of the registered models."""
        return self.path / "models.json"

    @property
    def history(self) -> Path:
        """The file of what became of lost blocks."""
        return self.path / "HISTORY"

    def close(self) -> None:
        """Let other processes in. Safe to call again."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_format(path: Path) -> bool:
    """Return whether the directory is new; raise if it is no pool's, or a newer program's."""
    marker = path / MARKER_NAME
    try:
        match = _LINE.match(marker.read_bytes()[:64])
    except FileNotFoundError:
        foreign = sorted({entry.name for entry in path.iterdir()} - _IN_A_NEW_DIRECTORY)
        if foreign:
            raise ConfigError(
                f"{path} is no kvpool directory and holds {foreign[0]!r}: choose a new or an empty one"
            ) from None
        return True
    if match is None:
        raise ConfigError(f"{marker} is no marker of a kvpool directory: move it away, or choose another directory")
    if int(match[1]) > FORMAT_VERSION:
        raise IncompatibleDataError(
            f"{path} is a pool of format {int(match[1])}; this kvpool reads up to format {FORMAT_VERSION}: "
            f"use a newer one, or another directory"
        )
    return False

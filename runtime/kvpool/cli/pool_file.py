"""A pool's file while it is edited: read once, replaced whole, and only if nobody else has changed it meanwhile."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvpool.errors import ConfigError

_BOM = b"\xef\xbb\xbf"
_ON_KUBERNETES = "if it is mounted from a ConfigMap, edit the object: kubectl edit kvcachepool"


class PoolFile:
    """Made by `held`. `text` is what the file had; links were followed."""

    def __init__(self, named: Path, path: Path, file: BinaryIO) -> None:
        self._named = named
        self._path = path
        self._before = os.fstat(file.fileno())
        self._data = file.read()
        try:
            self.text = self._data.removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{named} is not UTF-8 text (byte {error.start})") from error

    def replace(self, text: str) -> None:
        """Give the file this text: after a crash it has the old one or the new one. Mode and owner stay.

        Raises `ConfigError` where it was changed or replaced since it was read, or cannot be written; it is as it was
        then.
        """
        data = (_BOM if self._data.startswith(_BOM) else b"") + text.encode()
        try:
            self._replace(data)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{self._named} cannot be written ({reason}); {_ON_KUBERNETES}") from error

    def _replace(self, data: bytes) -> None:
        number, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with open(number, "wb") as file:  # noqa: PTH123 - a descriptor
                self._write(file, data)
            self._refuse_if_changed()
            os.replace(name, self._path)  # noqa: PTH105 - not a Path
        except BaseException:
            with suppress(OSError):
                os.unlink(name)  # noqa: PTH108 - not a Path
            raise
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _write(self, file: BinaryIO, data: bytes) -> None:
        before, number = self._before, file.fileno()
        made = os.fstat(number)
        if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
            os.fchown(number, before.st_uid, before.st_gid)
        os.fchmod(number, stat.S_IMODE(before.st_mode))  # after the owner: a change of that takes special bits away
        file.write(data)
        file.flush()
        os.fsync(number)

    def _refuse_if_changed(self) -> None:
        try:
            now = self._path.stat() if self._named.resolve(strict=True) == self._path else None
        except FileNotFoundError:
            now = None
        if now is None or _state(now) != _state(self._before):
            raise ConfigError(f"{self._named} was changed by somebody else meanwhile; nothing was written: try again")


@contextmanager
def held(named: Path) -> Iterator[PoolFile]:
    """The file, held against others who edit it in this way. Raises `ConfigError` where it cannot be read."""
    try:
        path = named.resolve(strict=True)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield PoolFile(named, path, file)
    except BlockingIOError:
        raise ConfigError(f"{named} is being edited by another kvpool quota: try again") from None
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror or error}") from error


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

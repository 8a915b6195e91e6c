"""The log of a server: a file and the one before it, each of at most `LIMIT_BYTES`.

Imported by the guard: standard library only, and little of it.
"""

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

LIMIT_BYTES = 1 << 20
EARLIER = ".1"
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class LogFile:
    """Appends to `path`, mode 0600. What does not fit goes on in a new file; the one before is kept, older ones not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_log(path)
        self._bytes = self._file.tell()

    def write(self, data: bytes) -> None:
        """Append; bytes that the disk does not take are lost, for a full disk must not stop the server."""
        with suppress(OSError):
            if self._bytes + len(data) > LIMIT_BYTES:
                self._start_anew()
            self._bytes += self._file.write(data[-LIMIT_BYTES:])

    def _start_anew(self) -> None:
        put_by(self._path)
        self._file.close()
        self._file, self._bytes = open_log(self._path), 0


def open_log(path: Path) -> FileIO:
    """Open a log to append to it; nobody else can read it."""
    return FileIO(os.open(path, _FLAGS, 0o600), "ab")


def put_by(path: Path) -> None:
    """Make the log the earlier one, if there is one: the next `LogFile` begins empty."""
    with suppress(FileNotFoundError):
        path.replace(path.with_name(path.name + EARLIER))


def last_lines(path: Path, lines: int = 12, limit_bytes: int = 4096) -> str:
    """The end of the log, for an error message; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - limit_bytes))
            text = file.read(limit_bytes).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])

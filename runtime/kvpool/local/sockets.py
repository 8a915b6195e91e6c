"""Where a server's unix socket lies: in the server's own directory, else in a private one with a short path.

A socket's path has at most 107 bytes, and what reads it from a url should meet no odd characters. Where the server's
directory would break that, or its file system has no sockets, `run` there is a link to a directory of mode 0700 among
the temporary files, with a link back: so a copy of a pool's directory does not take it for its own. A directory that a
crash left there is used again by the next start.
"""

import os
import re
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from kvpool.local.errors import LocalServerError

PATH_LIMIT_BYTES = 107
_RUN, _BACK = "run", "pool"
_PREFIX = "kvpool-"
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")


def socket_directory(home: Path, name: str) -> Path:
    """A 0700 directory, without sockets, for one called `name`. The caller holds the lock on `home`."""
    run = home / _RUN
    if not run.is_symlink() and _fits(run, name):
        run.mkdir(mode=0o700, exist_ok=True)
        _empty(run)
        if _has_sockets(run, name):
            return run
        run.rmdir()
    return _elsewhere(run, name)


def is_temporary(sockets: Path) -> bool:
    """Whether the directory is to be removed with its server."""
    return sockets.name.startswith(_PREFIX)


def remove_sockets(home: Path, sockets: Path) -> None:
    """Remove the directory, if it lies among the temporary files."""
    if is_temporary(sockets):
        _empty(sockets)
        (sockets / _BACK).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sockets.rmdir()
        (home / _RUN).unlink(missing_ok=True)


def _elsewhere(run: Path, name: str) -> Path:
    if run.is_symlink():
        earlier = run.readlink()
        if _is_ours(earlier, run) and _fits(earlier, name):
            _empty(earlier)
            return earlier
        run.unlink()
    elif run.exists():  # of the time when the directory had another path
        _empty(run)
        run.rmdir()
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108 - a directory of our own is made in it
        if _fits(Path(parent) / f"{_PREFIX}12345678", name):
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            (made / _BACK).symlink_to(run)
            run.symlink_to(made)
            return made
    raise LocalServerError(
        f"no directory has a path short and plain enough for a unix socket: neither {run} nor one in "
        f"{tempfile.gettempdir()}; set TMPDIR to such a directory, or choose another directory for the pool"
    )


def _fits(directory: Path, name: str) -> bool:
    path = str(directory / name)
    return _PLAIN.fullmatch(path) is not None and len(os.fsencode(path)) <= PATH_LIMIT_BYTES


def _has_sockets(run: Path, name: str) -> bool:
    """Whether the file system does; some of virtual machines and networks do not."""
    path = run / name
    with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.bind(str(path))
        path.unlink()
        return True
    return False


def _is_ours(directory: Path, run: Path) -> bool:
    """Whether it was made for `run`, by nobody else, and nobody else can look into it."""
    with suppress(OSError):
        status = directory.lstat()
        private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
        return private and status.st_uid == os.geteuid() and (directory / _BACK).readlink() == run
    return False


def _empty(directory: Path) -> None:
    """Remove what an earlier server left: sockets, and files that name its process."""
    with suppress(FileNotFoundError):
        for entry in directory.iterdir():
            if entry.name != _BACK:
                entry.unlink(missing_ok=True)

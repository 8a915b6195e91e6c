"""The directory of the collection: who has it, and which copy of the points in it counts.

    LOCK          held while a process serves it; the kernel gives it back however that ends
    CURRENT       the name of the copy that counts
    points-N      a copy: the engine's own files
    unreadable    what could not be opened, in place of the one before

All other copies are leftovers of a build that did not end, and removed.
"""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from kvpool.catalog.vectors import layout

_LOCK_WAIT_S = 5.0
"""The process of a parent that was killed needs a moment to see it and to close."""
_LOCK_POLL_S = 0.05


class DirectoryBusyError(Exception):
    """Another process serves the directory."""


class OtherCollectionError(Exception):
    """The points there are of another kind; says which."""


class CollectionDirectory:
    """`<directory>/kvpool-prompts-2`, locked until the process ends. Raises `DirectoryBusyError`, or `OSError`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / layout.NAME
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _take(self._lock, self.path)
        self._remove_leftovers()

    def current(self) -> Path | None:
        """The copy that counts; None before there is one. Raises `OtherCollectionError`."""
        name = self._current_name()
        if name is None:
            return None
        copy = self.path / name
        _check(copy)
        return copy

    def next(self) -> Path:
        """The name of the next copy, which does not exist yet."""
        name = self._current_name()
        number = int(name.rpartition("-")[2]) + 1 if name else 1
        return self.path / f"points-{number}"

    def switch(self, copy: Path) -> None:
        """From now on this copy counts, and the others are removed."""
        temporary = self.path / "CURRENT.new"
        with temporary.open("w") as file:
            file.write(f"{copy.name}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / "CURRENT")
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._remove_leftovers()

    def remove(self, copy: Path) -> None:
        """Remove a copy that does not count."""
        shutil.rmtree(copy, ignore_errors=True)

    def set_aside(self, copy: Path) -> None:
        """Move a copy that cannot be opened out of the way."""
        aside = self.path / "unreadable"
        shutil.rmtree(aside, ignore_errors=True)
        copy.rename(aside)
        (self.path / "CURRENT").unlink()

    def _current_name(self) -> str | None:
        try:
            name = (self.path / "CURRENT").read_text().strip()
        except FileNotFoundError:
            return None
        return name if name.startswith("points-") and name[7:].isdigit() and (self.path / name).is_dir() else None

    def _remove_leftovers(self) -> None:
        current = self._current_name()
        for copy in self.path.glob("points-*"):
            if copy.name != current:
                shutil.rmtree(copy, ignore_errors=True)


def _take(lock: int, path: Path) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise DirectoryBusyError(f"{path} is in use by another process") from None
            time.sleep(_LOCK_POLL_S)
        else:
            return


def _check(copy: Path) -> None:
    """Whether the engine made this copy for vectors like ours. What cannot be read is left to the engine."""
    try:
        vectors = json.loads((copy / "edge_config.json").read_bytes())["vectors"]
        found = {name: (params["size"], params["distance"]) for name, params in vectors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if found != {"": (layout.SIZE, layout.DISTANCE)}:
        raise OtherCollectionError(
            f"{copy} holds vectors of another kind: {found}; needed are {layout.SIZE} dimensions compared by "
            f"{layout.DISTANCE}: move it away"
        )

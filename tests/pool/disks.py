"""A disk that is ill when the test says so, and well again when it says that."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from kvpool.blocks.record import Buffer
from kvpool.tiers.ssd.disk import PosixDisk


class SickDisk(PosixDisk):
    """`errors` makes calls fail, by name; `stalls` says of a call whether it waits until `go_on` is set.

    `held` counts calls that had to wait, `calls` all of them by name.
    """

    def __init__(self) -> None:
        self.errors: dict[str, int] = {}
        self.stalls: Callable[[str], bool] = lambda name: False
        self.go_on = threading.Event()
        self.held = 0
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def recover(self) -> None:
        self.errors = {}
        self.stalls = lambda name: False
        self.go_on.set()

    def make_directory(self, path: Path) -> None:
        self._begin("make_directory")
        super().make_directory(path)

    def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
        self._begin("create" if create else "open")
        return super().open(path, create=create, direct=direct)

    def fallocate(self, fd: int, size: int) -> None:
        self._begin("fallocate")
        super().fallocate(fd, size)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._begin("preadv")
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._begin("pwritev")
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._begin("fdatasync")
        super().fdatasync(fd)

    def rename(self, old: Path, new: Path) -> None:
        self._begin("rename")
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self._begin("unlink")
        super().unlink(path)

    def _begin(self, name: str) -> None:
        with self._lock:
            self.calls[name] += 1
            stalls = self.stalls(name)
            self.held += stalls
        if stalls:
            assert self.go_on.wait(60), "the test forgot to let the call go on"
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))


def from_the_nth_on(name: str, number: int) -> Callable[[str], bool]:
    """For `SickDisk.stalls`: every call of this name from its `number`-th from now on (1 is the next)."""
    seen = Counter[str]()

    def stalls(called: str) -> bool:
        seen[called] += 1
        return called == name and seen[name] >= number

    return stalls

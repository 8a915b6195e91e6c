"""Disks that do on purpose what real ones do at night: fail, fall short, stall, lie to the last, lose power."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from random import Random
from stat import S_IFREG
from typing import TypeVar

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Buffer
from kvpool.tiers.ssd.disk import Disk, PosixDisk

SECTOR_BYTES = 512
T = TypeVar("T")


class QuickDisk(PosixDisk):
    """Never waits for the device. For tests in which nothing loses power."""

    def fdatasync(self, fd: int) -> None:
        pass

    def sync_directory(self, directory: Path) -> None:
        pass


class DiskWithABadPage(QuickDisk):
    """One page of the segment file that is opened first, or condemned, can be neither read nor written."""

    def __init__(self, page: int | None) -> None:
        self.page = page
        """None: all are good, for now."""
        self._path: Path | None = None
        self._fds: set[int] = set()

    def condemn(self, path: Path) -> None:
        """From its next opening on this file is the bad one, whatever it is renamed to."""
        self._path, self._fds = path, set()

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        if old == self._path:
            self._path = new

    def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
        fd = super().open(path, create=create, direct=direct)
        if path.suffix == ".segment" and self._path in (None, path):
            self._path = path
            self._fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._fds.discard(fd)
        super().close(fd)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._check(fd, buffers, offset)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        self._check(fd, buffers, offset)
        return super().pwritev(fd, buffers, offset)

    def _check(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        end = offset + sum(memoryview(buffer).nbytes for buffer in buffers)
        if fd in self._fds and self.page is not None and offset <= self.page * PAGE_BYTES < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Fault(Enum):
    FAIL = auto()
    """An error, and nothing was done."""
    LATE = auto()
    """An error, although all was done."""
    SHORT = auto()
    """Half of it was done, and the call says so; calls that know no half fail."""
    TORN = auto()
    """Half of it was done, and the call says nothing of it: an error."""


Plan = Callable[[int, str], Fault | None]
"""From a call's number, counted from 1, and its name, to what goes wrong in it."""


def nothing(number: int, name: str) -> None:
    """The plan in which nothing goes wrong."""


class FaultyDisk:
    """Another disk, in which some calls go wrong, and which counts all of them and the descriptors left open."""

    def __init__(self, disk: Disk, plan: Plan = nothing, error: int = errno.EIO) -> None:
        self.plan = plan
        self.error = error
        self.names_of_calls: list[str] = []
        self.open_fds: set[int] = set()
        self.disk = disk
        self._lock = threading.Lock()

    @property
    def calls(self) -> int:
        return len(self.names_of_calls)

    def make_directory(self, path: Path) -> None:
        self._whole("make_directory", lambda: self.disk.make_directory(path))

    def names(self, directory: Path) -> list[str]:
        return self._whole("names", lambda: self.disk.names(directory))

    def stat(self, path: Path) -> os.stat_result:
        return self._whole("stat", lambda: self.disk.stat(path))

    def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
        return self._opened("open", lambda: self.disk.open(path, create=create, direct=direct))

    def open_lock(self, path: Path) -> int:
        return self._opened("open_lock", lambda: self.disk.open_lock(path))

    def lock(self, fd: int) -> None:
        self._whole("lock", lambda: self.disk.lock(fd))

    def close(self, fd: int) -> None:
        # As on Linux, a close that fails has closed all the same: its error is that of an earlier write.
        fault = self._next("close")
        self.disk.close(fd)
        self.open_fds.discard(fd)
        if fault is not None:
            raise self._oserror()

    def fallocate(self, fd: int, size: int) -> None:
        fault = self._next("fallocate")
        if fault in (Fault.SHORT, Fault.TORN):
            self.disk.fallocate(fd, max(1, size // 2))
        elif fault is not Fault.FAIL:
            self.disk.fallocate(fd, size)
        if fault is not None:
            raise self._oserror()

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._moved("preadv", self.disk.preadv, fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._moved("pwritev", self.disk.pwritev, fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self._whole("fdatasync", lambda: self.disk.fdatasync(fd))

    def sync_directory(self, directory: Path) -> None:
        self._whole("sync_directory", lambda: self.disk.sync_directory(directory))

    def rename(self, old: Path, new: Path) -> None:
        if self._next("rename") is not None:  # it is one step: after an error the old name stands
            raise self._oserror()
        self.disk.rename(old, new)

    def unlink(self, path: Path) -> None:
        self._whole("unlink", lambda: self.disk.unlink(path))

    def _next(self, name: str) -> Fault | None:
        with self._lock:
            self.names_of_calls.append(name)
            number = len(self.names_of_calls)
        return self.plan(number, name)

    def _oserror(self) -> OSError:
        return OSError(self.error, os.strerror(self.error))

    def _whole(self, name: str, call: Callable[[], T]) -> T:
        fault = self._next(name)
        if fault in (Fault.FAIL, Fault.SHORT, Fault.TORN):
            raise self._oserror()
        result = call()
        if fault is Fault.LATE:
            raise self._oserror()
        return result

    def _opened(self, name: str, call: Callable[[], int]) -> int:
        fault = self._next(name)
        if fault is not None and fault is not Fault.LATE:
            raise self._oserror()
        fd = call()
        if fault is Fault.LATE:  # a file was made, but there is no descriptor
            self.disk.close(fd)
            raise self._oserror()
        self.open_fds.add(fd)
        return fd

    def _moved(
        self, name: str, move: Callable[[int, Sequence[Buffer], int], int], fd: int, buffers: Sequence[Buffer],
        offset: int,
    ) -> int:  # fmt: skip
        fault = self._next(name)
        if fault is Fault.FAIL:
            raise self._oserror()
        if fault not in (Fault.SHORT, Fault.TORN):
            count = move(fd, buffers, offset)
        elif name == "preadv":
            count = move(fd, buffers, offset) // 2
        else:
            half = sum(memoryview(buffer).nbytes for buffer in buffers) // 2 // PAGE_BYTES * PAGE_BYTES
            count = move(fd, _first_bytes(buffers, half), offset) if half else 0
        if fault in (Fault.LATE, Fault.TORN):
            raise self._oserror()
        return count


def the_nth(number: int, fault: Fault) -> Plan:
    return lambda at, name: fault if at == number else None


def from_the_nth_on(number: int, fault: Fault) -> Plan:
    return lambda at, name: fault if at >= number else None


def every(*names: str, fault: Fault = Fault.FAIL) -> Plan:
    return lambda at, name: fault if name in names else None


class StallingDisk(FaultyDisk):
    """Holds the calls that `stall` names until `go_on` is set; `stalled` is set when one has come."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self.stall: Callable[[str], bool] = lambda name: False
        self.stalled = threading.Event()
        self.go_on = threading.Event()

    def _next(self, name: str) -> Fault | None:
        fault = super()._next(name)
        if self.stall(name):
            self.stalled.set()
            assert self.go_on.wait(60), "the test forgot to let the call go on"
        return fault


@dataclass
class _File:
    """What a file holds, and what of it survives a loss of power."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    """Writes since the last sync, in order; each sector of them is on the disk or not."""
    unsynced_size: int | None = None


class MemoryDisk:
    """A disk in memory with a volatile cache: after `power_lost`, only what was synced is sure to be there.

    Names are durable once their directory was synced; before, some first part of the changes is. Of the writes since a
    file's last sync, any set of sectors is. One directory.
    """

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._changes: list[dict[str, _File]] = []
        """What all names were after each change since the last sync of the directory."""
        self._open: dict[int, _File] = {}
        self._locked: set[int] = set()
        self._next_fd = 1000

    def used_bytes(self) -> int:
        return sum(-(-len(file.data) // 4096) * 4096 for file in self.files.values())

    def power_lost(self, random: Random) -> MemoryDisk:
        """The disk as it is when power is back."""
        after = MemoryDisk()
        states = [self._durable_names, *self._changes]
        copies: dict[int, _File] = {}
        for name, file in states[random.randrange(len(states))].items():
            after.files[name] = copies.setdefault(id(file), _after_loss(file, random))
        after._durable_names = dict(after.files)
        return after

    def make_directory(self, path: Path) -> None:
        pass

    def names(self, directory: Path) -> list[str]:
        return list(self.files)

    def stat(self, path: Path) -> os.stat_result:
        file = self._file(path)
        return os.stat_result((S_IFREG | 0o600, 0, 0, 1, 0, 0, len(file.data), 0, 0, 0))

    def open(self, path: Path, *, create: bool = False, direct: bool = False) -> int:
        if create:
            if path.name in self.files:
                raise FileExistsError(errno.EEXIST, "exists", str(path))
            self.files[path.name] = _File()
            self._names_changed()
        return self._descriptor(self._file(path))

    def open_lock(self, path: Path) -> int:
        return self.open(path, create=path.name not in self.files)

    def lock(self, fd: int) -> None:
        if any(self._open[other] is self._open[fd] for other in self._locked):
            raise BlockingIOError(errno.EAGAIN, "locked")
        self._locked.add(fd)

    def close(self, fd: int) -> None:
        del self._open[fd]
        self._locked.discard(fd)

    def fallocate(self, fd: int, size: int) -> None:
        file = self._open[fd]
        file.data.extend(bytes(size - len(file.data)))
        file.unsynced_size = size

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        count = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            part = self._open[fd].data[offset + count : offset + count + view.nbytes]
            view[: len(part)] = part
            count += len(part)
            if len(part) < view.nbytes:
                break
        return count

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(bytes(memoryview(buffer)) for buffer in buffers)
        file = self._open[fd]
        if len(file.data) < offset + len(data):
            file.data.extend(bytes(offset + len(data) - len(file.data)))
            file.unsynced_size = len(file.data)
        file.data[offset : offset + len(data)] = data
        file.unsynced.append((offset, data))
        return len(data)

    def fdatasync(self, fd: int) -> None:
        file = self._open[fd]
        file.durable = bytearray(file.data)
        file.unsynced, file.unsynced_size = [], None

    def sync_directory(self, directory: Path) -> None:
        self._durable_names, self._changes = dict(self.files), []

    def rename(self, old: Path, new: Path) -> None:
        self.files[new.name] = self._file(old)
        del self.files[old.name]
        self._names_changed()

    def unlink(self, path: Path) -> None:
        self._file(path)
        del self.files[path.name]
        self._names_changed()

    def _file(self, path: Path) -> _File:
        if path.name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return self.files[path.name]

    def _descriptor(self, file: _File) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = file
        return self._next_fd

    def _names_changed(self) -> None:
        self._changes.append(dict(self.files))


def _after_loss(file: _File, random: Random) -> _File:
    data = bytearray(file.durable)
    if file.unsynced_size is not None and random.random() < 0.5:
        data.extend(bytes(max(0, file.unsynced_size - len(data))))
    chance = random.choice([0.0, 0.5, 1.0])
    for offset, written in file.unsynced:
        for at in range(0, len(written), SECTOR_BYTES):
            sector = written[at : at + SECTOR_BYTES]
            if offset + at + len(sector) <= len(data) and random.random() < chance:
                data[offset + at : offset + at + len(sector)] = sector
    return _File(data, bytearray(data))


def _first_bytes(buffers: Sequence[Buffer], nbytes: int) -> list[Buffer]:
    parts: list[Buffer] = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if nbytes <= 0:
            break
        parts.append(view[:nbytes])
        nbytes -= min(nbytes, view.nbytes)
    return parts

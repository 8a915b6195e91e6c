"""How much more memory this process may have: what the machine has, and what its control groups allow.

Read from `/proc` and `/sys/fs/cgroup`, both versions of control groups. Page cache that the kernel would give back
counts as available, in a control group as on the machine.
"""

import sys
from pathlib import Path
from typing import NamedTuple

UNKNOWN = sys.maxsize
"""What a source says that is not there, or that sets no limit."""


class _GroupFiles(NamedTuple):
    """Where one version of control groups keeps its numbers."""

    controllers: str
    mount: str
    limit: str
    usage: str
    reclaimable: str


_V2 = _GroupFiles("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = _GroupFiles(
    "memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that the process can still touch without the kernel killing anybody; `UNKNOWN` where nothing says so.

    About 0.1 ms. `root` is where `proc` and `sys` lie.
    """
    available = _numbers(root / "proc/meminfo").get("MemAvailable:", UNKNOWN)
    for version, path in _groups(root):
        mount = root / version.mount
        directory = mount / path.lstrip("/")
        if not directory.is_dir():  # a container sees its own group as the mount's root
            directory = mount
        for group in (directory, *directory.parents):
            if not group.is_relative_to(mount):
                break
            available = min(available, _left(group, version))
    return available


def _groups(root: Path) -> list[tuple[_GroupFiles, str]]:
    """The control groups of this process that may limit its memory, and their paths below the mount."""
    groups = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if _V1.controllers in controllers.split(","):
            groups.append((_V1, path))
        elif controllers == _V2.controllers:
            groups.append((_V2, path))
    return groups


def _left(group: Path, version: _GroupFiles) -> int:
    limit = _number(group / version.limit)
    if limit == UNKNOWN:
        return UNKNOWN
    reclaimable = _numbers(group / "memory.stat").get(version.reclaimable, 0)
    return max(0, limit - _number(group / version.usage) + reclaimable)


def _number(file: Path) -> int:
    text = "".join(_lines(file))
    return int(text) if text.isdigit() else UNKNOWN  # "max"


def _numbers(file: Path) -> dict[str, int]:
    """The lines `name number [kB]` of a file, in bytes."""
    numbers = {}
    for line in _lines(file):
        match line.split():
            case [name, number, *unit] if number.isdigit():
                numbers[name] = int(number) * (1024 if unit else 1)
    return numbers


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []

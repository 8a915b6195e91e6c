"""What a table of figures says of where and when they were taken."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kvpool

_PACKAGES = ("numpy", "xxhash", "torch", "transformers")


def described(directory: Path) -> dict[str, str]:
    """Machine, date and versions; `directory` is where the bench's files go."""
    return {
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} CPUs, {_memory_gib():.0f} GiB of memory",
        "disk": _file_system(directory),
        "system": f"Linux {platform.release()}, {platform.python_implementation()} {platform.python_version()}",
        "versions": ", ".join([f"kvpool {kvpool.__version__}", *_versions()]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def _file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`: the longest mount point above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    resolved = directory.resolve()
    above = [(len(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(above, default=(0, "unknown"))[1]


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found

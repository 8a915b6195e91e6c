"""How much memory there is left, as machines and containers of all sorts say it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kvpool.tiers.host_memory import UNKNOWN, available_bytes

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def meminfo(available: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal:  99 kB\nMemAvailable:  {available >> 10} kB\nHugePages_Total:  0\n\nodd line\n"}


def group(directory: str, limit: int | str, usage: int, inactive_file: int = 0) -> dict[str, str]:
    """A control group of version 2."""
    return {
        f"sys/fs/cgroup/{directory}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{directory}/memory.current": f"{usage}\n",
        f"sys/fs/cgroup/{directory}/memory.stat": f"anon 5\ninactive_file {inactive_file}\n",
    }


def test_this_machine_says_how_much_memory_is_left() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_where_nothing_says_so_it_is_not_known(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == UNKNOWN


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    files = meminfo(8 * GIB) | {"proc/self/cgroup": "0::/user\n"} | group("user", "max", GIB)
    assert available_bytes(write(tmp_path, files)) == 8 * GIB


def test_a_control_groups_limit_counts_and_its_page_cache_does_not(tmp_path: Path) -> None:
    files = (
        meminfo(8 * GIB) | {"proc/self/cgroup": "0::/pod\n"} | group("pod", 4 * GIB, 3 * GIB, inactive_file=GIB // 2)
    )
    assert available_bytes(write(tmp_path, files)) == GIB + GIB // 2


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = meminfo(8 * GIB) | {"proc/self/cgroup": "0::/pods/one/main\n"}
    files |= group("pods/one/main", 6 * GIB, GIB) | group("pods/one", 3 * GIB, 2 * GIB) | group("pods", "max", 0)
    assert available_bytes(write(tmp_path, files)) == GIB


def test_a_container_finds_its_group_at_the_mounts_root(tmp_path: Path) -> None:
    files = meminfo(8 * GIB) | {"proc/self/cgroup": "0::/kubepods/on-the-host-only\n"} | group("", 2 * GIB, GIB)
    assert available_bytes(write(tmp_path, files)) == GIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = meminfo(8 * GIB) | {"proc/self/cgroup": "0::/\n"} | group("", GIB, 2 * GIB)
    assert available_bytes(write(tmp_path, files)) == 0


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_version_1_of_control_groups_counts_too(tmp_path: Path, controllers: str) -> None:
    files = meminfo(8 * GIB) | {
        "proc/self/cgroup": f"9:{controllers}:/pod:with-colon\n3:cpuset:/\n0::/\n",
        "sys/fs/cgroup/memory/pod:with-colon/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/pod:with-colon/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/pod:with-colon/memory.stat": "inactive_file 1\ntotal_inactive_file 4096\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
    assert available_bytes(write(tmp_path, files)) == GIB + 4096

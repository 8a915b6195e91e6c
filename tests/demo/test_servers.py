"""Servers are halted with all that they have started, and those that outlive their pool are found."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.config import RuntimeConfig
from kvpool.demo.servers import How, NotBackError, Process, Servers, left_running, read_processes
from kvpool.pool.pool import Pool
from tests.local.servers import runs
from tests.waiting import PROCESS_S, eventually

MIB = 1 << 20
SLEEP = "import time; time.sleep(600)"
TREE = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "{SLEEP}"])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """With a Redis server of its own."""
    dragonfly = {
        "memoryBytes": 256 * MIB, "codec": "none", "ttlS": 60.0, "connections": 2, "batchSize": 10, "budgetS": 1.0,
        "tls": False,
    }  # fmt: skip
    ram = {"capacityBytes": 16 * MIB, "indexBytes": MIB}
    config = RuntimeConfig.model_validate({"name": "test", "ram": ram, "dragonfly": dragonfly})
    with Pool.open(config, directory=tmp_path / "pool") as pool:
        yield pool


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_server_is_halted_for_the_time_of_an_outage_and_used_again_afterwards(pool: Pool, tmp_path: Path) -> None:
    servers = Servers(pool, tmp_path / "processes")
    server = servers.running("dragonfly")
    assert server is not None
    with servers.out(server, How.STOPPED, "acme 1.1"):
        assert state_of(server.pid) == "T"
    assert state_of(server.pid) in "SR"
    assert not pool.degradations()
    assert [(one.server, one.how, one.chat) for one in servers.outages] == [("dragonfly", How.STOPPED, "acme 1.1")]


def test_a_halted_server_goes_on_whatever_happens_meanwhile(pool: Pool, tmp_path: Path) -> None:
    servers = Servers(pool, tmp_path / "processes")
    server = servers.running("dragonfly")
    assert server is not None
    with pytest.raises(KeyboardInterrupt), servers.out(server, How.STOPPED, "acme 1.1"):
        raise KeyboardInterrupt
    assert state_of(server.pid) in "SR"
    assert servers.outages == []


def test_a_killed_server_is_another_process_afterwards_and_both_are_noted(pool: Pool, tmp_path: Path) -> None:
    servers = Servers(pool, tmp_path / "processes")
    server = servers.running("dragonfly")
    assert server is not None
    with servers.out(server, How.KILLED, "acme 1.1"):
        eventually(lambda: not runs(server.pid), deadline_s=PROCESS_S)
    again = servers.running("dragonfly")
    assert again is not None
    assert again.pid != server.pid
    noted = read_processes(tmp_path / "processes")
    assert [process.pid for process in noted] == [server.pid, again.pid]
    pool.close()
    assert left_running(noted) == []


def test_a_server_that_does_not_come_back_is_said(tmp_path: Path) -> None:
    away = {
        "secret": "away", "codec": "none", "ttlS": 60.0, "connections": 2, "batchSize": 10, "budgetS": 0.1, "tls": False
    }  # fmt: skip
    ram = {"capacityBytes": 16 * MIB, "indexBytes": MIB}
    config = RuntimeConfig.model_validate({"name": "test", "ram": ram, "dragonfly": away})
    with (
        Pool.open(config, directory=tmp_path / "pool") as pool,
        pytest.raises(NotBackError, match="no-dragonfly for 0 s: dragonfly: "),
    ):
        Servers(pool, tmp_path / "processes").wait_until_all_answer(0.0)


def test_what_a_server_has_started_is_halted_with_it(tmp_path: Path, pool: Pool) -> None:
    with subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        server = pool.local_servers()[0]._replace(pid=parent.pid)
        with Servers(pool, tmp_path / "processes").out(server, How.STOPPED, "acme 1.1"):
            assert [state_of(parent.pid), state_of(child)] == ["T", "T"]
        eventually(lambda: state_of(parent.pid) == state_of(child) == "S", deadline_s=PROCESS_S)
        os.kill(child, signal.SIGKILL)


def test_a_process_that_outlives_its_pool_is_found_and_no_other_with_its_number() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        left = Process(name="dragonfly", version="redis 8.2.3", pid=process.pid, started=started)
        assert left_running([left], 0.0) == [left]
        assert left_running([Process(name="dragonfly", version="", pid=process.pid, started="1")], 0.0) == []
        process.kill()
        assert left_running([left]) == []


def test_where_no_server_was_noted_none_is_left(tmp_path: Path) -> None:
    assert read_processes(tmp_path / "none") == []

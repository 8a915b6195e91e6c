"""However the demo is ended, its servers are stopped and nothing is left of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvpool.demo.__main__ import FAILED, INTERRUPTED
from kvpool.demo.servers import PROCESSES, Process, left_running, read_processes
from kvpool.demo.smollm2 import ModelMissingError, gguf_file
from tests.interruptible import interruptible
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
START_S, END_S = 240.0, 120.0


@pytest.fixture
def installed() -> None:
    try:
        gguf_file()
    except ModelMissingError as error:
        pytest.skip(str(error))


@contextmanager
def playing(out: Path) -> Iterator[tuple["subprocess.Popen[str]", list[Process]]]:
    """The demo in a process group of its own, as a terminal has it, once its servers run."""
    command = [sys.executable, "-m", "kvpool.demo", "--quick", "--pool", "examples/laptop.yaml", "--out", str(out)]
    demo = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    try:
        eventually(lambda: demo.poll() is not None or len(noted(out)) >= 2, deadline_s=START_S)
        yield demo, noted(out)
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)
        demo.communicate()


def noted(out: Path) -> list[Process]:
    return [process for file in out.glob(f"demo-*/{PROCESSES}") for process in read_processes(file)]


def half_of(demo: int) -> int:
    children = Path(f"/proc/{demo}/task/{demo}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


@pytest.mark.usefixtures("installed")
def test_ctrl_c_stops_all_servers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with playing(tmp_path) as (demo, servers):
        os.killpg(demo.pid, signal.SIGINT)
        output, _ = demo.communicate(timeout=END_S)
        assert demo.returncode == INTERRUPTED, output
        assert {server.name for server in servers} >= {"dragonfly", "postgres"}
        assert left_running(servers, 0.0) == []
        assert list(tmp_path.iterdir()) == []
        assert "Traceback" not in output


@pytest.mark.usefixtures("installed")
def test_a_process_of_the_demo_that_is_killed_leaves_no_server(tmp_path: Path) -> None:
    with playing(tmp_path) as (demo, servers):
        os.kill(half_of(demo.pid), signal.SIGKILL)
        output, _ = demo.communicate(timeout=END_S)
        assert demo.returncode == FAILED, output
        assert "ended by signal 9" in output
        assert left_running(servers, 0.0) == []
        assert list(tmp_path.iterdir()) == []

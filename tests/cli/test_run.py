"""`kvpool run`: opens a pool, shows it, and closes it when it is told to."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from kvpool.cli.ending import told_by
from kvpool.cli.exits import ExitCode
from tests.cli.command import COMMAND, kvpool, started
from tests.cli.conftest import share


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_in_a_pipe_it_prints_lines_and_closes_when_told(pool_file: Path, directory: Path, how: signal.Signals) -> None:
    running = started("run", pool_file, "--directory", directory, "--every", "0.1")
    assert running.stdout is not None
    assert running.stdout.readline() == f"pool testing is open in {directory}\n"
    lines = [running.stdout.readline() for _ in range(2)]
    running.send_signal(how)
    out, _ = running.communicate(timeout=60)
    assert all(line.startswith("mode normal; ram 0 B of 16 MiB (0 blocks); ssd ") for line in lines)
    assert out.splitlines()[-1].startswith(f"closing {directory}")
    assert running.returncode == ExitCode.OK


def test_as_json_every_line_is_an_object_with_all_counters(pool_file: Path, directory: Path) -> None:
    share(pool_file, directory)
    running = started("run", pool_file, "--directory", directory, "--every", "0.1", "--json")
    assert running.stdout is not None
    first, second = (json.loads(running.stdout.readline()) for _ in range(2))
    running.terminate()
    running.communicate(timeout=60)
    assert first["tiers"]["ssd"]["blocks"] == 3
    assert first["hit_ratio"] == 0
    assert [prefix["requests"] for prefix in first["shared_prefixes"]] == [1]
    assert first["at_s"] < second["at_s"]
    assert running.returncode == ExitCode.OK


def test_on_a_terminal_it_draws_the_tiers_and_closes_on_ctrl_c(pool_file: Path, directory: Path) -> None:
    share(pool_file, directory)
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [*COMMAND, "run", str(pool_file), "--directory", str(directory)]
    running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    shown = read_until(ours, b"shared prefix")
    os.kill(running.pid, signal.SIGINT)
    shown += read_until(ours, b"closing")
    assert running.wait(timeout=60) == ExitCode.OK
    os.close(ours)
    for word in (
        b"testing",
        b"normal",
        b"ram",
        b"ssd",
        b"16 MiB",
        b"64 MiB",
        b"hit ratio",
        b"restored at start",
        b"tiny",
    ):
        assert word in shown


def test_a_second_run_on_one_directory_names_the_first(pool_file: Path, directory: Path) -> None:
    first = started("run", pool_file, "--directory", directory)
    assert first.stdout is not None
    first.stdout.readline()
    second = kvpool("run", pool_file, "--directory", directory)
    first.terminate()
    first.communicate(timeout=60)
    assert second.code == ExitCode.IN_USE
    assert f"process {first.pid} " in second.complaint


def test_a_directory_that_holds_something_else_is_refused(pool_file: Path, directory: Path) -> None:
    directory.mkdir()
    (directory / "letters.txt").write_text("mine")
    ended = kvpool("run", pool_file, "--directory", directory)
    assert ended.code == ExitCode.USAGE
    assert "letters.txt" in ended.complaint


def test_a_newer_programs_directory_is_a_failure(pool_file: Path, used_directory: Path) -> None:
    (used_directory / "FORMAT").write_text("kvpool-pool format=99\n")
    ended = kvpool("run", pool_file, "--directory", used_directory)
    assert ended.code == ExitCode.FAILED
    assert "99" in ended.complaint


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What the terminal shows, up to where `wanted` has appeared."""
    shown = b""
    while wanted not in shown:
        shown += os.read(terminal, 65_536)
    return shown


def test_a_signal_at_any_instant_of_a_wait_ends_it() -> None:
    for number in range(2_000):
        with told_by([signal.SIGALRM]) as ending:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 50))
            assert ending.wait(60)


def test_other_signals_end_no_wait() -> None:
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: None)
    try:
        with told_by([signal.SIGALRM]) as ending:
            signal.raise_signal(signal.SIGUSR1)
            assert not ending.wait(0)
            signal.raise_signal(signal.SIGALRM)
            assert ending.wait(60)
    finally:
        signal.signal(signal.SIGUSR1, before)

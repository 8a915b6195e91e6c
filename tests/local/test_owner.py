"""A server lives as long as the process that started it, however that ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from tests.local.clients import read, write
from tests.local.conftest import DRAGONFLY, POSTGRES, Servers
from tests.local.owning import NAMELESS, NOBODY, as_user, needs_namespaces, owner, without_namespaces
from tests.local.servers import runs
from tests.waiting import PROCESS_S, eventually

NAMES = pytest.mark.parametrize("name", [DRAGONFLY, POSTGRES])


def family(pid: int) -> list[int]:
    """The server's guard, the server, and its own processes."""
    guard = psutil.Process(pid).parent()
    assert guard is not None
    return [guard.pid, *(child.pid for child in guard.children(recursive=True))]


@NAMES
def test_servers_of_a_process_that_is_killed_stop_and_their_data_are_found_again(
    name: str, servers: Servers, tmp_path: Path
) -> None:
    with owner(tmp_path, name) as owning:
        below = family(owning.hear()[name])
        write(name, tmp_path / name / "service", "kept")
        owning.kill()
        server = servers.named(name, tmp_path)
        server.start()  # waits for the old one
        assert not any(runs(pid) for pid in below)
        assert read(name, server.folder) == "kept"


def test_a_process_that_is_killed_at_any_moment_of_the_start_hinders_the_next_one_in_nothing(
    servers: Servers, tmp_path: Path
) -> None:
    for name in (DRAGONFLY, POSTGRES):
        (tmp_path / name).mkdir()  # so that PostgreSQL makes its first files, until it is let
    random = Random(11)
    for _ in range(10):
        with owner(tmp_path, DRAGONFLY, POSTGRES) as owning, suppress(subprocess.TimeoutExpired):
            owning.process.wait(random.uniform(0.1, 2.0))
    for name in (DRAGONFLY, POSTGRES):
        server = servers.named(name, tmp_path)
        server.start()
        write(name, server.folder, "kept")
        assert read(name, server.folder) == "kept"
        assert not (tmp_path / name / "data.new").exists()


@NAMES
def test_servers_of_a_process_that_ends_without_a_word_stop(name: str, tmp_path: Path) -> None:
    with owner(tmp_path, name) as owning:
        below = family(owning.hear()[name])
        owning.tell("exit")
        eventually(lambda: not any(runs(pid) for pid in below), deadline_s=PROCESS_S)
        assert owning.process.wait() == 0


def test_a_ctrl_c_leaves_the_servers_to_their_pool(tmp_path: Path) -> None:
    with owner(tmp_path, DRAGONFLY, POSTGRES) as owning:
        pids = owning.hear()
        owning.interrupt_group()
        assert owning.hear() == {"interrupted": {DRAGONFLY: True, POSTGRES: True}}
        assert owning.hear() == "stopped"
        assert not any(runs(pid) for pid in pids.values())


@NAMES
def test_a_fork_of_a_process_that_is_killed_does_not_keep_its_servers(name: str, tmp_path: Path) -> None:
    with owner(tmp_path, name) as owning:
        below = family(owning.hear()[name])
        forked = owning.fork()
        owning.kill()
        eventually(lambda: not any(runs(pid) for pid in below), deadline_s=PROCESS_S)
        assert runs(forked)


@NAMES
def test_a_fork_of_a_process_does_not_hinder_it_from_stopping_its_servers(name: str, tmp_path: Path) -> None:
    with owner(tmp_path, name) as owning:
        pid = owning.hear()[name]
        owning.fork()
        owning.tell("stop")
        assert owning.hear() == "stopped"
        assert not runs(pid)


@NAMES
def test_a_frozen_server_of_a_process_that_is_killed_stops(name: str, tmp_path: Path) -> None:
    with owner(tmp_path, name) as owning:
        pid = owning.hear()[name]
        below = family(pid)
        os.kill(pid, signal.SIGSTOP)
        owning.kill()
        eventually(lambda: not any(runs(pid) for pid in below), deadline_s=PROCESS_S)


@NAMES
def test_sockets_among_the_temporary_files_go_with_a_process_that_is_killed(name: str, tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    with owner(directory, name) as owning:
        below = family(owning.hear()[name])
        sockets = (directory / name / "run").readlink()
        assert any(sockets.iterdir())
        owning.kill()
        eventually(lambda: not any(runs(pid) for pid in below), deadline_s=PROCESS_S)
        assert not sockets.exists()


@pytest.mark.parametrize("user", [NOBODY, NAMELESS])
def test_servers_run_for_an_ordinary_user_and_for_one_without_a_name(user: int, tmp_path: Path) -> None:
    needs_namespaces()
    with owner(tmp_path, DRAGONFLY, POSTGRES, preexec=as_user(user)) as owning:
        pids = owning.hear()
        for name, pid in pids.items():
            assert "\nCapEff:\t0000000000000000\n" in Path(f"/proc/{pid}/status").read_text()
            write(name, tmp_path / name / "service", "kept")
            assert read(name, tmp_path / name / "service") == "kept"
        owning.tell("stop")
        assert owning.hear() == "stopped"


def test_root_has_postgres_run_without_rights_and_its_data_stay_roots(servers: Servers, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("this is not root")
    needs_namespaces()
    tmp_path.chmod(0o700)
    server = servers.postgres(tmp_path)
    server.start()
    assert "\nCapEff:\t0000000000000000\n" in Path(f"/proc/{server.pid}/status").read_text()
    server.stop()
    assert {path.stat().st_uid for path in (tmp_path / POSTGRES).rglob("*")} == {0}


def test_root_has_postgres_run_as_nobody_where_namespaces_are_forbidden(servers: Servers, tmp_path: Path) -> None:
    around = without_namespaces(tmp_path / "root")
    directory = tmp_path / "pool"
    directory.mkdir(mode=0o700)
    with owner(directory, POSTGRES, around=around) as owning:
        status = Path(f"/proc/{owning.hear()[POSTGRES]}/status").read_text()
        assert f"\nUid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}\n" in status
        assert "\nCapEff:\t0000000000000002\n" in status  # DAC_OVERRIDE: to reach its files in a closed directory
        assert "\nGroups:\t \n" in status
        write(POSTGRES, directory / POSTGRES / "service", "kept")
        owning.tell("stop")
        assert owning.hear() == "stopped"
    assert (directory / POSTGRES / "data").stat().st_uid == NOBODY
    server = servers.postgres(directory)  # in a namespace again: the data become root's
    server.start()
    assert read(POSTGRES, server.folder) == "kept"
    assert (directory / POSTGRES / "data").stat().st_uid == 0


def test_root_who_may_be_nobody_else_is_told_to_run_the_pool_as_a_user(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("only root, with util-linux, can give its rights up")
    done = subprocess.run(
        [
            setpriv,
            "--bounding-set=-all",
            "--inh-caps=-all",
            sys.executable,
            "-m",
            "tests.local.owner",
            tmp_path,
            POSTGRES,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "LocalServerError: the server postgres" in done.stderr
    assert "run the pool as an ordinary user" in done.stderr

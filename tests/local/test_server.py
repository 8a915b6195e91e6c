"""What holds for each server on this machine, whatever its product."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from kvpool.local import LocalServer, LocalServerError
from kvpool.local.sockets import PATH_LIMIT_BYTES
from tests.footprint import footprint, holds_no_more_than
from tests.local.clients import read, write
from tests.local.conftest import DRAGONFLY, POSTGRES, Servers
from tests.local.servers import runs
from tests.waiting import PROCESS_S, eventually

NAMES = pytest.mark.parametrize("name", [DRAGONFLY, POSTGRES])


def guard_of(server: LocalServer) -> psutil.Process:
    guard = psutil.Process(server.pid).parent()
    assert guard is not None
    return guard


def tree_of(server: LocalServer) -> list[int]:
    """The guard and all below it."""
    guard = guard_of(server)
    return [guard.pid, *(child.pid for child in guard.children(recursive=True))]


@NAMES
def test_a_second_run_finds_the_data_of_the_first(name: str, servers: Servers, tmp_path: Path) -> None:
    first = servers.named(name, tmp_path)
    first.start()
    write(name, first.folder, "kept")
    first.stop()
    second = servers.named(name, tmp_path)
    second.start()
    assert read(name, second.folder) == "kept"


@NAMES
def test_a_server_that_is_stopped_leaves_no_process_and_no_descriptor(
    name: str, servers: Servers, tmp_path: Path
) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    server.stop()
    others = psutil.Process().children()  # of servers that other tests share
    before = footprint()
    for _ in range(3):
        server.start()
        below = tree_of(server)
        server.stop()
        assert not any(runs(pid) for pid in below)
        assert psutil.Process().children() == others
    holds_no_more_than(before)


@NAMES
def test_starting_what_runs_and_stopping_what_does_not_change_nothing(
    name: str, servers: Servers, tmp_path: Path
) -> None:
    server = servers.named(name, tmp_path)
    server.stop()
    assert not server.alive
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()
    assert server.pid is None


@NAMES
def test_a_server_that_was_killed_is_noticed_and_can_be_started_again(
    name: str, servers: Servers, tmp_path: Path
) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    url = (server.folder / "url").read_text()
    write(name, server.folder, "kept")
    if name == DRAGONFLY:
        server.restart()  # Redis has it from when it saved last
    pid = server.pid
    assert pid is not None
    below = tree_of(server)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not server.alive, deadline_s=PROCESS_S)
    server.restart()
    assert server.pid != pid
    assert read(name, server.folder) == "kept"
    assert (server.folder / "url").read_text() == url
    eventually(lambda: not any(runs(old) for old in below), deadline_s=PROCESS_S)


@NAMES
def test_a_server_that_hangs_is_stopped_all_the_same(name: str, servers: Servers, tmp_path: Path) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert server.alive
    server.stop()
    assert not runs(pid)


@NAMES
def test_a_server_whose_guard_is_killed_stops_and_saves_its_data(name: str, servers: Servers, tmp_path: Path) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    write(name, server.folder, "kept")
    pid = server.pid
    assert pid is not None
    guard_of(server).kill()
    eventually(lambda: not server.alive, deadline_s=PROCESS_S)
    server.restart()  # waits for the old one, which may still be saving
    assert not runs(pid)
    assert read(name, server.folder) == "kept"


@NAMES
def test_a_server_that_hangs_and_has_no_guard_is_stopped_all_the_same(
    name: str, servers: Servers, tmp_path: Path
) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    pid, guard = server.pid, guard_of(server)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    guard.kill()
    server.stop()
    assert not runs(pid)


@NAMES
def test_two_pools_have_two_servers(name: str, servers: Servers, tmp_path: Path) -> None:
    for directory in ("one", "other"):
        (tmp_path / directory / name).mkdir(parents=True)  # so that each makes its first files itself
    one, other = servers.named(name, tmp_path / "one"), servers.named(name, tmp_path / "other")
    one.start()
    other.start()
    write(name, one.folder, "of one")
    write(name, other.folder, "of the other")
    assert (read(name, one.folder), read(name, other.folder)) == ("of one", "of the other")
    assert (one.folder / "password").read_text() != (other.folder / "password").read_text()
    one.stop()
    assert other.alive
    assert read(name, other.folder) == "of the other"


def test_both_servers_of_a_pool_can_be_started_at_once(servers: Servers, tmp_path: Path) -> None:
    both = [servers.redis(tmp_path), servers.postgres(tmp_path)]
    with ThreadPoolExecutor() as threads:  # they end while the servers go on
        list(threads.map(LocalServer.start, both))
    assert [server.alive for server in both] == [True, True]
    for server in both:
        write(server.name, server.folder, "kept")
        assert read(server.name, server.folder) == "kept"


@NAMES
@pytest.mark.parametrize("odd", ["long" * 50, "with, a 'comma' and \"quotes\" \\ of % all # kinds", "ünï"])
def test_a_directory_may_have_a_long_or_an_odd_path(name: str, odd: str, servers: Servers, tmp_path: Path) -> None:
    directory = tmp_path / odd
    first = servers.named(name, directory)
    first.start()
    write(name, first.folder, "kept")
    sockets = (directory / name / "run").readlink()
    assert len(str(sockets)) < PATH_LIMIT_BYTES
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    first.stop()
    assert not sockets.exists()
    second = servers.named(name, directory)
    second.start()
    assert read(name, second.folder) == "kept"


def test_a_directory_may_be_moved_to_a_long_path_and_back(servers: Servers, tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / ("long" * 50)
    server = servers.redis(short)
    server.start()
    write(DRAGONFLY, server.folder, "kept")
    server.stop()
    short.rename(long)
    moved = servers.redis(long)
    moved.start()
    assert read(DRAGONFLY, moved.folder) == "kept"
    moved.stop()
    long.rename(short)
    server.start()
    assert read(DRAGONFLY, server.folder) == "kept"


def test_a_copy_of_a_directory_does_not_meet_the_original(servers: Servers, tmp_path: Path) -> None:
    original, copy = tmp_path / ("long" * 50), tmp_path / ("copy" * 50)
    server = servers.redis(original)
    server.start()
    write(DRAGONFLY, server.folder, "of the original")
    shutil.copytree(original, copy, symlinks=True)
    other = servers.redis(copy)
    other.start()
    write(DRAGONFLY, other.folder, "of the copy")
    assert read(DRAGONFLY, server.folder) == "of the original"
    other.stop()
    assert read(DRAGONFLY, server.folder) == "of the original"


@NAMES
def test_a_password_that_a_person_chose_is_used(name: str, servers: Servers, tmp_path: Path) -> None:
    (tmp_path / name / "service").mkdir(parents=True)
    (tmp_path / name / "service" / "password").write_text("as editors end it\n")
    server = servers.named(name, tmp_path)
    server.start()
    write(name, server.folder, "kept")
    assert read(name, server.folder) == "kept"


@NAMES
def test_nobody_else_can_read_anything(name: str, servers: Servers, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(mode=0o755)
    server = servers.named(name, tmp_path)
    umask = os.umask(0)
    try:
        server.start()
    finally:
        os.umask(umask)
    home = tmp_path / name
    paths = [home, *(home / file for file in ("LOCK", "service", "data", "run", "server.conf", "server.log"))]
    paths += [*server.folder.iterdir(), *(home / "run").iterdir()]
    assert {path.name for path in server.folder.iterdir()} == {"url", "username", "password"}
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@NAMES
def test_the_password_is_in_no_command_line_no_environment_and_no_log(
    name: str, servers: Servers, tmp_path: Path
) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    password = (server.folder / "password").read_bytes()
    assert len(password) >= 32
    for pid in tree_of(server):
        with suppress(FileNotFoundError, ProcessLookupError):  # some of PostgreSQL's come and go
            assert password not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert password not in Path(f"/proc/{pid}/environ").read_bytes()
    server.stop()
    for log in (tmp_path / name).glob("server.log*"):
        assert password not in log.read_bytes()


@NAMES
def test_a_server_has_no_open_port(name: str, servers: Servers, tmp_path: Path) -> None:
    server = servers.named(name, tmp_path)
    server.start()
    for pid in tree_of(server):
        with suppress(psutil.NoSuchProcess):  # some of PostgreSQL's come and go
            assert not psutil.Process(pid).net_connections("inet")


@NAMES
def test_a_start_without_time_fails_and_leaves_nothing_running(name: str, servers: Servers, tmp_path: Path) -> None:
    server = servers.named(name, tmp_path)
    others = psutil.Process().children()
    with pytest.raises(LocalServerError, match="did not start"):
        server.start(0.0)
    assert not server.alive
    assert psutil.Process().children() == others
    server.start()
    assert server.alive


@NAMES
def test_a_start_waits_for_the_server_that_still_stops(name: str, servers: Servers, tmp_path: Path) -> None:
    old, new = servers.named(name, tmp_path), servers.named(name, tmp_path)
    old.start()
    write(name, old.folder, "kept")
    with pytest.raises(LocalServerError, match=f"in use by process {old.pid}"):
        new.start(0.2)
    assert old.alive
    with ThreadPoolExecutor() as threads:
        starting = threads.submit(new.start)
        old.stop()
        starting.result()
    assert read(name, new.folder) == "kept"


@NAMES
def test_a_directory_that_cannot_be_used_is_an_error_that_names_it(name: str, servers: Servers, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a file")
    with pytest.raises(LocalServerError, match=str(tmp_path / name)):
        servers.named(name, tmp_path).start()


@NAMES
def test_the_version_is_told(name: str, servers: Servers, tmp_path: Path) -> None:
    product, _, version = servers.named(name, tmp_path).version.partition(" ")
    assert product in ({"dragonfly", "valkey", "redis"} if name == DRAGONFLY else {"postgres"})
    assert version[0].isdigit()


def test_a_guard_starts_within_a_tenth_of_a_second_when_the_machine_is_not_busy(
    servers: Servers, tmp_path: Path
) -> None:
    server = servers.redis(tmp_path)
    fastest_s = float("inf")
    for _ in range(5):
        began = time.monotonic()
        server.start()
        fastest_s = min(fastest_s, time.monotonic() - began)
        server.stop()
    assert fastest_s < 0.5  # guard and server together, on a machine that others use too

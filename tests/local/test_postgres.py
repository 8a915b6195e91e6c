"""What holds for the server of the database tier."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psycopg
import pytest

from kvpool.local import LocalServerError, local_postgres
from kvpool.local.log_file import LIMIT_BYTES
from kvpool.local.programs import find_postgres
from tests.local.clients import postgres_client, read, write
from tests.local.conftest import POSTGRES, Servers
from tests.waiting import PROCESS_S, eventually


def test_what_was_committed_survives_that_the_server_is_killed(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    server.start()
    with postgres_client(server.folder) as connection:
        connection.execute("CREATE TABLE numbers (n int)")
        for number in range(100):
            connection.execute("INSERT INTO numbers VALUES (%s)", [number])
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not server.alive, deadline_s=PROCESS_S)
    server.start()
    with postgres_client(server.folder) as connection:
        assert connection.execute("SELECT count(*) FROM numbers").fetchone() == (100,)


def test_a_file_that_names_another_process_does_not_hinder_the_start(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    server.start()
    write(POSTGRES, server.folder, "kept")
    home = tmp_path / POSTGRES
    stale = (home / "data" / "postmaster.pid").read_text()
    server.stop()
    sleep = shutil.which("sleep")
    assert sleep is not None
    with subprocess.Popen([sleep, "1000"]) as other:
        try:
            lines = [str(other.pid), *stale.splitlines()[1:]]
            (home / "data" / "postmaster.pid").write_text("\n".join(lines) + "\n")
            (home / "run" / ".s.PGSQL.5432.lock").write_text("\n".join(lines) + "\n")
            (home / "run" / ".s.PGSQL.5432").write_text("")
            server.start()
            assert read(POSTGRES, server.folder) == "kept"
        finally:
            other.kill()


def test_making_the_first_files_is_begun_again_where_it_was_cut_short(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    unfinished = tmp_path / POSTGRES / "data.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    server.start()
    assert not unfinished.exists()
    assert server.alive


def test_a_start_that_fails_quotes_the_end_of_the_log(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    server.start()
    server.stop()
    (tmp_path / POSTGRES / "data" / "global" / "pg_control").unlink()
    with pytest.raises(LocalServerError, match=r"(?s)did not start.*server\.log.*could not open file.*pg_control"):
        server.start()
    assert not server.alive


def test_files_that_cannot_be_made_are_an_error_that_quotes_initdb(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / POSTGRES / "service").mkdir(parents=True)
    (tmp_path / POSTGRES / "service" / "password").write_text("")
    server = servers.postgres(tmp_path)
    with pytest.raises(LocalServerError, match=r"(?s)initdb ended with status 1.*password file .* is empty"):
        server.start()
    (server.folder / "password").write_text("now there is one")
    server.start()
    assert server.alive


def test_a_lost_password_is_an_error_that_says_what_to_do(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    server.start()
    write(POSTGRES, server.folder, "kept")
    server.stop()
    password = (server.folder / "password").read_text()
    (server.folder / "password").unlink()
    with pytest.raises(LocalServerError, match="put the right one there"):
        server.start()
    assert not server.alive
    (server.folder / "password").write_text(password)
    server.start()
    assert read(POSTGRES, server.folder) == "kept"


def test_data_of_a_version_that_is_not_there_are_left_alone(tmp_path: Path) -> None:
    data = tmp_path / POSTGRES / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(LocalServerError, match=r"PostgreSQL 9, which wrote the data.*Found, but of no use"):
        local_postgres(tmp_path, connections=5)


@pytest.mark.parametrize("major", [14, 15, 16, 17])
def test_older_servers_are_used_for_the_data_that_they_wrote(major: int, servers: Servers, tmp_path: Path) -> None:
    try:
        program = find_postgres(major)
    except LocalServerError as error:
        pytest.skip(str(error))
    (tmp_path / POSTGRES / "data").mkdir(parents=True)
    (tmp_path / POSTGRES / "data" / "PG_VERSION").write_text(f"{major}\n")
    server = servers.postgres(tmp_path)
    shutil.rmtree(tmp_path / POSTGRES / "data")
    server.start()
    assert server.version == f"postgres {program.version}"
    write(POSTGRES, server.folder, "kept")
    server.stop()
    again = servers.postgres(tmp_path)
    again.start()
    assert again.version == server.version
    assert read(POSTGRES, again.folder) == "kept"


def test_nobody_is_served_without_the_password(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    server.start()
    url = (server.folder / "url").read_text()
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(url, user="kvpool", passfile="/dev/null")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url, user="kvpool", password="wrong")  # noqa: S106


def test_as_many_connections_as_asked_for_are_served(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path, connections=3)
    server.start()
    server.stop()
    wider = servers.postgres(tmp_path, connections=30)
    wider.start()
    with postgres_client(wider.folder) as first:
        others = [psycopg.connect(_conninfo(wider.folder)) for _ in range(29)]
        assert first.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = 'kvpool'").fetchone() == (30,)
        for connection in others:
            connection.close()


def test_the_log_is_bounded_and_quotes_no_rows(servers: Servers, tmp_path: Path) -> None:
    server = servers.postgres(tmp_path)
    server.start()
    with postgres_client(server.folder) as connection:
        connection.execute("CREATE TABLE prompts (prompt text PRIMARY KEY)")
        connection.execute("INSERT INTO prompts VALUES (%s)", ["a secret prompt"])
        with pytest.raises(psycopg.errors.UniqueViolation):
            connection.execute("INSERT INTO prompts VALUES (%s)", ["a secret prompt"])
        for _ in range(60):
            with pytest.raises(psycopg.errors.DivisionByZero):
                connection.execute(f"SELECT 1 / 0 AS {'long' * 12}, '{'x' * 100_000}'")
    server.stop()
    logs = sorted(path.name for path in (tmp_path / POSTGRES).glob("server.log*"))
    assert logs == ["server.log", "server.log.1"]
    for name in logs:
        log = tmp_path / POSTGRES / name
        assert log.stat().st_size <= LIMIT_BYTES
        assert b"secret" not in log.read_bytes()


def _conninfo(folder: Path) -> str:
    return psycopg.conninfo.make_conninfo(
        (folder / "url").read_text(), user="kvpool", password=(folder / "password").read_text()
    )

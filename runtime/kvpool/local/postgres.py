"""The recipe of a PostgreSQL server, for the database tier's catalog: small, durable, on its unix socket only."""

import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import psycopg

from kvpool.local.errors import LocalServerError
from kvpool.local.place import Place, make_private, sync_directory, write_private
from kvpool.local.programs import Program, find_postgres
from kvpool.local.server import Command, LocalServer

DIRECTORY = "postgres"
DATABASE = "kvpool"
_USER = "kvpool"
_PORT = 5432
"""Only part of the socket's name."""
_RESERVE = 8
"""Connections beyond those of the tier: a person's psql, and the server's own reserve."""
_GRACE_S = 60.0
_REFUSAL = "password authentication failed"
"""What the server says of it; our settings keep it to English, and there is no code while connecting."""
_STATUS_LINE = 7
"""Of postmaster.pid, counted from 0."""


def local_postgres(directory: Path, *, connections: int) -> LocalServer:
    """A server for the database tier, with its files in `directory`/postgres, for so many connections at once.

    Raises `LocalServerError` where this machine has no such programs, or not of the version that wrote the files;
    nothing is started yet.
    """
    home = directory / DIRECTORY
    program = find_postgres(_major(home))
    return LocalServer(DIRECTORY, home, PostgresRecipe(program, connections))


class PostgresRecipe:
    """How it is run; see `server.Recipe`."""

    socket_name = f".s.PGSQL.{_PORT}.lock"
    """The longest of its names there."""
    username = _USER
    stop_signal = signal.SIGINT  # without waiting for clients to leave
    grace_s = _GRACE_S

    def __init__(self, program: Program, connections: int) -> None:
        self.program = program
        self._connections = connections

    def url(self, place: Place) -> str:
        """As libpq has it."""
        return f"postgresql:///{DATABASE}?host={place.sockets}"

    def prepare(self, place: Place) -> Command | None:
        """Write the settings. The first files are made beside, so that a start that was cut short is begun again."""
        write_private(place.settings, "".join(f"{name} = {value}\n" for name, value in self._settings(place).items()))
        unfinished = _unfinished(place)
        with suppress(FileNotFoundError):
            shutil.rmtree(unfinished)
        if place.data.exists():
            # It names a process that ended, for we hold the lock; but another may have its number by now.
            (place.data / "postmaster.pid").unlink(missing_ok=True)
            return None
        make_private(unfinished)
        initdb = self.program.path.parent / "initdb"
        return Command(
            [
                str(initdb),
                f"--pgdata={unfinished}",
                f"--username={_USER}",
                f"--pwfile={place.password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--no-locale",
                "--data-checksums",
                "--no-instructions",
            ],
            not_as_root=unfinished,
        )

    def prepared(self, place: Place) -> None:
        """The files are complete: they are the data now."""
        _unfinished(place).rename(place.data)
        sync_directory(place.home)

    def command(self, place: Place) -> Command:
        """With our settings in place of the file that initdb wrote."""
        words = [str(self.program.path), "-D", str(place.data), f"--config-file={place.settings}"]
        return Command(words, not_as_root=place.data)

    def answers(self, place: Place, timeout_s: float) -> bool:
        """Whether it takes connections; the first time the database is made."""
        if not _says_that_it_is_ready(place):
            return False
        try:
            with psycopg.connect(
                host=str(place.sockets),
                port=_PORT,
                user=_USER,
                password=place.secret,
                dbname="postgres",
                connect_timeout=max(1, int(timeout_s)),
                autocommit=True,
            ) as connection:
                if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone() is None:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
        except psycopg.OperationalError as error:
            if _REFUSAL in str(error):
                raise LocalServerError(
                    f"the password in {place.password} is not that of the data in {place.data}: "
                    f"put the right one there, or move {place.home} away to begin anew"
                ) from error
            return False
        except psycopg.Error as error:
            raise LocalServerError(f"the database {DATABASE} cannot be made in {place.data}: {error}") from error
        return True

    def set_data_aside(self, place: Place) -> bool:
        """Never: they are no cache."""
        return False

    def settle_data(self, place: Place, *, wanted: bool) -> None:
        """Nothing to do."""

    def _settings(self, place: Place) -> dict[str, str]:
        """What differs from PostgreSQL's own defaults, and what those could not be trusted to stay."""
        return {
            "listen_addresses": "''",
            "port": str(_PORT),
            "unix_socket_directories": f"'{place.sockets}'",
            "unix_socket_permissions": "0700",
            "password_encryption": "scram-sha-256",
            "max_connections": str(self._connections + _RESERVE),
            "shared_buffers": "128MB",
            "wal_buffers": "16MB",
            "fsync": "on",
            "synchronous_commit": "on",
            "wal_level": "minimal",  # nobody replicates
            "max_wal_senders": "0",
            "max_wal_size": "512MB",
            "autovacuum_naptime": "5s",  # records come and go: their room is wanted again soon
            "temp_file_limit": "1GB",
            "jit": "off",  # the catalog's queries are short
            "log_destination": "stderr",
            "logging_collector": "off",
            "log_line_prefix": "'%m [%p] '",
            "log_checkpoints": "off",
            "log_error_verbosity": "terse",  # details quote rows, and rows hold prompts
            "log_timezone": "'UTC'",
            "timezone": "'UTC'",
            "lc_messages": "'C'",
        }


def _unfinished(place: Place) -> Path:
    return place.home / "data.new"


def _says_that_it_is_ready(place: Place) -> bool:
    """Asking it would be an error in its log until then."""
    with suppress(FileNotFoundError):
        lines = (place.data / "postmaster.pid").read_text().splitlines()
        return len(lines) > _STATUS_LINE and lines[_STATUS_LINE].strip() == "ready"
    return False


def _major(home: Path) -> int | None:
    """The version that wrote the data; None where there are none."""
    with suppress(OSError):  # where it cannot be read, the start will say so
        match = re.match(r"\d+", (home / "data" / "PG_VERSION").read_text())
        return int(match[0]) if match else None
    return None

"""The recipe of a server with Redis's protocol, for the dragonfly tier: Dragonfly, Valkey or Redis.

What it holds is a cache. So it saves once, when it stops, and does that too when the pool was killed; a log of every
write (`appendonly`) would write each value to the disk twice over and stall the server while the disk is busy. An
hourly snapshot is for the case that the server itself is killed. A disk that is full costs the snapshot, not the
service. A snapshot that the server cannot read (a torn one, or of another product) is dropped: it begins empty.
"""

import hashlib
import os
import shutil
import signal
import socket
from contextlib import suppress
from pathlib import Path

from kvpool.local.errors import LocalServerError
from kvpool.local.place import Place, write_private
from kvpool.local.programs import DRAGONFLY_BYTES, Product, Program, find_redis
from kvpool.local.server import Command, LocalServer

DIRECTORY = "dragonfly"
_USER = "default"
_SNAPSHOT_S = 3600
_SAVED_BYTES_PER_S = 100 << 20
"""What a slow disk takes."""
_ANSWER_S = 1.0


def local_redis(directory: Path, *, memory_bytes: int) -> LocalServer:
    """A server for the dragonfly tier, with its files in `directory`/dragonfly and values of at most `memory_bytes`.

    Raises `LocalServerError` where this machine has no such program; nothing is started yet.
    """
    return LocalServer(DIRECTORY, directory / DIRECTORY, RedisRecipe(find_redis(memory_bytes), memory_bytes))


class RedisRecipe:
    """How these servers are run; see `server.Recipe`."""

    socket_name = "redis.sock"
    username = _USER
    stop_signal = signal.SIGTERM

    def __init__(self, program: Program, memory_bytes: int) -> None:
        self.program = program
        self.grace_s = 30.0 + memory_bytes / _SAVED_BYTES_PER_S
        self._memory_bytes = memory_bytes

    def url(self, place: Place) -> str:
        """As redis-py has it."""
        return f"unix://{place.sockets / self.socket_name}"

    def prepare(self, place: Place) -> None:
        """Write the settings; there are no first files to make."""
        if _aside(place).exists():  # a start was interrupted while it tried without
            self.settle_data(place, wanted=True)
        place.data.mkdir(mode=0o700, exist_ok=True)
        for unfinished in place.data.glob("temp-*.rdb"):  # of a server that was killed while it saved
            unfinished.unlink()
        dragonfly = self.program.product is Product.DRAGONFLY
        settings = self._flags(place) if dragonfly else self._directives(place)
        write_private(place.settings, "".join(f"{line}\n" for line in settings))

    def prepared(self, place: Place) -> None:
        """Nothing to do."""

    def command(self, place: Place) -> Command:
        """The password is in the file, not among the arguments, which everybody can read."""
        if self.program.product is Product.DRAGONFLY:
            return Command([str(self.program.path), f"--flagfile={place.settings}"])
        return Command([str(self.program.path), str(place.settings)])

    def answers(self, place: Place, timeout_s: float) -> bool:
        """Whether it knows the password and has read its data."""
        password = place.secret.encode()
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(min(timeout_s, _ANSWER_S))
            connection.connect(str(place.sockets / self.socket_name))
            connection.sendall(_request(b"AUTH", _USER.encode(), password) + _request(b"PING"))
            with connection.makefile("rb") as replies:
                known, ready = replies.readline(), replies.readline()
            if known.startswith((b"-WRONGPASS", b"-ERR")):
                raise LocalServerError(f"{self.program.path} does not take the password in {place.settings}")
            return known.startswith(b"+OK") and ready.startswith(b"+PONG")
        return False

    def set_data_aside(self, place: Place) -> bool:
        """Where there is a snapshot."""
        if not any(place.data.iterdir()):
            return False
        place.data.rename(_aside(place))
        place.data.mkdir(mode=0o700)
        return True

    def settle_data(self, place: Place, *, wanted: bool) -> None:
        """Bring the snapshot back, or remove it."""
        if wanted:
            shutil.rmtree(place.data)
            _aside(place).rename(place.data)
        else:
            shutil.rmtree(_aside(place))

    def _directives(self, place: Place) -> list[str]:
        """The settings of Redis and Valkey.

        When memory is full, what would expire first goes first. Each use of a block renews its time, a parent's at
        least as long as its child's: so that is the block used longest ago, and a child before its parent, without
        which it could not be matched. What has no time to live are no blocks, and few.
        """
        secret = hashlib.sha256(place.secret.encode()).hexdigest()
        return [
            "port 0",
            f"unixsocket {_quoted(place.sockets / self.socket_name)}",
            "unixsocketperm 700",
            f"user {_USER} reset on #{secret} ~* &* +@all",
            f"maxmemory {self._memory_bytes}",
            "maxmemory-policy volatile-ttl",
            "maxmemory-samples 10",
            f"dir {_quoted(place.data)}",
            "dbfilename dump.rdb",
            "appendonly no",
            f"save {_SNAPSHOT_S} 1",
            "stop-writes-on-bgsave-error no",
            "shutdown-on-sigterm save force",  # force: end even where the disk has no room for the snapshot
            "rdbcompression no",  # keys and values do not get smaller, it would only take time
            "daemonize no",
            'logfile ""',
            "always-show-logo no",
        ]

    def _flags(self, place: Place) -> list[str]:
        """The settings of Dragonfly. In cache mode it evicts by its own rules, which know no parents."""
        return [
            "--port=0",
            f"--unixsocket={place.sockets / self.socket_name}",
            "--unixsocketperm=700",
            f"--requirepass={place.secret}",
            f"--maxmemory={self._memory_bytes}",
            f"--proactor_threads={min(os.cpu_count() or 1, self._memory_bytes // DRAGONFLY_BYTES)}",
            "--cache_mode=true",
            f"--dir={place.data}",
            "--dbfilename=dump",
            "--snapshot_cron=0 * * * *",
            "--compression_mode=0",
            "--version_check=false",  # it would ask a server on the Internet
            "--logtostderr=true",
        ]


def _request(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _aside(place: Place) -> Path:
    return place.home / "data.aside"


def _quoted(path: Path) -> str:
    """A path as one word of Redis's settings, whatever is in it."""
    plain = (32 < byte < 127 and byte not in b'"\\' for byte in os.fsencode(path))
    words = zip(os.fsencode(path), plain, strict=True)
    return '"' + "".join(chr(byte) if is_plain else f"\\x{byte:02x}" for byte, is_plain in words) + '"'

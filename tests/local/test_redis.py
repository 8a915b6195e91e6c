"""What holds for the server of the dragonfly tier."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis

from kvpool.local.place import Place
from kvpool.local.programs import Product, Program
from kvpool.local.redis import RedisRecipe
from tests.local.clients import read, redis_client, write
from tests.local.conftest import DRAGONFLY, Servers
from tests.waiting import PROCESS_S, eventually

MIB = 1 << 20


def test_a_full_server_takes_more_and_gives_up_what_expires_first(servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path, memory_bytes=16 * MIB)
    server.start()
    with redis_client(server.folder) as client:
        client.set("for ever", "kept")
        for number in range(64):
            client.set(f"block {number}", bytes(MIB), ex=1000 + number)
        held = [number for number in range(64) if client.exists(f"block {number}")]
        assert 8 <= len(held) < 16
        assert sum(number >= 40 for number in held) >= len(held) - 2  # it looks at samples
        assert client.get("for ever") == b"kept"


def test_what_was_not_saved_when_the_server_was_killed_is_gone_and_it_serves_again(
    servers: Servers, tmp_path: Path
) -> None:
    server = servers.redis(tmp_path)
    server.start()
    write(DRAGONFLY, server.folder, "lost")
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not server.alive, deadline_s=PROCESS_S)
    server.start()
    assert read(DRAGONFLY, server.folder) is None


@pytest.mark.parametrize("damage", [b"REDIS9999", b"", b"anything but a snapshot"])
def test_a_snapshot_that_cannot_be_read_is_dropped(damage: bytes, servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path)
    server.start()
    write(DRAGONFLY, server.folder, "lost")
    server.stop()
    dump = tmp_path / DRAGONFLY / "data" / "dump.rdb"
    whole = dump.read_bytes()
    dump.write_bytes(damage or whole[: len(whole) // 2])
    server.start()
    write(DRAGONFLY, server.folder, "kept")
    server.restart()
    assert read(DRAGONFLY, server.folder) == "kept"
    assert sorted(path.name for path in (tmp_path / DRAGONFLY).glob("data*")) == ["data"]


def test_a_flipped_bit_in_a_snapshot_is_noticed(servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path)
    server.start()
    write(DRAGONFLY, server.folder, "k" * 1000)
    server.stop()
    dump = tmp_path / DRAGONFLY / "data" / "dump.rdb"
    flipped = bytearray(dump.read_bytes())
    flipped[flipped.index(b"kkkk") + 500] ^= 1
    dump.write_bytes(flipped)
    server.start()
    assert read(DRAGONFLY, server.folder) is None


def test_a_start_that_was_cut_short_without_data_finds_them_again(servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path)
    server.start()
    write(DRAGONFLY, server.folder, "kept")
    server.stop()
    home = tmp_path / DRAGONFLY
    (home / "data").rename(home / "data.aside")
    (home / "data").mkdir()
    server.start()
    assert read(DRAGONFLY, server.folder) == "kept"


def test_snapshots_that_a_killed_server_left_unfinished_are_removed(servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path)
    server.start()
    server.stop()
    unfinished = tmp_path / DRAGONFLY / "data" / "temp-123.rdb"
    unfinished.write_bytes(bytes(MIB))
    server.start()
    assert not unfinished.exists()


def test_nobody_is_served_without_the_password(servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path)
    server.start()
    url = (server.folder / "url").read_text()
    with redis.Redis.from_url(url) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    with redis.Redis.from_url(url, password="wrong") as client, pytest.raises(redis.AuthenticationError):  # noqa: S106
        client.ping()


def test_the_settings_follow_the_pools_configuration(servers: Servers, tmp_path: Path) -> None:
    server = servers.redis(tmp_path, memory_bytes=20 * MIB)
    server.start()
    server.stop()
    larger = servers.redis(tmp_path, memory_bytes=40 * MIB)
    larger.start()
    with redis_client(larger.folder) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(40 * MIB)}


def test_dragonfly_gets_no_port_its_memory_and_the_password_in_a_file(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path / "run")
    place.introduce("unix:///somewhere", "default")
    recipe = RedisRecipe(Program(Product.DRAGONFLY, Path("/usr/bin/dragonfly"), 1, "1.30.0"), 1 << 30)
    recipe.prepare(place)
    flags = dict(line.split("=", 1) for line in place.settings.read_text().splitlines())
    assert recipe.command(place).words == ["/usr/bin/dragonfly", f"--flagfile={place.settings}"]
    assert flags["--requirepass"] == place.password.read_text()
    assert (flags["--port"], flags["--maxmemory"], flags["--cache_mode"]) == ("0", str(1 << 30), "true")
    assert 1 <= int(flags["--proactor_threads"]) <= 4  # it wants 256 MiB for each

"""The servers that other tests stand on."""

from pathlib import Path

import psycopg
import redis

from kvpool.config.service import read_service
from tests.local.servers import postgres_database, postgres_folder, redis_folder, redis_server

__all__ = ["postgres_folder", "redis_folder"]


def test_the_shared_redis_answers_at_its_service_folder(redis_folder: Path) -> None:
    address = read_service(redis_folder, schemes=("unix",))
    with redis.Redis.from_url(address.url, username=address.username, password=address.password) as client:
        assert client.ping()


def test_a_database_of_ones_own_is_empty_and_gone_afterwards(postgres_folder: Path, tmp_path: Path) -> None:
    with postgres_database(postgres_folder, tmp_path) as folder:
        address = read_service(folder, schemes=("postgresql",))
        with psycopg.connect(address.url, user=address.username, password=address.password) as connection:
            assert connection.execute("SELECT count(*) FROM pg_stat_user_tables").fetchone() == (0,)


def test_a_private_server_can_be_killed_and_started_again(tmp_path: Path) -> None:
    with redis_server(tmp_path, memory_bytes=64 << 20) as server:
        server.kill()
        assert not server.alive
        server.start()
        assert server.alive

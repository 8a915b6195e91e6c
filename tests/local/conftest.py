"""Fixtures of the tests of servers on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.local import LocalServer, local_postgres, local_redis
from tests.local.servers import DEADLINE_S, lay_first_files, postgres_folder, redis_folder

__all__ = ["postgres_folder", "redis_folder"]

DRAGONFLY, POSTGRES = "dragonfly", "postgres"


class Servers:
    """Makes servers of a test, and stops them at its end."""

    def __init__(self) -> None:
        self._made: list[LocalServer] = []

    def redis(self, directory: Path, memory_bytes: int = 64 << 20) -> LocalServer:
        return self._noted(local_redis(directory, memory_bytes=memory_bytes))

    def postgres(self, directory: Path, connections: int = 5) -> LocalServer:
        lay_first_files(directory)
        return self._noted(local_postgres(directory, connections=connections))

    def named(self, name: str, directory: Path) -> LocalServer:
        return self.redis(directory) if name == DRAGONFLY else self.postgres(directory)

    def stop(self) -> None:
        for server in self._made:
            server.stop(DEADLINE_S)

    def _noted(self, server: LocalServer) -> LocalServer:
        self._made.append(server)
        return server


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.stop()

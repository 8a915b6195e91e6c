"""Servers for `managed` tiers on this machine: real ones, started and stopped with the pool.

    pool -> LocalServer -> guard (a process) -> the server, as the guard's child

`local_redis` and `local_postgres` find a program on this machine; `LocalServer.start` runs it in a directory of its
own below the pool's (`place` says what lies there) and describes it in a service folder, so that a tier reads it as it
reads any external service. Each has a unix socket that only this user can open, and a password all the same. When the
pool ends, by `stop`, by itself or by SIGKILL, the guard stops the server. Qdrant needs no server: it runs in the pool's
process, and keeps its files in `QDRANT_DIRECTORY`. How PostgreSQL runs where the pool is root's: `unprivileged`.

The names below are loaded when first used, for the guard imports this package too and must start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpool.local.errors import LocalServerError
    from kvpool.local.postgres import local_postgres
    from kvpool.local.redis import local_redis
    from kvpool.local.server import LocalServer

__all__ = ["QDRANT_DIRECTORY", "LocalServer", "LocalServerError", "local_postgres", "local_redis"]

QDRANT_DIRECTORY = "qdrant"
"""Beside the directories of the servers."""

_MODULE_OF = {
    "LocalServer": "kvpool.local.server",
    "LocalServerError": "kvpool.local.errors",
    "local_postgres": "kvpool.local.postgres",
    "local_redis": "kvpool.local.redis",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value

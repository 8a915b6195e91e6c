"""The servers that this process runs for its managed tiers: which they are, and their processes."""

from __future__ import annotations

from importlib.metadata import version
from typing import NamedTuple, Protocol, runtime_checkable

from kvpool.pool.engine import Engine

QDRANT, _EDGE_PACKAGE = "qdrant", "qdrant-edge-py"


class RunningServer(NamedTuple):
    """A server of ours. That it runs does not say that it answers."""

    name: str
    """`dragonfly`, `postgres` or `qdrant`."""
    version: str
    """The program and its version, as `redis 8.2.3`."""
    pid: int
    """Its first process."""


@runtime_checkable
class _HasProcess(Protocol):
    """What Qdrant's engine in a process of its own has, and a client of a server has not."""

    @property
    def pid(self) -> int | None: ...


def running_servers(engine: Engine) -> list[RunningServer]:
    """Those that run now, in the waterfall's order."""
    servers = [] if engine.remote is None else engine.remote.servers
    found = [RunningServer(server.name, server.version, pid) for server in servers if (pid := server.pid) is not None]
    vectors = None if engine.prompts is None else engine.prompts._vectors
    if isinstance(vectors, _HasProcess) and (pid := vectors.pid) is not None:
        found.append(RunningServer(QDRANT, f"{_EDGE_PACKAGE} {version(_EDGE_PACKAGE)}", pid))
    return found

"""What a server says of itself: which program it is, and its memory."""

from typing import NamedTuple

from kvpool.tiers.dragonfly.commands import ServerError, plain
from kvpool.tiers.dragonfly.faults import SurpriseError
from kvpool.tiers.dragonfly.patience import Patience
from kvpool.tiers.dragonfly.servers import Servers
from kvpool.tiers.dragonfly.sweeping import said

_INFO = [plain(b"", b"INFO", b"server"), plain(b"", b"INFO", b"memory")]


class ServerInfo(NamedTuple):
    """Bytes are those of all nodes together. `max_bytes` is 0 where the server sets itself no limit.

    What a user may not ask for (`INFO`, of its ACL) is 0 or `unknown`.
    """

    program: str
    """`redis`, `valkey`, `dragonfly` or `unknown`."""
    version: str
    used_bytes: int
    max_bytes: int
    nodes: int


def info_of_all(servers: Servers, patience: Patience) -> ServerInfo:
    """What the server, or all masters of a cluster, say. Raises `FaultError`."""
    fields: dict[str, str] = {}
    used = limit = 0
    masters = servers.topology(patience).masters
    for node in masters:
        fields = {}
        for answer in servers.ask_at(node, _INFO, patience, len(_INFO)):
            if isinstance(answer, bytes):
                fields |= _fields(answer.decode(errors="replace"))
            elif not (isinstance(answer, ServerError) and answer.code == "NOPERM"):
                raise SurpriseError(said(answer))
        used += _number(fields, "used_memory")
        limit += _number(fields, "maxmemory")
    program, version = _program(fields)
    return ServerInfo(program, version, used, limit, len(masters))


def _fields(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    return {name: value for name, colon, value in lines if colon}


def _number(fields: dict[str, str], name: str) -> int:
    text = fields.get(name, "").strip()
    return int(text) if text.isdigit() and len(text) < 20 else 0


def _program(fields: dict[str, str]) -> tuple[str, str]:
    for program in ("dragonfly", "valkey"):
        if version := fields.get(f"{program}_version"):
            return program, version
    version = fields.get("redis_version", "")
    return ("redis", version) if version else ("unknown", "unknown")

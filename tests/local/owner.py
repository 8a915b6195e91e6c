"""A process that owns servers until it is killed, interrupted or told to end. Run as `python -m tests.local.owner`.

Arguments: a directory, and `dragonfly`, `postgres` or both. It says in lines of JSON what happens; a line on its
standard input tells it what to do: `stop` the servers and end, `exit` without stopping them, `fork` a process that
inherits all it has and waits to be killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from kvpool.local import LocalServer, local_postgres, local_redis


def main(directory: Path, names: list[str]) -> None:
    servers = [_server(directory, name) for name in names]
    for server in servers:
        server.start()
    try:
        _say({server.name: server.pid for server in servers})
        while (word := sys.stdin.readline().strip()) == "fork":
            _fork()
        if word == "exit":
            return
    except KeyboardInterrupt:
        _say({"interrupted": {server.name: server.alive for server in servers}})
    for server in servers:
        server.stop()
    _say("stopped")


def _server(directory: Path, name: str) -> LocalServer:
    if name == "dragonfly":
        return local_redis(directory, memory_bytes=64 << 20)
    return local_postgres(directory, connections=5)


def _fork() -> None:
    child = os.fork()
    if child:
        _say({"forked": child})
        return
    signal.pause()  # the test ends it
    os._exit(0)


def _say(what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

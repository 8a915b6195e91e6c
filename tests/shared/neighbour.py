"""A pool in a process of its own. Run as `python -m tests.shared.neighbour`; imports no torch.

The arguments are its directory and, as JSON, its configuration. A line on standard input tells it what to do, and it
answers with a line on standard output when that is done: `store` and `serve`, each with the name of a model, a tenant,
the length and the seed of a prompt; `servers`, `close`, `flush`, `erase` with a tenant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kvpool.config import RuntimeConfig
from kvpool.pool.pool import Pool
from tests.pool.kv import DEADLINE_S, prompt, spec, store

from .pools import looked_up

_CODE = Path(__file__).parents[2]


class Neighbour:
    """The process, as the test sees it."""

    def __init__(self, directory: Path, config: RuntimeConfig) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.shared.neighbour", directory, config.model_dump_json(by_alias=True)],
            cwd=_CODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def tell(self, *words: Any) -> None:
        """Have it do something; it does what it was told in order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """What it answers next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the neighbour ended"
        return json.loads(line)

    def ask(self, *words: Any) -> Any:
        self.tell(*words)
        return self.hear()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Whatever it does now."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def neighbour(directory: Path, config: RuntimeConfig) -> Iterator[Neighbour]:
    """A process that has a pool of this configuration open; killed at the end, unless it was told to close."""
    process = Neighbour(directory, config)
    try:
        assert process.hear() == "open"
        yield process
    finally:
        process.end()


def main(directory: str, config: str) -> None:
    pool = Pool.open(RuntimeConfig.model_validate_json(config), directory=Path(directory))
    _say("open")
    for line in sys.stdin:
        match json.loads(line):
            case ["store", name, tenant, blocks, seed]:
                stored = store(pool.register(spec(name)), prompt(blocks, seed), tenant)
                _say([stored.stored, stored.already_there])
            case ["serve", name, tenant, blocks, seed]:
                served = looked_up(pool.register(spec(name)), prompt(blocks, seed), tenant)
                _say({tier.value: count for tier, count in served.items()})
            case ["flush"]:
                _say(pool.flush(DEADLINE_S))
            case ["erase", tenant]:
                _say(pool.erase(tenant=tenant).epoch)
            case ["mode"]:
                _say(pool.stats().mode)
            case ["servers"]:
                _say({server.name: server.pid for server in pool.local_servers()})
            case ["torch"]:
                _say("torch" in sys.modules)
            case ["close"]:
                pool.close()
                _say("closed")


def _say(what: Any) -> None:
    os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

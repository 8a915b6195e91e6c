"""Works on a pool until it is killed. Run as `python -m tests.pool.crashing`; imports no torch.

Each line on standard input is a `Job`; a process is forked for it, which says on standard output what it begins and
what it has done, one JSON list a line, until somebody kills it. So a kill costs no start of an interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool

from .kv import BLOCK_TOKENS, KIB, LAYOUT, Prompt, open_pool, prompt, spec

TINY = KVLayout(layers=1, kv_heads=1, head_size=4, dtype=Dtype.FLOAT16, block_tokens=BLOCK_TOKENS)
LAYOUTS = {"tiny": TINY, "small": LAYOUT}
TENANTS = ("acme", "other")
SSD_BYTES = 512 * KIB
PROMPTS = [
    prompt(2 + trunk, seed=trunk) + prompt(1 + tail % 4, seed=10 + tail) for trunk in range(3) for tail in range(10)
]


class Job(NamedTuple):
    """Where to work, and how often each tenant was erased. Those in `unsure` may have been erased once more."""

    directory: str
    seed: int
    erasures: dict[str, int]
    unsure: list[str]


def open_crashed(directory: Path) -> Pool:
    return open_pool(directory, ram=24 * LAYOUT.record_bytes, ssd=SSD_BYTES)


def salt(tenant: str, erasures: int) -> str:
    """Blocks that were stored before an erasure hold other bytes than those stored after it."""
    return f"{tenant}, erased {erasures} times"


def prefixes(tokens: list[int]) -> Iterator[tuple[int, ...]]:
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        yield tuple(tokens[:end])


def work(job: Job) -> None:
    random = Random(job.seed)
    erasures = dict(job.erasures)
    say("opening")
    pool = open_crashed(Path(job.directory))
    models = [pool.register(spec(name, layout=layout)) for name, layout in LAYOUTS.items()]
    for tenant in job.unsure:
        erase(pool, tenant, erasures)
    say("open")
    while True:
        tenant, model, tokens = random.choice(TENANTS), random.choice(models), random.choice(PROMPTS)
        match random.choices(["store", "load", "flush", "erase"], [60, 30, 6, 4])[0]:
            case "store":
                model.store(tokens, Prompt(model, tokens, salt(tenant, erasures[tenant])), tenant=tenant)
                say("stored")
            case "load":
                load(model, tokens, tenant, salt(tenant, erasures[tenant]))
                say("loaded")
            case "flush":
                pool.flush()
                say("flushed")
            case "erase":
                erase(pool, tenant, erasures)


def load(model: Model, tokens: list[int], tenant: str, salt: str) -> None:
    sink = Prompt(model, tokens, salt)
    with model.match(tokens, tenant=tenant) as lease:
        lease.load(sink)
    if sink.wrong:
        say("wrong", model.name, tenant, salt, sink.wrong)


def erase(pool: Pool, tenant: str, erasures: dict[str, int]) -> None:
    say("erasing", tenant)
    pool.erase(tenant=tenant)
    erasures[tenant] += 1
    say("erased", tenant)


def say(*what: Any) -> None:
    os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


def main() -> None:
    say("ready", "torch" in sys.modules)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            work(Job(*json.loads(line)))
        say("pid", child)
        os.waitpid(child, 0)
        say("dead")


if __name__ == "__main__":
    main()

"""kill -9 in the middle of stores, writes, reclaiming and erasures: what is found afterwards is right, or not there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import IO, Any

import pytest

from kvpool.pool.pool import Pool
from kvpool.tiers.tier import TierName

from .crashing import LAYOUTS, PROMPTS, SSD_BYTES, TENANTS, Job, open_crashed, prefixes, salt
from .kv import Prompt, check, check_chains_on_ssd, disk_usage, matched, spec


class Worker:
    """The process that forks the processes that are killed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._lines: IO[bytes] = _there(process.stdout)
        self._jobs: IO[bytes] = _there(process.stdin)
        ready, imported_torch = self.hear()
        assert ready == "ready"
        assert not imported_torch

    def run_and_kill(self, job: Job, after: int) -> Iterator[list[Any]]:
        """All that the job says until it is dead; it is killed once it has said `after` things."""
        self._jobs.write(json.dumps(job).encode() + b"\n")
        self._jobs.flush()
        pid, heard = None, list[list[Any]]()
        while True:
            said = self.hear()
            if said[0] == "dead":
                return
            if said[0] == "pid":
                pid = said[1]
            else:
                heard.append(said)
                yield said
            if pid is not None and len(heard) >= after:
                os.kill(pid, signal.SIGKILL)
                after = sys.maxsize

    def hear(self) -> list[Any]:
        line = self._lines.readline()
        assert line, "the worker has ended by itself"
        said: list[Any] = json.loads(line)
        return said


def _there(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


@pytest.fixture
def worker() -> Iterator[Worker]:
    command = [sys.executable, "-m", "tests.pool.crashing"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        yield Worker(process)
        process.communicate()


def test_after_each_of_many_kills_all_is_right_and_reachable(worker: Worker, quick_path: Path) -> None:
    kill_again_and_again(worker, quick_path, seed=1, kills=40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_after_each_of_hundreds_of_kills_all_is_right_and_reachable(
    worker: Worker, quick_path: Path, seed: int
) -> None:
    kill_again_and_again(worker, quick_path, seed=seed, kills=100)


def kill_again_and_again(worker: Worker, directory: Path, *, seed: int, kills: int) -> None:
    """The directory is never closed in an orderly way: it is examined in a copy after each kill."""
    random = Random(seed)
    crashed, copy = directory / "crashed", directory / "copy"
    erasures = dict.fromkeys(TENANTS, 0)
    unsure: list[str] = []
    found = 0
    for kill in range(kills):
        after = random.choice([0, 1, 2, 3, random.randint(4, 40), random.randint(40, 200)])
        job = Job(str(crashed), seed * 1000 + kill, erasures, unsure)
        for said in worker.run_and_kill(job, after):
            assert said[0] != "wrong", said
            if said[0] == "erasing":
                unsure = [*(tenant for tenant in unsure if tenant != said[1]), said[1]]
            elif said[0] == "erased":
                unsure = [tenant for tenant in unsure if tenant != said[1]]
                erasures = {**erasures, said[1]: erasures[said[1]] + 1}
        if not crashed.exists():
            continue
        shutil.copytree(crashed, copy)
        found += examine(copy, erasures)
        shutil.rmtree(copy)
    assert found > 10 * kills, "the test has something to lose"


def examine(directory: Path, erasures: dict[str, int]) -> int:
    """Open what a kill has left; the blocks that are found."""
    with open_crashed(directory) as pool:
        assert disk_usage(directory) <= SSD_BYTES
        assert pool.stats().mode == "normal"
        check(pool, leases=())
        check_chains_on_ssd(pool)
        found = pool.stats().tiers[TierName.SSD].blocks
        tier = pool._engine.store.tier
        assert tier is not None
        assert tier.stats().live_records == found, "what the tier holds, the index knows"
        assert reachable(pool) == found, "and every one of them can be matched"
        for model in pool.models():
            for tenant in TENANTS:
                for tokens in PROMPTS:
                    sink = Prompt(model, tokens, salt(tenant, erasures[tenant]))
                    with model.match(tokens, tenant=tenant) as lease:
                        assert lease.load(sink) == lease.tokens
                    assert sink.wrong == [], "neither damaged, nor from before an erasure"
        assert not pool.stats().tiers[TierName.SSD].corrupt
        check(pool, leases=())
    return found


def reachable(pool: Pool) -> int:
    """How many different blocks matches find."""
    found = set()
    for name, layout in LAYOUTS.items():
        model = pool.register(spec(name, layout=layout))
        for tenant in TENANTS:
            for tokens in PROMPTS:
                for prefix in list(prefixes(tokens))[: matched(model, tokens, tenant)]:
                    found.add((name, tenant, prefix))
    return len(found)


def test_a_pool_that_was_never_closed_is_found_again_as_it_was_flushed(tmp_path: Path) -> None:
    """A crash of the program, not of the machine: what was written is there, though nothing was sealed."""
    with open_crashed(tmp_path / "pool") as pool:
        model = pool.register(spec("small"))
        for tokens in PROMPTS[:4]:
            model.store(tokens, Prompt(model, tokens, salt("acme", 0)), tenant="acme")
        assert pool.flush(20)
        written = pool.stats().tiers[TierName.SSD].blocks
        shutil.copytree(tmp_path / "pool", tmp_path / "copy")
    assert examine(tmp_path / "copy", dict.fromkeys(TENANTS, 0)) == written > 0


def test_a_restart_says_what_it_kept_and_what_it_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open_crashed(tmp_path / "pool") as pool:
        model = pool.register(spec("small"))
        for tokens in PROMPTS[:4]:
            model.store(tokens, Prompt(model, tokens, salt("acme", 0)), tenant="acme")
        assert pool.flush(20)
        shutil.copytree(tmp_path / "pool", tmp_path / "copy")
        blocks = pool.stats().tiers[TierName.SSD].blocks
    with open_crashed(tmp_path / "copy") as pool:
        restored = pool.stats().restored
        assert (restored.blocks, dict(restored.dropped)) == (blocks, {})
        assert restored.seconds > 0
    assert any(f"{blocks} blocks" in record.getMessage() for record in caplog.records)

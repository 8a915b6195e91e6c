"""The bench of the waterfall: what it plays is what its pools count, and its servers end with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.bench.area import benchmarks_of
from kvpool.bench.engine.pools import BLOCK_TOKENS, KIB, MIB, layout_of
from kvpool.bench.sharing.workloads import Request, Text
from kvpool.bench.waterfall.memory import EngineNumbers
from kvpool.bench.waterfall.nodes import Nodes
from kvpool.bench.waterfall.playing import Played, play
from kvpool.cli.exits import ExitCode
from kvpool.tiers.tier import TierName
from tests.bench.test_rows import KEYS
from tests.cli.command import kvpool, started
from tests.local.servers import runs
from tests.waiting import PROCESS_S, eventually

PAYLOAD_BYTES = 16 * KIB
RECORD_BYTES = layout_of(PAYLOAD_BYTES).record_bytes


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def one_off(count: int, blocks: int) -> Iterator[Request]:
    text = Text(7)
    for _ in range(count):
        yield Request(text.of(blocks * BLOCK_TOKENS, blocks * BLOCK_TOKENS), b"", 0)


def test_what_is_played_is_what_the_pool_counts_by_tier(nodes: Nodes, tmp_path: Path) -> None:
    requests = list(one_off(8, 6))
    capacities = {TierName.RAM: 16 * RECORD_BYTES, TierName.DRAGONFLY: 16 * MIB}
    with nodes.opened(capacities, PAYLOAD_BYTES) as opened:
        played = play(opened, requests * 2, EngineNumbers(opened.model.layout, 8))
        stats = opened.pool.stats()
    assert (played.asked, played.stored) == (2 * 8 * 6, 8 * 6)
    assert played.served[TierName.DRAGONFLY] >= 8 * 6 - 16, "ram has the last ones at most"
    assert played.served.total() == 8 * 6
    assert played.served == {tier: one.loaded_blocks for tier, one in stats.tiers.items() if one.loaded_blocks}
    assert stats.shared[TierName.DRAGONFLY].sent_blocks >= 8 * 6
    assert played.hits == 50
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_written_again_and_again_takes_all_of_it(nodes: Nodes) -> None:
    capacities = {TierName.RAM: 32 * RECORD_BYTES, TierName.DATABASE: 64 * RECORD_BYTES}
    with nodes.opened(capacities, PAYLOAD_BYTES) as opened:
        play(opened, list(one_off(40, 8)), EngineNumbers(opened.model.layout, 8))
        shared = opened.pool.stats().shared[TierName.DATABASE]
    assert (shared.sent_blocks, dict(shared.dropped_blocks)) == (40 * 8, {})


def test_what_does_not_come_is_computed() -> None:
    played = Played(asked=10, loading_s=0.004)
    played.served[TierName.SSD] = 4
    assert played.hits == played.share(TierName.SSD) == 40
    assert played.seconds_per_served_block == pytest.approx(0.001)
    assert played.seconds_per_asked_block(BLOCK_TOKENS) == pytest.approx((0.004 + 6) / 10)


def test_a_source_gives_numbers_and_a_sink_leaves_them_alone() -> None:
    layout = layout_of(PAYLOAD_BYTES)
    memory, twin = EngineNumbers(layout, 2), EngineNumbers(layout, 2)
    one, other, again = (np.zeros(PAYLOAD_BYTES, np.uint8) for _ in range(3))
    for at, into in enumerate((one, other, again)):
        memory.write_block(at, np.zeros(PAYLOAD_BYTES, np.uint8))
        memory.read_block(at, into)
    assert not np.array_equal(one, other)
    assert np.array_equal(one, again)
    twin.read_block(0, again)
    assert np.array_equal(one, again), "every run has the same ones"


@pytest.mark.parametrize("name", [benchmark.name for benchmark in benchmarks_of("waterfall")])
def test_a_benchmark_prints_rows_of_the_documented_form_and_removes_its_files(tmp_path: Path, name: str) -> None:
    ended = kvpool("bench", "waterfall", "--only", name, "--quick", "--directory", tmp_path, "--json")
    assert ended.code == 0
    rows = ended.objects
    assert all(list(row) == KEYS for row in rows)
    unmeasured = [row["name"] for row in rows if row["value"] is None]  # where the file system has no O_DIRECT
    assert set(unmeasured) <= {"latency"}
    assert len({row["name"] for row in rows}) == len(rows)
    assert {row["name"].split(".")[0] for row in rows} == {name}
    assert list(tmp_path.iterdir()) == []


def test_terminating_it_ends_its_servers_and_leaves_no_files(tmp_path: Path) -> None:
    running = started("bench", "waterfall", "--only", "chat", "--quick", "--directory", tmp_path, "--json")
    eventually(lambda: bool(server_pids(tmp_path)), deadline_s=PROCESS_S)
    pids = server_pids(tmp_path)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == ExitCode.TERMINATED
    assert list(tmp_path.iterdir()) == []
    eventually(lambda: not any(map(runs, pids)), deadline_s=PROCESS_S)


def server_pids(directory: Path) -> list[int]:
    """Processes that have a file below this directory as an argument, other than the command itself."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.startswith(os.fsencode(directory) + b"/") for word in words):
                found.append(int(process.name))
    return found

"""How many connections there are, and that none is forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.blocks.record import CODEC_NONE
from kvpool.tiers.dragonfly import connections
from kvpool.tiers.tier import TierBusyError, TierUnavailableError
from tests.footprint import footprint, holds_no_more_than
from tests.tiers.dragonfly.servers import tcp_server, tier_of
from tests.tiers.keyed_conformance import chain, found_of, keys_of, put, tree_of
from tests.waiting import eventually

TREE = tree_of()


def ours(client: Any) -> int:
    """Connections to the server beside the client's own."""
    return len(client.client_list()) - 1


def test_there_are_never_more_connections_than_allowed_and_they_are_used_again(folder: Path, client: Any) -> None:
    eventually(lambda: ours(client) == 0, "those of other tests are gone")
    tier = tier_of(folder, connections=3)
    records = chain(200, 1 << 16)
    seen = []

    def move(at: int) -> None:
        put(tier, TREE, records[at : at + 5])
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in records[at : at + 5]]
        assert all(tier.get(TREE, [found_of(sealed) for sealed in records[at : at + 5]], buffers).done)

    with ThreadPoolExecutor(8) as pool:
        moves = [pool.submit(move, at) for at in range(0, 200, 5)]
        while not all(each.done() for each in moves):
            seen.append(ours(client))
        for each in moves:
            each.result()
    assert 1 <= max(seen) <= 3
    tier.close()
    eventually(lambda: ours(client) == 0, "all are closed")


def test_one_connection_is_used_for_all_calls_of_one_thread(folder: Path, client: Any) -> None:
    tier = tier_of(folder)
    before = client.info("stats")["total_connections_received"]
    for _ in range(20):
        put(tier, TREE, chain(3))
        tier.find(TREE, keys_of(chain(3)), [CODEC_NONE])
    assert client.info("stats")["total_connections_received"] == before + 1
    tier.close()


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    folder: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = tier_of(folder)
    put(tier, TREE, chain(1))
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    before = client.info("stats")["total_connections_received"]
    tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    assert client.info("stats")["total_connections_received"] == before + 1
    eventually(lambda: ours(client) == 1, "the old one is closed")
    tier.close()


def test_faults_leave_no_file_and_no_thread_behind(tmp_path: Path) -> None:
    with tcp_server(tmp_path) as server:
        before = footprint()
        tier = tier_of(server.folder, connections=4, budget_s=0.1)
        for _ in range(5):
            put(tier, TREE, chain(3))
            server.freeze()
            for _ in range(3):
                with pytest.raises(TierUnavailableError):
                    tier.find(TREE, keys_of(chain(3)), [CODEC_NONE])
            server.thaw()
            eventually(lambda: not _fails(tier), "the server goes on")
        server.kill()
        for _ in range(10):
            with pytest.raises(TierUnavailableError):
                tier.find(TREE, keys_of(chain(3)), [CODEC_NONE])
        tier.close()
        holds_no_more_than(before)


def _fails(tier: Any) -> bool:
    try:
        tier.find(TREE, keys_of(chain(3)), [CODEC_NONE])
    except TierUnavailableError:
        return True
    return False


def test_what_is_changed_live_counts_for_the_next_call(folder: Path, client: Any) -> None:
    tier = tier_of(folder, ttl_s=50.0)
    put(tier, TREE, chain(1))
    tier.ttl_s, tier.batch_size, tier.budget_s = 5000.0, 2, 1.0
    put(tier, TREE, chain(9))
    assert all(client.pttl(name) > 4_900_000 for name in client.keys("*"))
    tier.close()


def test_a_tier_may_be_made_while_its_server_is_away(tmp_path: Path) -> None:
    tier = tier_of(tmp_path / "no-service-yet")
    with pytest.raises(TierUnavailableError):
        tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    with tcp_server(tmp_path) as server:
        (tmp_path / "no-service-yet").symlink_to(server.folder)
        put(tier, TREE, chain(1))
    tier.close()


def test_who_finds_all_connections_in_use_is_told_so_and_no_fault_of_the_server(folder: Path) -> None:
    tier = tier_of(folder, connections=1, budget_s=0.05)
    with closing(tier.inquire(TREE, keys_of(chain(3)), [CODEC_NONE])) as first:
        with pytest.raises(TierBusyError, match="all 1 connections"):
            tier.find(TREE, keys_of(chain(3)), [CODEC_NONE])
        with pytest.raises(TierBusyError):
            tier.put(TREE, chain(1), [])
        assert first.answer() == [None] * 3
    assert tier.find(TREE, keys_of(chain(1)), [CODEC_NONE]) == [None]
    tier.close()

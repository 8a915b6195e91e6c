"""Servers that stall, die, come back empty or with another password, or have no room: the faults are real."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvpool.blocks.record import CODEC_NONE
from kvpool.config.service import ServiceAddress
from kvpool.tiers.dragonfly.tier import DragonflyTier
from kvpool.tiers.tier import Moved, TierUnavailableError
from tests.tiers.dragonfly.servers import PASSWORD, Between, RedisProcess, client_of, tcp_server, tier_at, tier_of
from tests.tiers.keyed_conformance import chain, found_of, holds, keys_of, put, tree_of
from tests.waiting import eventually

SHORT_S = 0.3
SLACK_S = 1.5
"""What a busy machine may add to a call that ends after its budget."""
PATTERN = 0x77
TREE = tree_of()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    with tcp_server(tmp_path) as server:
        yield server


@pytest.fixture
def tier(server: RedisProcess) -> Iterator[DragonflyTier]:
    tier = tier_of(server.folder)
    yield tier
    tier.close()


def is_up(tier: DragonflyTier) -> bool:
    try:
        tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    except TierUnavailableError:
        return False
    return True


# --- stalled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used_before", [True, False])
def test_a_call_to_a_stopped_server_ends_after_its_budget(
    server: RedisProcess, tier: DragonflyTier, used_before: bool
) -> None:
    records = chain(2)
    if used_before:
        put(tier, TREE, records)
    tier.budget_s = SHORT_S
    server.freeze()
    for call in (
        lambda: tier.find(TREE, keys_of(records), [CODEC_NONE]),
        lambda: tier.put(TREE, records, []),
        lambda: tier.get(TREE, [found_of(records[0])], [np.empty(records[0].record.nbytes, np.uint8)]),
        lambda: tier.touch(TREE, keys_of(records), [CODEC_NONE]),
        lambda: tier.erase(TREE.tenant, 1),
        tier.usage,
    ):
        began_s = time.monotonic()
        with pytest.raises(TierUnavailableError, match=r"nothing moved|no connection"):
            call()
        assert SHORT_S * 0.9 <= time.monotonic() - began_s < SHORT_S + SLACK_S
    server.thaw()
    eventually(lambda: is_up(tier), "a server that goes on is used again")
    assert holds(tier, TREE, records[0]) == used_before


def test_those_who_wait_for_a_connection_wait_no_longer_than_the_budget(server: RedisProcess) -> None:
    tier = tier_of(server.folder, connections=1, budget_s=SHORT_S)
    assert is_up(tier)
    server.freeze()
    began_s = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(lambda _: is_up(tier), range(4)))
    assert time.monotonic() - began_s < SHORT_S + SLACK_S
    server.thaw()
    eventually(lambda: is_up(tier), "the connection is free again")
    tier.close()


def test_bytes_that_come_after_the_deadline_change_nobodys_buffer(server: RedisProcess, tier: DragonflyTier) -> None:
    records = chain(8, 1 << 20)
    put(tier, TREE, records)
    tier.budget_s = SHORT_S
    buffers = [np.full(sealed.record.nbytes, PATTERN, np.uint8) for sealed in records]
    server.freeze()
    with pytest.raises(TierUnavailableError):
        tier.get(TREE, [found_of(sealed) for sealed in records], buffers)
    server.thaw()
    eventually(lambda: is_up(tier), "the server goes on")
    assert all((buffer == PATTERN).all() for buffer in buffers)
    assert all(holds(tier, TREE, sealed) for sealed in records)


def test_what_came_whole_before_the_deadline_counts_and_the_rest_stays_as_it_was(server: RedisProcess) -> None:
    records = chain(12, 1 << 20)
    part_bytes = 5 * records[0].record.nbytes + 100_000
    passed, go_on = [0], threading.Event()

    def answers(data: bytes) -> bytes:
        passed[0] += len(data)
        if passed[0] > part_bytes:
            go_on.wait(20)
        return data

    with Between(server.port, answers=answers) as between:
        tier = tier_at(lambda: ServiceAddress(url=f"redis://127.0.0.1:{between.port}", password=PASSWORD))
        put(tier, TREE, records)
        passed[0] = 0
        tier.budget_s = SHORT_S
        buffers = [np.full(sealed.record.nbytes, PATTERN, np.uint8) for sealed in records]
        moved = tier.get(TREE, [found_of(sealed) for sealed in records], buffers)
        whole = moved.done.index(False)
        assert 0 < whole <= 5
        assert moved == Moved([True] * whole + [False] * (12 - whole), moved.fault)
        assert "nothing moved" in moved.fault
        after = [buffer.copy() for buffer in buffers]
        go_on.set()
        eventually(lambda: is_up(tier), "the network goes on")
        assert all(np.array_equal(buffer, then) for buffer, then in zip(buffers, after, strict=True))
        assert all(np.array_equal(buffers[at], records[at].record) for at in range(whole))
        assert (buffers[-1] == PATTERN).all()
        tier.close()


def test_a_slow_server_that_makes_progress_is_waited_for(server: RedisProcess) -> None:
    records = chain(6, 1 << 20)

    def slow(data: bytes) -> bytes:
        threading.Event().wait(0.02)
        return data

    with Between(server.port, answers=slow) as between:
        tier = tier_at(lambda: ServiceAddress(url=f"redis://127.0.0.1:{between.port}", password=PASSWORD))
        put(tier, TREE, records)
        tier.budget_s = SHORT_S
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in records]
        began_s = time.monotonic()
        assert tier.get(TREE, [found_of(sealed) for sealed in records], buffers) == Moved([True] * 6)
        assert time.monotonic() - began_s > SHORT_S
        tier.close()


# --- dead, and back --------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_says_so_at_once(tmp_path: Path) -> None:
    server = RedisProcess(tmp_path / "never-started")
    tier = tier_of(server.folder)
    began_s = time.monotonic()
    with pytest.raises(TierUnavailableError, match="refused"):
        tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    assert time.monotonic() - began_s < SLACK_S
    tier.close()


def test_a_server_killed_with_writes_in_flight_is_out_and_then_used_again(server: RedisProcess) -> None:
    tier = tier_of(server.folder)
    taken = threading.Event()

    def store_until_it_fails(first: int) -> str:
        while True:
            records = chain(4, 1 << 20, first=first)
            first += 4
            try:
                moved = tier.put(TREE, records, [])
            except TierUnavailableError as error:
                return error.reason
            if moved.fault:
                return moved.fault
            taken.set()

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(store_until_it_fails, 10_000 * number) for number in range(3)]
        assert taken.wait(20)
        server.kill()
        assert all(writer.result(timeout=20) for writer in writers)
    assert not is_up(tier)
    server.start()
    records = chain(4)
    assert tier.find(TREE, keys_of(records), [CODEC_NONE]) == [None] * 4
    put(tier, TREE, records)
    assert all(holds(tier, TREE, sealed) for sealed in records)
    tier.close()


def test_a_server_that_came_back_empty_costs_nobody_an_error(server: RedisProcess) -> None:
    tier = tier_of(server.folder, connections=8)
    records = chain(40, 1 << 18)
    with ThreadPoolExecutor(8) as pool:  # so that several connections are idle afterwards
        for _ in range(4):
            list(pool.map(lambda at: put(tier, TREE, records[at : at + 5]), range(0, 40, 5)))
    server.kill()
    server.start()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda sealed: tier.find(TREE, [sealed.key], [CODEC_NONE]), records))
    assert found == [[None]] * 40
    put(tier, TREE, records)
    assert all(holds(tier, TREE, sealed) for sealed in records)
    tier.close()


def test_a_server_that_dies_in_the_middle_of_a_batch_has_delivered_what_came_whole(server: RedisProcess) -> None:
    records = chain(12, 1 << 20)
    passed = [0]

    def answers(data: bytes) -> bytes:
        passed[0] += len(data)
        if passed[0] > 3 * records[0].record.nbytes:
            raise ConnectionResetError
        return data

    with Between(server.port, answers=answers) as between:
        tier = tier_at(lambda: ServiceAddress(url=f"redis://127.0.0.1:{between.port}", password=PASSWORD))
        buffers = [np.full(sealed.record.nbytes, PATTERN, np.uint8) for sealed in records]
        with client_of(server.folder) as client:
            put(tier, TREE, records)
            assert client.dbsize() == 12
        passed[0] = 0
        moved = tier.get(TREE, [found_of(sealed) for sealed in records], buffers)
        assert moved.fault
        assert 0 < moved.done.count(True) < 12
        for sealed, buffer, came in zip(records, buffers, moved.done, strict=True):
            assert not came or np.array_equal(buffer, sealed.record)
        tier.close()


def test_a_connection_that_the_server_closed_meanwhile_is_replaced_once(
    server: RedisProcess, tier: DragonflyTier
) -> None:
    records = chain(3)
    with client_of(server.folder) as client:
        for _ in range(3):
            put(tier, TREE, records)
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert all(holds(tier, TREE, sealed) for sealed in records)


# --- passwords -------------------------------------------------------------------------------------------------------


def test_a_rotated_password_is_used_for_the_next_connection(server: RedisProcess, tier: DragonflyTier) -> None:
    records = chain(2)
    put(tier, TREE, records)
    with client_of(server.folder) as client:
        client.config_set("requirepass", "another-password")
        assert holds(tier, TREE, records[0])  # who is logged in stays so
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(TierUnavailableError, match="invalid username-password pair") as refused:
        tier.find(TREE, keys_of(records), [CODEC_NONE])
    assert PASSWORD not in str(refused.value)
    server.set_password("another-password")
    assert holds(tier, TREE, records[0])


def test_a_server_that_came_back_with_another_password_is_out_until_we_know_it(
    server: RedisProcess, tier: DragonflyTier
) -> None:
    assert is_up(tier)
    server.kill()
    server.set_password("another-password")
    server.start()
    folder_says = (server.folder / "password").read_text()
    (server.folder / "password").write_text(PASSWORD)
    with pytest.raises(TierUnavailableError) as refused:
        tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    assert PASSWORD not in str(refused.value)
    (server.folder / "password").write_text(folder_says)
    assert is_up(tier)


def test_a_server_that_wants_a_password_which_we_have_not_is_out(server: RedisProcess) -> None:
    tier = tier_at(lambda: ServiceAddress(url=f"redis://127.0.0.1:{server.port}"))
    with pytest.raises(TierUnavailableError, match=r"[Aa]uthentication"):
        tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    tier.close()


# --- no room ---------------------------------------------------------------------------------------------------------


def test_a_server_without_room_takes_what_fits_and_says_why_not_the_rest(tmp_path: Path) -> None:
    with tcp_server(tmp_path, "maxmemory 12mb", "maxmemory-policy noeviction") as server:
        tier = tier_of(server.folder)
        records = chain(64, 1 << 18)
        moved = tier.put(TREE, records, [])
        taken = moved.done.count(True)
        assert 0 < taken < 64
        assert "OOM" in moved.fault
        assert [holds(tier, TREE, sealed) for sealed in records] == moved.done
        assert tier.put(TREE, chain(1, 1 << 18, first=100), []).done == [False]
        tier.drop(TREE, [found_of(sealed) for sealed in records])
        put(tier, TREE, records[:4])
        tier.close()


def test_a_server_that_takes_no_writes_is_read_and_says_why_it_takes_none(
    server: RedisProcess, tier: DragonflyTier
) -> None:
    put(tier, TREE, chain(1))
    with client_of(server.folder) as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        client.config_set("replica-serve-stale-data", "yes")
        with pytest.raises(TierUnavailableError, match="READONLY"):
            tier.put(TREE, chain(1, first=5), [])
        with pytest.raises(TierUnavailableError, match="READONLY"):
            tier.touch(TREE, keys_of(chain(1)), [CODEC_NONE])
        assert holds(tier, TREE, chain(1)[0])
        client.execute_command("REPLICAOF", "NO", "ONE")
    assert is_up(tier)
    assert holds(tier, TREE, chain(1)[0])

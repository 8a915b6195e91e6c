"""Epochs that never decrease, changes that nobody misses, and nodes that confirm them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest

from kvpool.blocks.identity import ALL_TENANTS, TenantDigest
from kvpool.catalog import authority as authority_module
from kvpool.catalog.authority import Changes
from kvpool.tiers.tier import TierUnavailableError
from tests.catalog.connecting import DEADLINE_S, SLACK_S, Stopwatch, bare, frozen
from tests.catalog.payload_pool import OTHER_TENANT, TENANT, Database, database_of
from tests.local.servers import postgres_server
from tests.waiting import PROCESS_S, eventually

NODE, OTHER_NODE, OLD_NODE = UUID(int=1), UUID(int=2), UUID(int=3)


@pytest.fixture
def database(empty_database: Path) -> Iterator[Database]:
    with database_of(empty_database) as database:
        yield database


def tenant_of(number: int) -> TenantDigest:
    return TenantDigest(number.to_bytes(16, "big"))


def test_an_epoch_is_raised_and_never_decreases(database: Database) -> None:
    authority = database.authority()
    first = authority.raise_epoch(TENANT, 5)
    assert first.epoch == 5
    assert authority.raise_epoch(TENANT, 3) == first
    assert authority.raise_epoch(TENANT, 5) == first
    second = authority.raise_epoch(TENANT, 9)
    assert second.epoch == 9
    assert second.sequence > first.sequence
    assert database.sql("select epoch from kvpool.tenants") == [(9,)]


def test_changes_since_a_number_are_those_after_it(database: Database) -> None:
    authority = database.authority()
    assert authority.changes_since(0) == Changes([], 0)
    one = authority.raise_epoch(TENANT, 1)
    authority.raise_epoch(OTHER_TENANT, 2)
    last = authority.raise_epoch(ALL_TENANTS, 7)
    everything = [(TENANT, 1), (OTHER_TENANT, 2), (ALL_TENANTS, 7)]
    assert authority.changes_since(0) == Changes(everything, last.sequence)
    assert authority.changes_since(one.sequence) == Changes(everything[1:], last.sequence)
    assert authority.changes_since(last.sequence) == Changes([], last.sequence)
    again = authority.raise_epoch(TENANT, 3)
    assert authority.changes_since(one.sequence) == Changes([*everything[1:], (TENANT, 3)], again.sequence)


def test_a_number_that_the_database_has_not_come_to_means_from_the_beginning(database: Database) -> None:
    authority = database.authority()
    raised = authority.raise_epoch(TENANT, 4)
    assert authority.changes_since(raised.sequence + 1_000) == Changes([(TENANT, 4)], raised.sequence)


def test_many_changes_come_whole(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority_module, "PAGE_ROWS", 7)
    authority = database.authority()
    for number in range(1, 24):
        last = authority.raise_epoch(tenant_of(number), number)
    changes = authority.changes_since(0)
    assert changes.epochs == [(tenant_of(number), number) for number in range(1, 24)]
    assert changes.sequence == last.sequence


def test_no_change_is_missed_however_many_commit_at_once(database: Database) -> None:
    database.authority().changes_since(0)
    stop = threading.Event()

    def follow() -> dict[TenantDigest, int]:
        reader = database.authority()
        known: dict[TenantDigest, int] = {}
        sequence = 0
        while True:
            last_look = stop.is_set()
            epochs, sequence = reader.changes_since(sequence)
            known.update(epochs)
            if last_look:
                return known

    def change(seed: int) -> None:
        writer = database.authority()
        for step in range(40):
            writer.raise_epoch(tenant_of((seed * 7 + step) % 12), step * 5 + seed)

    with ThreadPoolExecutor(8) as threads:
        followers = [threads.submit(follow) for _ in range(3)]
        changers = [threads.submit(change, seed) for seed in range(5)]
        try:
            for changer in changers:
                changer.result(DEADLINE_S)
        finally:
            stop.set()
        known = [follower.result(DEADLINE_S) for follower in followers]
    real = dict(database.sql("select tenant, epoch from kvpool.tenants"))
    assert len(real) == 12
    assert known == [real] * 3


def test_a_change_that_is_not_committed_yet_hides_no_later_one(database: Database) -> None:
    authority = database.authority()
    authority.changes_since(0)
    with bare(database.folder) as slow, ThreadPoolExecutor(1) as threads:
        with slow.transaction():
            slow.execute("select kvpool.raise_epoch(%b, 1)", (TENANT,))
            quick = threads.submit(authority.raise_epoch, OTHER_TENANT, 1)
            eventually(
                lambda: database.sql("select from pg_locks where locktype = 'advisory' and not granted") != [],
                deadline_s=PROCESS_S,
            )
            assert authority.changes_since(0) == Changes([], 0)
        quick.result(DEADLINE_S)
    assert [tenant for tenant, _ in authority.changes_since(0).epochs] == [TENANT, OTHER_TENANT]


def test_nodes_are_those_that_said_so_and_the_unconfirmed_are_named(database: Database) -> None:
    authority = database.authority()
    authority.heartbeat(NODE, "a-node", 5)
    authority.heartbeat(OTHER_NODE, "b-node", 9)
    assert [(node.node, node.name, node.confirmed) for node in authority.nodes()] == [
        (NODE, "a-node", 5),
        (OTHER_NODE, "b-node", 9),
    ]
    assert [node.name for node in authority.unconfirmed(9)] == ["a-node"]
    first = authority.nodes()[0]
    authority.heartbeat(NODE, "renamed", 9)
    [again] = [node for node in authority.nodes() if node.node == NODE]
    assert (again.name, again.started_at) == ("renamed", first.started_at)
    assert again.heartbeat_at > first.heartbeat_at
    assert authority.unconfirmed(9) == []


def test_nodes_that_are_silent_are_said_to_be_and_forgotten_after_a_time(database: Database) -> None:
    authority = database.authority(silent_after_s=60.0, removed_after_s=3600.0)
    for node, name in ((NODE, "lives"), (OTHER_NODE, "silent"), (OLD_NODE, "gone")):
        authority.heartbeat(node, name, 0)
    database.sql("update kvpool.nodes set heartbeat_at = now() - interval '5 minutes' where name = 'silent'")
    database.sql("update kvpool.nodes set heartbeat_at = now() - interval '2 hours' where name = 'gone'")
    authority.heartbeat(NODE, "lives", 0)
    assert [(node.name, node.silent) for node in authority.unconfirmed(1)] == [("lives", False), ("silent", True)]
    authority.heartbeat(OLD_NODE, "gone", 1)
    assert [node.name for node in authority.nodes()] == ["gone", "lives", "silent"]


def test_two_nodes_that_forget_the_same_silent_ones_do_not_wait_for_each_other(database: Database) -> None:
    authority = database.authority(removed_after_s=3600.0)
    authority.heartbeat(OLD_NODE, "gone", 0)
    database.sql("update kvpool.nodes set heartbeat_at = now() - interval '2 hours'")
    with bare(database.folder) as other, other.transaction():
        other.execute("select from kvpool.nodes where name = 'gone' for update")
        watch = Stopwatch()
        authority.heartbeat(NODE, "lives", 0)
        assert watch.seconds < SLACK_S


def test_an_authority_that_is_away_is_a_fault_within_the_budget(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server, database_of(server.folder) as database:
        authority = database.authority(budget_s=0.3)
        authority.raise_epoch(TENANT, 1)
        with frozen(server):
            for call in (lambda: authority.changes_since(0), lambda: authority.heartbeat(NODE, "a", 0)):
                watch = Stopwatch()
                with pytest.raises(TierUnavailableError, match="no answer"):
                    call()
                assert watch.seconds < 0.3 + SLACK_S
        assert authority.changes_since(0).epochs == [(TENANT, 1)]


def test_a_raised_epoch_is_there_after_the_server_was_killed(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server, database_of(server.folder) as database:
        authority = database.authority()
        for epoch in range(1, 6):
            raised = authority.raise_epoch(TENANT, epoch)
            server.kill()
            server.start()
            assert authority.changes_since(0) == Changes([(TENANT, epoch)], raised.sequence)

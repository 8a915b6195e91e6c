"""Records in PostgreSQL: limits, ages, counters, and faults of a real server."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.blocks.identity import ALL_TENANTS, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.record import Buffer
from kvpool.catalog import migrations, payloads
from kvpool.catalog.payloads import ALL_MODELS
from kvpool.tiers.tier import Found, KeyedTier, Moved, Sealed, TierName, TierUnavailableError, Usage
from tests.catalog.connecting import DEADLINE_S, SLACK_S, Stopwatch, bare, frozen, kill
from tests.catalog.payload_pool import (
    MIB,
    ONE_MODEL,
    OTHER_MODEL,
    OTHER_TENANT,
    OTHER_TREE,
    PAYLOAD_BYTES,
    RECORD_BYTES,
    TENANT,
    TREE,
    Database,
    database_of,
    found,
    holds,
    key_of,
    keys_of,
    read,
    sealed,
    sealed_many,
)
from tests.local.servers import postgres_server
from tests.tiers.conformance import record_of
from tests.waiting import PROCESS_S, eventually

BUDGET_S = 0.3


@pytest.fixture
def database(empty_database: Path) -> Iterator[Database]:
    with database_of(empty_database) as database:
        yield database


# --- what is put comes back ------------------------------------------------------------------------------------------


def test_it_is_the_database_tier(database: Database) -> None:
    tier: KeyedTier = database.tier(inline_bytes=5 * MIB)
    assert tier.name is TierName.DATABASE
    assert tier.put(TREE, [], []) == Moved([])
    assert tier.get(TREE, [], []) == Moved([])
    assert tier.find(TREE, [], [0]) == []
    tier.touch(TREE, [], [0])
    tier.drop(TREE, [])
    tier.put(TREE, [sealed(1)], [])
    assert tier.usage() == Usage(RECORD_BYTES, 5 * MIB)


@pytest.mark.parametrize("payload_bytes", [1, 4096, 60_000, MIB + 5])
def test_records_of_all_sizes_are_found_and_come_back_byte_by_byte(database: Database, payload_bytes: int) -> None:
    tier = database.tier()
    records = sealed_many(range(5), payload_bytes=payload_bytes)
    assert tier.put(TREE, records, []) == Moved([True] * 5)
    there = tier.find(TREE, keys_of([7, *range(5)]), [0])
    nbytes = records[0].record.nbytes
    assert there == [None, *(found(number, record_bytes=nbytes) for number in range(5))]
    for number, record in enumerate(records):
        came = read(tier, number, record_bytes=nbytes)
        assert came is not None
        assert np.array_equal(came, record.record)
    database.check()


def test_the_first_codec_that_is_there_is_found(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, [sealed(1, codec=0), sealed(2, codec=3)], [])
    tier.put(TREE, [sealed(1, codec=3)], [])
    assert tier.find(TREE, keys_of([1, 2]), [3, 0]) == [found(1, codec=3), found(2, codec=3)]
    assert tier.find(TREE, keys_of([1, 2]), [0, 3]) == [found(1, codec=0), found(2, codec=3)]
    assert tier.find(TREE, keys_of([1, 2]), [0]) == [found(1, codec=0), None]
    assert tier.find(TREE, keys_of([1, 2]), [9]) == [None, None]


def test_buffers_of_all_kinds_are_filled_and_others_are_left_alone(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, sealed_many([1, 2]), [])
    array = np.full(RECORD_BYTES, 0x55, np.uint8)
    nobodys = np.full(RECORD_BYTES, 0x55, np.uint8)
    buffers: list[Buffer] = [bytearray(RECORD_BYTES), nobodys, memoryview(bytearray(RECORD_BYTES)), array]
    moved = tier.get(TREE, [found(1), found(9), found(2), found(1)], buffers)
    assert moved == Moved([True, False, True, True])
    assert bytes(buffers[0]) == record_of(1, PAYLOAD_BYTES).tobytes() == array.tobytes()
    assert bytes(buffers[2]) == record_of(2, PAYLOAD_BYTES).tobytes()
    assert np.all(nobodys == 0x55)


def test_a_buffer_that_cannot_hold_the_record_is_a_programming_error(database: Database) -> None:
    tier = database.tier()
    for buffer in (bytearray(RECORD_BYTES - 1), bytes(RECORD_BYTES)):
        with pytest.raises(ValueError, match="a buffer for"):
            tier.get(TREE, [found(1)], [buffer])


def test_what_is_stored_twice_is_there_once(database: Database) -> None:
    one, two = database.tier(), database.tier()
    for tier in (one, two):
        assert tier.put(TREE, sealed_many(range(4)), []) == Moved([True] * 4)
    assert tier.put(TREE, [sealed(1), sealed(1)], []) == Moved([True] * 2)
    assert one.usage().used_bytes == 4 * RECORD_BYTES
    database.check()


def test_what_was_dropped_is_gone_and_dropping_it_again_does_nothing(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, [*sealed_many(range(4)), sealed(1, codec=2)], [])
    for _ in range(2):
        tier.drop(TREE, [found(1), found(3), found(9)])
        assert database.held() == {0, 1, 2}
        assert tier.find(TREE, keys_of([1]), [0, 2]) == [found(1, codec=2)]
        database.check()


def test_a_batch_of_several_transactions_arrives_whole(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "BATCH_BYTES", 3 * RECORD_BYTES)
    tier = database.tier()
    assert tier.put(TREE, sealed_many(range(10)), []) == Moved([True] * 10)
    assert database.held() == set(range(10))
    database.check()


# --- what cannot be a record, or is not what it was ------------------------------------------------------------------


def test_flipped_bytes_arrive_as_they_are_stored(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, [sealed(1)], [])
    database.sql("update kvpool.payloads set record = set_byte(record, 5000, 1 - (get_byte(record, 5000) & 1))")
    came = read(tier, 1)
    assert came is not None
    assert np.flatnonzero(came != record_of(1, PAYLOAD_BYTES)).tolist() == [5000]


def test_a_record_of_another_length_is_not_done_and_its_buffer_is_left_alone(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, [sealed(1)], [])
    database.sql("update kvpool.payloads set record = substr(record, 1, 8192)")
    assert read(tier, 1) is None
    assert tier.find(TREE, keys_of([1]), [0]) == [found(1, record_bytes=8192)]


def test_what_cannot_be_a_record_is_not_there(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, sealed_many([1, 2, 3]), [])
    database.sql("update kvpool.payloads set record = '' where key = %b", key_of(1))
    database.sql("update kvpool.payloads set record = 'short' where key = %b", key_of(2))
    database.sql("update kvpool.payloads set record = substr(record, 2) where key = %b", key_of(3))
    assert tier.find(TREE, keys_of([1, 2, 3]), [0]) == [None] * 3


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_record_above_the_largest_is_refused_and_the_others_are_taken(database: Database) -> None:
    tier = database.tier(inline_max_bytes=RECORD_BYTES)
    records = [sealed(1), sealed(2, payload_bytes=PAYLOAD_BYTES + 1), sealed(3)]
    assert tier.put(TREE, records, []) == Moved([True, False, True])
    assert tier.put(TREE, records[1:2], []) == Moved([False])
    assert database.held() == {1, 3}


def test_the_oldest_go_when_all_are_too_many(database: Database) -> None:
    evicted: list[Found] = []
    tier = database.tier(inline_bytes=10 * RECORD_BYTES, refresh_s=0.0, evicted=evicted.extend)
    for number in range(10):
        assert tier.put(TREE if number % 2 else OTHER_TREE, [sealed(number)], []).done == [True]
    assert holds(tier, 0), "it is used, and is not the oldest any more"
    assert evicted == []
    assert tier.put(TREE, sealed_many([20, 21, 22]), []).done == [True] * 3
    assert database.held() == {0, *range(4, 10), 20, 21, 22}
    assert evicted == [found(1), found(2), found(3)]
    database.check()


def test_a_model_above_its_own_limit_gives_up_its_own(database: Database) -> None:
    tier = database.tier()
    tier.set_limit(ONE_MODEL, 4 * RECORD_BYTES)
    tier.put(OTHER_TREE, sealed_many(range(100, 105)), [])
    for number in range(8):
        tier.put(TREE, [sealed(number)], [])
        database.check()
    assert database.held() == {4, 5, 6, 7, *range(100, 105)}


def test_the_last_blocks_of_a_prompt_go_before_its_first(database: Database) -> None:
    tier = database.tier(inline_bytes=8 * RECORD_BYTES)
    prompt = list(range(8))
    tier.put(TREE, sealed_many(prompt[:5]), [])
    tier.put(TREE, sealed_many(prompt[5:]), keys_of(prompt[:5]))
    order = database.sql("select key from kvpool.payloads order by used_at desc")
    assert [key for (key,) in order] == keys_of(prompt)
    tier.put(TREE, sealed_many([50, 51]), [])
    assert database.held() == {0, 1, 2, 3, 4, 5, 50, 51}


@pytest.mark.parametrize("refresh_s", [0.0, 60.0])
def test_ancestors_are_kept_at_least_as_long_as_what_is_stored_after_them(database: Database, refresh_s: float) -> None:
    tier = database.tier(inline_bytes=8 * RECORD_BYTES, refresh_s=refresh_s)
    tier.put(TREE, sealed_many([1, 2]), [])
    database.sql("update kvpool.payloads set used_at = used_at - interval '1 hour'")
    tier.put(TREE, sealed_many(range(10, 14)), [])
    tier.put(TREE, sealed_many([3, 4]), keys_of([1, 2]))
    [(oldest_ancestor,)] = database.sql("select min(used_at) from kvpool.payloads where key = any(%b)", keys_of([1, 2]))
    [(newest_child,)] = database.sql("select max(used_at) from kvpool.payloads where key = any(%b)", keys_of([3, 4]))
    assert oldest_ancestor >= newest_child
    tier.put(TREE, sealed_many([30, 31]), [])
    held = database.held()
    assert {30, 31} <= held
    assert (1 in held) >= (2 in held) >= (3 in held) >= (4 in held)


def test_touching_keeps_a_chain_and_reading_keeps_a_record(database: Database) -> None:
    tier = database.tier(inline_bytes=6 * RECORD_BYTES, refresh_s=60.0)
    tier.put(TREE, sealed_many(range(6)), [])
    database.sql("update kvpool.payloads set used_at = used_at - interval '1 hour'")
    tier.touch(TREE, keys_of([4, 5]), [0])
    assert holds(tier, 2)
    tier.put(TREE, sealed_many([10, 11, 12]), [])
    assert database.held() == {2, 4, 5, 10, 11, 12}


def test_reading_again_within_the_minute_writes_nothing(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, sealed_many(range(3)), [])
    before = database.sql("select xmin::text, used_at from kvpool.payloads order by key")
    for number in range(3):
        assert holds(tier, number)
    tier.touch(TREE, keys_of([0, 1, 2]), [0])
    tier.put(TREE, sealed_many(range(3)), [])
    assert database.sql("select xmin::text, used_at from kvpool.payloads order by key") == before


def test_what_finds_no_room_is_refused_from_there_on_and_evicts_nothing_of_its_own_prompt(database: Database) -> None:
    tier = database.tier(inline_bytes=5 * RECORD_BYTES)
    tier.put(TREE, sealed_many([1, 2]), [])
    assert tier.put(TREE, sealed_many(range(3, 13)), keys_of([1, 2])).done == [True] * 3 + [False] * 7
    assert database.held() == {1, 2, 3, 4, 5}
    tier.set_limit(OTHER_MODEL, 0)
    assert tier.put(OTHER_TREE, [sealed(50)], []) == Moved([False])
    assert database.held() == {1, 2, 3, 4, 5}
    database.check()


def test_a_lower_limit_is_brought_about_by_trimming(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "BATCH_BYTES", 3 * RECORD_BYTES)
    evicted: list[Found] = []
    tier = database.tier(evicted=evicted.extend)
    for number in range(20):
        tier.put(TREE, [sealed(number)], [])
    assert tier.trim() == 0
    tier.set_limit(ONE_MODEL, 12 * RECORD_BYTES)
    assert tier.trim() == 8
    tier.set_capacity(5 * RECORD_BYTES)
    assert tier.trim() == 7
    assert database.held() == set(range(15, 20))
    assert [it.key for it in evicted] == keys_of(range(15))
    tier.set_limit(ONE_MODEL, None)
    tier.trim()
    assert tier.used_bytes_by_model() == {
        ALL_MODELS: Usage(5 * RECORD_BYTES, 5 * RECORD_BYTES),
        ONE_MODEL: Usage(5 * RECORD_BYTES, 0),
    }
    database.check()


def test_a_much_lower_limit_is_brought_about_by_those_who_store(database: Database) -> None:
    tier = database.tier(inline_bytes=256 * MIB)
    for first in range(0, 80, 10):
        assert all(tier.put(TREE, sealed_many(range(first, first + 10), payload_bytes=MIB - 4096), []).done)
    tier.set_capacity(4 * MIB)
    assert tier.put(TREE, [sealed(1_000)], []).done == [False]
    for number in range(1_001, 1_012):
        tier.put(TREE, [sealed(number)], [])
    database.check()
    database.sql("vacuum kvpool.payloads")
    assert tier.put(TREE, [sealed(1_020)], []).done == [True]
    database.check()


def test_the_files_grow_to_little_more_than_the_limit_where_nobody_vacuums(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    tier = database.tier(inline_bytes=8 * MIB)
    tier.trim()
    database.sql("alter table kvpool.payloads set (autovacuum_enabled = off, toast.autovacuum_enabled = off)")
    size = "select pg_total_relation_size('kvpool.payloads')"

    def store_many() -> int:
        taken = 0
        for number in range(400):
            [done] = tier.put(TREE, [sealed(database.next_number(), payload_bytes=MIB - 4096)], []).done
            taken += done
            if number % 20 == 0:
                with tier._connected() as connection:
                    connection.execute("select pg_stat_force_next_flush()")
        return taken

    assert 8 < store_many() < 200
    assert len(caplog.records) == 1
    assert "vacuum" in caplog.text
    [(largest,)] = database.sql(size)
    assert largest < 200 * MIB
    for _ in range(2):
        database.sql("vacuum kvpool.payloads")
        assert store_many() > 8
        [(now,)] = database.sql(size)
        assert now < 1.2 * largest
    database.check()


def test_the_schema_may_take_longer_than_the_budget(database: Database) -> None:
    tier = database.tier(budget_s=BUDGET_S)
    with bare(database.folder) as other, ThreadPoolExecutor(1) as threads:
        with other.transaction():
            other.execute("select pg_advisory_xact_lock(%s)", (migrations._LOCK,))
            using = threads.submit(tier.usage)
            waiting = "select from pg_locks where locktype = 'advisory' and not granted and now() - waitstart > %s"
            eventually(lambda: database.sql(waiting, timedelta(seconds=2 * BUDGET_S)) != [], deadline_s=PROCESS_S)
        assert using.result(DEADLINE_S).used_bytes == 0


def test_limits_are_written_when_the_database_is_there(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server, database_of(server.folder) as database:
        server.stop()
        tier = database.tier(inline_bytes=3 * RECORD_BYTES)
        tier.set_limit(ONE_MODEL, 2 * RECORD_BYTES)
        with pytest.raises(TierUnavailableError):
            tier.put(TREE, sealed_many(range(3)), [])
        server.start()
        assert tier.put(TREE, sealed_many(range(3)), []).done == [True, True, False]
        assert tier.usage() == Usage(2 * RECORD_BYTES, 3 * RECORD_BYTES)


# --- erasing ---------------------------------------------------------------------------------------------------------


def test_erasing_removes_a_tenants_earlier_epochs_and_nothing_else(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payloads, "BATCH_BYTES", 2 * RECORD_BYTES)
    tier = database.tier()
    tier.put(TreeId(ONE_MODEL, TENANT, 1), sealed_many(range(5)), [])
    tier.put(TreeId(OTHER_MODEL, TENANT, 2), sealed_many(range(5, 10)), [])
    tier.put(TreeId(OTHER_MODEL, TENANT, 3), sealed_many(range(10, 15)), [])
    tier.put(TreeId(ONE_MODEL, OTHER_TENANT, 1), sealed_many(range(15, 20)), [])
    assert tier.erase(TENANT, 3) == 10
    assert database.held() == set(range(10, 20))
    assert tier.erase(TENANT, 3) == 0
    assert tier.forget_model(OTHER_MODEL) == 5
    assert database.held() == set(range(15, 20))
    database.check()


def test_a_record_of_an_erased_epoch_is_refused(database: Database) -> None:
    tier, authority = database.tier(), database.authority()
    authority.raise_epoch(TENANT, 4)
    assert tier.put(TREE, sealed_many(range(2)), []) == Moved([False] * 2)
    assert tier.put(TREE._replace(epoch=4), sealed_many(range(2)), []) == Moved([True] * 2)
    assert tier.put(OTHER_TREE, sealed_many(range(2, 4)), []) == Moved([True] * 2)
    authority.raise_epoch(ALL_TENANTS, 9)
    assert tier.put(OTHER_TREE, sealed_many(range(4, 6)), []) == Moved([False] * 2)
    database.check()


def test_erasing_leaves_nothing_of_writers_that_race_it(database: Database) -> None:
    authority, eraser = database.authority(), database.tier()
    eraser.trim()
    stop = threading.Event()
    epoch = 1

    def write(seed: int) -> None:
        tier = database.tier(size=1)
        number = seed * 1_000_000
        while not stop.is_set():
            tier.put(TreeId(ONE_MODEL, TENANT, epoch), sealed_many(range(number, number + 3)), [])
            number += 3

    with ThreadPoolExecutor(3) as threads:
        writers = [threads.submit(write, seed) for seed in range(3)]
        try:
            for _ in range(8):
                eventually(lambda: database.held() != set(), deadline_s=PROCESS_S)
                raised = authority.raise_epoch(TENANT, epoch + 1).epoch
                eraser.erase(TENANT, raised)
                assert database.sql("select from kvpool.payloads where epoch < %s", raised) == []
                epoch = raised
        finally:
            stop.set()
        for writer in writers:
            writer.result(DEADLINE_S)
    database.check()


def test_a_writer_that_is_about_to_commit_is_waited_for(database: Database) -> None:
    authority, tier = database.authority(), database.tier()
    tier.usage()
    with bare(database.folder) as writer, ThreadPoolExecutor(1) as threads:
        with writer.transaction():
            writer.execute("select kvpool.check_epoch(%b, 3)", (TENANT,))
            raising = threads.submit(authority.raise_epoch, TENANT, 4)
            eventually(
                lambda: database.sql("select from pg_locks where locktype = 'advisory' and not granted") != [],
                deadline_s=PROCESS_S,
            )
            assert not raising.done()
        assert raising.result(DEADLINE_S).epoch == 4


# --- large tables ----------------------------------------------------------------------------------------------------


def test_nothing_that_is_asked_reads_a_large_table_whole(database: Database) -> None:
    tier, authority = database.tier(inline_bytes=1 << 40, refresh_s=0.0, size=1), database.authority()
    tier.trim()
    with bare(database.folder) as other, other.transaction():
        other.execute(
            "insert into kvpool.payloads (key, codec, fingerprint, tenant, epoch, record, used_at) "
            "select decode(lpad(to_hex(n), 32, '0'), 'hex'), 0, "
            "decode(repeat(lpad(to_hex(n % 5), 2, '0'), 32), 'hex'), decode(lpad(to_hex(n % 50), 32, '0'), 'hex'), "
            "1, decode(repeat('00', 100), 'hex'), now() - n * interval '1 second' from generate_series(1, 100000) n"
        )
        other.execute(
            "select kvpool.count_payloads(array_agg(fingerprint), array_agg(nbytes::bigint)) from kvpool.payloads"
        )
        other.execute(
            "insert into kvpool.tenants (tenant, epoch, changed) "
            "select decode(lpad(to_hex(n), 32, '0'), 'hex'), 1, nextval('kvpool.epoch_changes') "
            "from generate_series(1000, 100000) n"
        )
    database.sql("analyze")

    def whole_reads() -> dict[str, int]:
        with tier._connected() as connection:
            connection.execute("select pg_stat_force_next_flush()")
        return dict(
            database.sql(
                "select relname, seq_scan from pg_stat_user_tables "
                "where schemaname = 'kvpool' and relname in ('payloads', 'tenants')"
            )
        )

    before = whole_reads()
    tree = TreeId(Fingerprint(bytes([1]) * 32), TenantDigest((7).to_bytes(16, "big")), 1)
    for attempt in range(8):  # statements are prepared, and their plans become generic, on the way
        numbers = range(200_000 + 10 * attempt, 200_005 + 10 * attempt)
        assert all(tier.put(tree, sealed_many(numbers), keys_of(range(1, 6))).done)
        tier.find(tree, keys_of(range(1, 300)), [0, 3])
        assert all(holds(tier, number) for number in numbers)
        tier.touch(tree, keys_of(range(1, 50)), [0])
        tier.drop(tree, [found(number) for number in numbers[:2]])
        used_bytes = tier.usage().used_bytes
        tier.set_capacity(used_bytes - RECORD_BYTES)
        tier.set_limit(tree.fingerprint, used_bytes // 8)
        assert tier.trim() > 0
        tier.set_capacity(1 << 40)
        tier.set_limit(tree.fingerprint, None)
        tier.erase(TenantDigest((20 + attempt).to_bytes(16, "big")), 2)
        authority.raise_epoch(TenantDigest((500_000 + attempt).to_bytes(16, "big")), 3)
        sequence = authority.changes_since(98_990).sequence
        assert authority.changes_since(sequence).epochs == []
    tier.forget_model(Fingerprint(bytes([2]) * 32))
    assert whole_reads() == before
    database.check()


# --- counters, whoever does what when --------------------------------------------------------------------------------


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "get", "touch", "drop", "erase", "forget", "limit", "trim"]),
        st.integers(0, 40),
        st.integers(1, 6),
        st.integers(0, 1),
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=_ACTIONS, epoch=st.integers(0, 3))
def test_the_counters_are_the_sum_of_the_records_whatever_is_done(
    database: Database, actions: list[tuple[str, int, int, int]], epoch: int
) -> None:
    database.sql("drop schema if exists kvpool cascade")
    tier = database.tier(inline_bytes=16 * RECORD_BYTES, refresh_s=0.0, size=1)
    for action, first, count, which in actions:
        tree = (TREE, OTHER_TREE)[which]._replace(epoch=epoch + count % 2)
        numbers = range(first, first + count)
        if action == "put":
            moved = tier.put(tree, sealed_many(numbers, codec=which), keys_of(range(max(0, first - 3), first)))
            taken = sum(moved.done)
            assert moved.done == [True] * taken + [False] * (count - taken)
            assert all(tier.find(tree, [key_of(number)], [which]) != [None] for number in numbers[:taken])
        elif action == "get":
            tier.get(tree, [found(number) for number in numbers], [bytearray(RECORD_BYTES) for _ in numbers])
        elif action == "touch":
            tier.touch(tree, keys_of(numbers), [0, 1])
        elif action == "drop":
            tier.drop(tree, [found(number, codec=which) for number in numbers])
        elif action == "erase":
            tier.erase(tree.tenant, count)
        elif action == "forget":
            tier.forget_model(tree.fingerprint)
        elif action == "limit":
            tier.set_limit(tree.fingerprint, None if count == 6 else count * 3 * RECORD_BYTES)
        tier.trim()
        database.check()
    database.all_connections.pop().close()


class Traffic:
    """Threads of several processes that store, read and remove the same blocks in all orders."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.stop = threading.Event()
        self.done = 0

    def work(self, seed: int, *, may_fail: bool) -> None:
        random = Random(seed)
        tier = self.database.tier(
            inline_bytes=24 * RECORD_BYTES, refresh_s=0.0, size=2, budget_s=5.0 if may_fail else DEADLINE_S
        )
        tier.set_limit(ONE_MODEL, 16 * RECORD_BYTES)
        while not self.stop.is_set():
            try:
                self.act(tier, random)
            except TierUnavailableError:
                if not may_fail:
                    raise
            self.done += 1

    def act(self, tier: payloads.PayloadTier, random: Random) -> None:
        tree = random.choice([TREE, OTHER_TREE])
        first = random.randrange(40)
        numbers = random.sample(range(first, first + 8), random.randint(1, 8))
        codec = [TREE, OTHER_TREE].index(tree)
        action = random.random()
        if action < 0.6:
            tier.put(tree, sealed_many(numbers, codec=codec), keys_of(range(max(0, first - 5), first)))
        elif action < 0.75:
            buffers = [np.full(RECORD_BYTES, 0x55, np.uint8) for _ in numbers]
            moved = tier.get(tree, [found(number, codec=codec) for number in numbers], buffers)
            for number, buffer, came in zip(numbers, buffers, moved.done, strict=True):
                assert not came or np.array_equal(buffer, record_of(number, PAYLOAD_BYTES))
        elif action < 0.85:
            tier.drop(tree, [found(number, codec=codec) for number in numbers])
        elif action < 0.95:
            tier.touch(tree, keys_of(numbers), [0, 1])
        else:
            tier.erase(tree.tenant, random.randrange(5))


def test_concurrent_writers_never_deadlock_and_the_counters_stay_right(database: Database) -> None:
    traffic = Traffic(database)
    database.tier().trim()
    with ThreadPoolExecutor(6) as threads:
        workers = [threads.submit(traffic.work, seed, may_fail=False) for seed in range(6)]
        try:
            eventually(lambda: traffic.done > 400 or any(worker.done() for worker in workers), deadline_s=PROCESS_S)
        finally:
            traffic.stop.set()
        for worker in workers:
            worker.result(DEADLINE_S)
    database.check()
    assert database.sql("select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]


def test_the_counters_are_right_after_the_server_was_killed_again_and_again(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server, database_of(server.folder) as database:
        traffic = Traffic(database)
        database.tier().trim()
        with ThreadPoolExecutor(4) as threads:
            workers = [threads.submit(traffic.work, seed, may_fail=True) for seed in range(4)]
            try:
                for _ in range(3):
                    reached = traffic.done + 40
                    eventually(lambda reached=reached: traffic.done > reached, deadline_s=PROCESS_S)  # type: ignore[misc]
                    kill(server)
                    server.start()
                    database.check()
            finally:
                traffic.stop.set()
            for worker in workers:
                worker.result(DEADLINE_S)
        database.check()


def _store_for_ever(folder: Path, seed: int) -> None:
    Traffic(Database(folder)).work(seed, may_fail=False)


def _goes_on(writers: list[SpawnProcess]) -> bool:
    assert all(writer.is_alive() for writer in writers), "a writer failed"
    return True


def test_the_counters_are_right_after_writers_were_killed(database: Database) -> None:
    database.tier().trim()
    processes = multiprocessing.get_context("spawn")
    written = "select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
    for attempt in range(3):
        writers = [
            processes.Process(target=_store_for_ever, args=(database.folder, 2 * attempt + number))
            for number in range(2)
        ]
        [(before,)] = database.sql(written)
        for writer in writers:
            writer.start()
        enough = before + 3_000_000
        eventually(
            lambda writers=writers, enough=enough: _goes_on(writers) and database.sql(written) > [(enough,)],  # type: ignore[misc]
            deadline_s=PROCESS_S,
        )
        for writer in writers:
            writer.kill()
            writer.join()
        database.check()


def test_a_writer_of_one_model_does_not_wait_for_one_of_another(database: Database) -> None:
    tier = database.tier(inline_bytes=6 * RECORD_BYTES)
    tier.put(TREE, sealed_many(range(4)), [])
    insert = (
        "insert into kvpool.payloads (key, codec, fingerprint, tenant, epoch, record, used_at) "
        "values (%b, 0, %b, %b, 0, '', now())"
    )
    with bare(database.folder) as other, other.transaction():
        other.execute(insert, (key_of(77), OTHER_MODEL, OTHER_TENANT))
        other.execute("select from kvpool.evict_payloads(null, %s, '{}')", (RECORD_BYTES,))  # it holds the oldest
        watch = Stopwatch()
        assert tier.put(TREE, sealed_many(range(10, 14)), []).done == [True] * 4
        assert watch.seconds < SLACK_S
    assert {10, 11, 12, 13} <= database.held()


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_stopped_server_costs_a_call_its_budget(tmp_path: Path) -> None:
    with postgres_server(tmp_path) as server, database_of(server.folder) as database:
        database.tier().put(TREE, sealed_many(range(3)), [])
        tier = database.tier(budget_s=BUDGET_S)
        assert tier.find(TREE, keys_of([1]), [0]) == [found(1)]
        assert tier.put(TREE, [sealed(5)], []).done == [True]
        buffer = np.full(RECORD_BYTES, 0x55, np.uint8)
        calls: list[Callable[[], object]] = [
            lambda: tier.find(TREE, keys_of([1]), [0]),
            lambda: tier.get(TREE, [found(1)], [buffer]),
            lambda: tier.put(TREE, [sealed(6, payload_bytes=2 * MIB)], []),
            lambda: tier.touch(TREE, keys_of([1]), [0]),
            lambda: tier.drop(TREE, [found(1)]),
            lambda: tier.usage(),
        ]
        with frozen(server):
            for call in calls:
                watch = Stopwatch()
                with pytest.raises(TierUnavailableError, match="no answer"):
                    call()
                assert watch.seconds < BUDGET_S + SLACK_S
        assert np.all(buffer == 0x55), "bytes that come late find nobody"
        eventually(
            lambda: (
                database.sql("select from pg_stat_activity where state = 'active' and pid <> pg_backend_pid()") == []
            ),
            deadline_s=PROCESS_S,
        )
        assert holds(tier, 2)
        database.check()


def test_what_arrived_before_the_server_stalled_counts(database: Database) -> None:
    tier = database.tier(budget_s=1.0)
    records = sealed_many(range(4), payload_bytes=MIB)
    tier.put(TREE, records, [])
    nbytes = records[0].record.nbytes
    database.sql("alter table kvpool.payloads rename to real_payloads")
    database.sql(
        "create view kvpool.payloads as select key, codec, nbytes, used_at, case when get_byte(key, 15) = 2 "
        "then pg_sleep(60)::text::bytea else record end as record from kvpool.real_payloads"
    )
    buffers = [np.full(nbytes, 0x55, np.uint8) for _ in range(4)]
    watch = Stopwatch()
    moved = tier.get(TREE, [found(number, record_bytes=nbytes) for number in range(4)], buffers)
    assert watch.seconds < 1.0 + 2 * SLACK_S
    assert moved.done[0]
    assert moved.done[2:] == [False, False]
    assert "no answer" in moved.fault
    for number, came in enumerate(moved.done):
        assert not came or np.array_equal(buffers[number], records[number].record)
    assert np.all(buffers[2] == 0x55)


def test_what_was_stored_before_the_tier_failed_counts(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "BATCH_BYTES", 2 * RECORD_BYTES)
    tier = database.tier()
    tier.trim()
    database.sql("alter table kvpool.payloads add check (get_byte(key, 15) < 3)")
    moved = tier.put(TREE, sealed_many(range(6)), [])
    assert moved.done == [True, True, False, False, False, False]
    assert "check constraint" in moved.fault
    with pytest.raises(TierUnavailableError, match="check constraint"):
        tier.put(TREE, sealed_many(range(4, 6)), [])
    database.check()


def test_a_lock_that_somebody_holds_costs_the_budget_and_harms_no_counter(database: Database) -> None:
    tier = database.tier(budget_s=BUDGET_S)
    tier.put(TREE, [sealed(1)], [])
    with bare(database.folder) as other, other.transaction():
        other.execute("select from kvpool.payload_totals where fingerprint = '' for update")
        watch = Stopwatch()
        with pytest.raises(TierUnavailableError, match="no answer"):
            tier.put(TREE, [sealed(2)], [])
        assert watch.seconds < BUDGET_S + SLACK_S
    eventually(
        lambda: (
            database.sql("select from pg_stat_activity where state like 'active%%' and pid <> pg_backend_pid()") == []
        ),
        deadline_s=PROCESS_S,
    )
    database.check()
    assert tier.put(TREE, [sealed(2), sealed(3)], []).done == [True, True]
    database.check()


def test_a_server_that_takes_no_writes_still_serves_what_it_has(database: Database) -> None:
    tier = database.tier(refresh_s=0.0)
    tier.put(TREE, [sealed(1)], [])
    [(name,)] = database.sql("select current_database()")
    database.sql(f"alter database {name} set default_transaction_read_only = on")
    tier = database.tier(refresh_s=0.0)
    assert tier.find(TREE, keys_of([1]), [0]) == [found(1)]
    assert holds(tier, 1)
    with pytest.raises(TierUnavailableError, match="read-only"):
        tier.put(TREE, [sealed(2)], [])
    tier.touch(TREE, keys_of([1]), [0])


def test_a_table_that_somebody_dropped_is_a_fault_until_it_is_back(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, [sealed(1)], [])
    database.sql("drop schema kvpool cascade")
    with pytest.raises(TierUnavailableError, match="does not exist"):
        tier.find(TREE, keys_of([1]), [0])
    assert tier.find(TREE, keys_of([1]), [0]) == [None]


def test_a_closed_tier_refuses_every_call(database: Database) -> None:
    tier = database.tier()
    tier.put(TREE, [sealed(1)], [])
    tier.close()
    tier.close()
    with pytest.raises(TierUnavailableError, match="closed"):
        tier.find(TREE, keys_of([1]), [0])
    with pytest.raises(TierUnavailableError, match="closed"):
        tier.put(TREE, [Sealed(key_of(2), 0, record_of(2, 10))], [])

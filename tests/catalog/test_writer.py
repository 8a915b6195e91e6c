"""Every report arrives once, in order, whatever happens to the database; and nobody waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest

from kvpool.catalog.encoding import encode
from kvpool.catalog.journal import Journal
from kvpool.catalog.migrations import Schema, newest_version
from kvpool.catalog.rows import Batch, ModelForgotten, PromptAsked, TenantErased, TiersCleared
from kvpool.catalog.writer import CatalogWriter
from kvpool.tiers.tier import TierName
from tests.catalog.connecting import DEADLINE_S, bare, connections_to, frozen, kill
from tests.catalog.samples import (
    MODEL,
    NODE,
    OTHER_MODEL,
    OTHER_NODE,
    SEEN,
    TENANT,
    Database,
    asked,
    catalog_in,
    key,
    keys,
    removed,
    stored,
    tree_of,
    writing,
)
from tests.footprint import footprint, holds_no_more_than
from tests.local.servers import Server, postgres_server
from tests.waiting import eventually

PATIENCE_S = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with postgres_server(tmp_path / "server", connections=12) as server:
        yield server


def _keys_in(catalog: Database) -> set[bytes]:
    return {row[0] for row in catalog.sql("select key from kvpool.blocks")}


def _expected(count: int) -> set[bytes]:
    return {key(number) for number in range(count)}


# --- the way of a report ---------------------------------------------------------------------------------------------


def test_a_writer_makes_the_schema_and_writes(empty_database: Path, tmp_path: Path) -> None:
    with writing(empty_database, tmp_path / "journal") as writer:
        writer.offer(SEEN)
        writer.offer(stored(range(10)))
        writer.offer(asked(1))
        assert writer.flush(DEADLINE_S)
        stats = writer.stats()
    with bare(empty_database) as connection:
        assert connection.execute("select count(*) from kvpool.locations").fetchone() == (10,)
        assert connection.execute("select count(*) from kvpool.prompts").fetchone() == (1,)
    assert (stats.written_rows, stats.waiting_rows, stats.dropped_rows) == (11, 0, {})


def test_a_report_costs_the_caller_microseconds_whatever_the_database_does(server: Server) -> None:
    with writing(server.folder, budget_s=0.2, linger_s=0.05) as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        op = stored(range(64))
        with frozen(server):
            began = time.perf_counter()
            for _ in range(20_000):
                writer.offer(op)
            seconds = time.perf_counter() - began
        assert seconds / 20_000 < 200e-6


def test_what_is_written_alone_comes_after_what_was_reported_before(catalog: Database, tmp_path: Path) -> None:
    with writing(catalog.folder, tmp_path / "journal") as writer:
        writer.offer(SEEN)
        writer.offer(stored([1, 2]))
        writer.offer(TiersCleared((TierName.RAM,), "restarted", 1.0))
        writer.offer(stored([2]))
        assert writer.flush(DEADLINE_S)
        assert catalog.locations() == {(key(2), "ram", NODE)}
        writer.offer(TenantErased(TENANT, 1))
        writer.offer(stored([3], tree=tree_of(epoch=1)))
        assert writer.flush(DEADLINE_S)
        assert _keys_in(catalog) == {key(3)}
        writer.offer(ModelForgotten(MODEL))
        assert writer.flush(DEADLINE_S)
    assert [catalog.count(table) for table in ("models", "blocks", "locations")] == [0, 0, 0]


def test_a_long_removal_lets_what_is_reported_meanwhile_wait_in_the_journal(catalog: Database, tmp_path: Path) -> None:
    """Less memory than what comes meanwhile takes: it is not lost, and comes after the removal."""
    count = 40_000
    with writing(catalog.folder, tmp_path / "journal", memory_bytes=300_000, budget_s=PATIENCE_S) as writer:
        writer.offer(SEEN)
        for start in range(0, count, 1_000):
            writer.offer(stored(range(start, start + 1_000)))
            eventually(lambda: writer.stats().waiting_bytes < 100_000, "it keeps up", PATIENCE_S)
        assert writer.flush(PATIENCE_S)
        writer.offer(TiersCleared((TierName.RAM,), "restarted", 1.0))
        for start in range(count, 2 * count, 1_000):
            writer.offer(stored(range(start, start + 1_000)))
            eventually(lambda: writer.stats().waiting_bytes < 100_000, "the journal takes it", PATIENCE_S)
        assert writer.flush(PATIENCE_S)
        assert writer.stats().dropped_rows == {}
    assert {row[0] for row in catalog.locations()} == {key(number) for number in range(count, 2 * count)}


def test_a_report_longer_than_a_batch_is_written_in_parts(catalog: Database) -> None:
    with writing(catalog.folder, budget_s=PATIENCE_S) as writer:
        writer.offer(SEEN)
        writer.offer(stored(range(10_000)))
        writer.offer(removed(range(5_000)))
        assert writer.flush(PATIENCE_S)
        assert writer.stats().written_batches >= 3
    assert catalog.sql("select count(*), min(depth), max(depth) from kvpool.blocks") == [(10_000, 0, 9_999)]
    chained = "select count(*) from kvpool.blocks b join kvpool.blocks above on b.parent = above.key"
    assert catalog.value(chained + " where b.depth = above.depth + 1") == 9_999
    assert catalog.count("locations") == 5_000


def test_a_report_that_the_database_refuses_takes_no_other_with_it(
    catalog: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with writing(catalog.folder, linger_s=0.1) as writer:
        for op in (SEEN, stored([1]), stored([2], nbytes=1 << 70), asked(1), stored([3], codec=1 << 20), stored([4])):
            writer.offer(op)
        assert writer.flush(DEADLINE_S)
        stats = writer.stats()
    assert _keys_in(catalog) == {key(1), key(4)}
    assert stats.dropped_rows == {"refused": 2}
    assert stats.written_rows == 3
    assert "refuses a report of BlocksStored" in caplog.text


def test_a_report_that_is_none_takes_no_other_with_it(catalog: Database, caplog: pytest.LogCaptureFixture) -> None:
    with writing(catalog.folder, linger_s=0.0) as writer:
        writer.offer(SEEN)
        assert writer.flush(DEADLINE_S)
        writer.offer(PromptAsked(tree_of(), None, 1, None, 1.0))  # type: ignore[arg-type]
        assert writer.flush(DEADLINE_S)
        writer.offer(stored([1]))
        assert writer.flush(DEADLINE_S)
    assert _keys_in(catalog) == {key(1)}


def test_two_writers_at_once_write_everything(catalog: Database, tmp_path: Path) -> None:
    with (
        writing(catalog.folder, tmp_path / "one", node=NODE) as one,
        writing(catalog.folder, tmp_path / "two", node=OTHER_NODE) as two,
    ):
        for writer in (one, two):
            writer.offer(SEEN)
        for start in range(0, 4_000, 40):
            numbers = range(start, start + 40)
            for writer in (one, two):
                writer.offer(stored(numbers))
                writer.offer(stored(numbers, tier=TierName.DRAGONFLY))
                writer.offer(removed(range(start, start + 20), tier=TierName.DRAGONFLY))
                writer.offer(asked(start))
        assert one.flush(PATIENCE_S)
        assert two.flush(PATIENCE_S)
        assert one.stats().dropped_rows == two.stats().dropped_rows == {}
    assert _keys_in(catalog) == _expected(4_000)
    assert catalog.value("select count(*) from kvpool.locations where tier = 'ram'") == 8_000
    assert catalog.value("select count(*), min(asks), max(asks) from kvpool.prompts") == 100
    assert catalog.value("select sum(asks) from kvpool.prompts") == 200
    catalog.check_sums()


# --- while the database is away --------------------------------------------------------------------------------------


def test_a_server_killed_during_ten_thousand_stores_gets_every_row_once(server: Server, tmp_path: Path) -> None:
    with writing(server.folder, tmp_path / "journal", budget_s=5.0) as writer:
        writer.offer(SEEN)
        for number in range(3_000):
            writer.offer(stored([number]))
            writer.offer(asked(number))
        eventually(lambda: writer.stats().written_rows > 500, "some are written", PATIENCE_S)
        kill(server)
        for number in range(3_000, 7_000):
            writer.offer(stored([number]))
            writer.offer(asked(number))
        eventually(lambda: writer.stats().journal_rows > 1_000, "the journal takes them", PATIENCE_S)
        server.start()
        for number in range(7_000, 10_000):
            writer.offer(stored([number]))
            writer.offer(asked(number))
        assert writer.flush(PATIENCE_S)
        stats = writer.stats()
        assert stats.replayed_batches > 0
        assert (stats.journal_rows, stats.journal_bytes, stats.dropped_rows) == (0, 0, {})
    with catalog_in(server.folder) as catalog:
        assert _keys_in(catalog) == _expected(10_000)
        assert catalog.sql("select count(*), min(asks), max(asks) from kvpool.prompts") == [(10_000, 1, 1)]
        catalog.check_sums()
    assert not list((tmp_path / "journal").iterdir())


def test_a_server_killed_again_and_again_gets_every_row_once(server: Server, tmp_path: Path) -> None:
    with writing(server.folder, tmp_path / "journal", budget_s=5.0, linger_s=0.0) as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        number = 0
        for _ in range(4):
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                writer.offer(asked(number))
                number += 1
                writer.offer(asked(0))
                if number % 50 == 0:
                    eventually(lambda: writer.stats().waiting_rows < 500, "it keeps up", PATIENCE_S)
            kill(server)
            server.start()
        assert writer.flush(PATIENCE_S)
        assert writer.stats().dropped_rows == {}
    with catalog_in(server.folder) as catalog:
        assert catalog.count("prompts") == number
        assert catalog.value("select asks from kvpool.prompts where leaf = %s", key(0)) == number + 1
        assert catalog.value("select max(asks) from kvpool.prompts where leaf <> %s", key(0)) == 1


def test_a_journal_that_is_too_small_drops_the_oldest_and_counts_them(server: Server, tmp_path: Path) -> None:
    with writing(server.folder, tmp_path / "journal", journal_bytes=128 << 10, budget_s=5.0) as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        kill(server)
        for start in range(0, 20_000, 100):
            writer.offer(stored(range(start, start + 100)))
            eventually(lambda: writer.stats().waiting_rows == 0, "it is in the journal", PATIENCE_S)
        stats = writer.stats()
        assert stats.journal_bytes <= 128 << 10
        dropped = stats.dropped_rows["journal-full"]
        assert dropped > 5_000
        assert dropped + stats.journal_rows == 20_000
        server.start()
        assert writer.flush(PATIENCE_S)
    with catalog_in(server.folder) as catalog:
        assert _keys_in(catalog) == {key(number) for number in range(dropped, 20_000)}, "the newest, and the model"


def test_a_stopped_server_costs_the_writer_one_budget_and_the_rows_arrive(server: Server, tmp_path: Path) -> None:
    with writing(server.folder, tmp_path / "journal", budget_s=0.3) as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        with frozen(server):
            writer.offer(stored(range(10)))
            eventually(lambda: writer.stats().journal_rows == 10, "the journal has it", PATIENCE_S)
            assert "300 ms" in writer.stats().last_error
        assert writer.flush(PATIENCE_S)
    with catalog_in(server.folder) as catalog:
        assert _keys_in(catalog) == _expected(10)


def test_without_a_journal_memory_keeps_the_newest(server: Server) -> None:
    with writing(server.folder, memory_bytes=200_000, budget_s=5.0) as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        kill(server)
        for number in range(2_000):
            writer.offer(stored([number]))
        assert writer.stats().waiting_bytes <= 200_000
        eventually(lambda: writer.stats().last_error != "", "it is noticed", PATIENCE_S)
        server.start()
        assert writer.flush(PATIENCE_S)
        dropped = writer.stats().dropped_rows["queue-full"]
    with catalog_in(server.folder) as catalog:
        got = _keys_in(catalog)
    assert len(got) == 2_000 - dropped
    assert key(1_999) in got


def test_a_batch_whose_answer_was_lost_is_not_written_again(catalog: Database, tmp_path: Path) -> None:
    """As after a crash between the database's commit and the journal's file being removed."""
    batch = Batch(77, 1, (SEEN, asked(1)))
    assert catalog.claim(batch)
    catalog.write(*batch.ops)
    journal = Journal(tmp_path / "journal", max_bytes=1 << 20)
    journal.open()
    journal.append(encode(batch), 2)
    journal.append(encode(Batch(77, 2, (asked(1), asked(2)))), 2)
    journal.close()
    with writing(catalog.folder, tmp_path / "journal") as writer:
        assert writer.flush(DEADLINE_S)
        assert writer.stats().repeated_batches == 1
        writer.offer(asked(2))
        assert writer.flush(DEADLINE_S)
        session = writer.session
    assert dict(catalog.sql("select leaf, asks from kvpool.prompts")) == {key(1): 2, key(2): 2}
    assert catalog.sql("select session from kvpool.writers") == [(session,)], "old sessions are forgotten"


def test_a_model_forgotten_and_seen_again_survives_a_replay(catalog: Database, tmp_path: Path) -> None:
    batches = [
        Batch(5, 1, (SEEN, stored([1]))),
        Batch(5, 2, (ModelForgotten(MODEL),)),
        Batch(5, 3, (SEEN, stored([2]))),
    ]
    for _ in range(2):
        journal = Journal(tmp_path / "journal", max_bytes=1 << 20)
        journal.open()
        for batch in batches:
            journal.append(encode(batch), 1)
        journal.close()
        with writing(catalog.folder, tmp_path / "journal") as writer:
            assert writer.flush(DEADLINE_S)
        assert _keys_in(catalog) == {key(2)}


def test_what_the_journal_holds_of_an_erased_epoch_does_not_come_back(catalog: Database, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", max_bytes=1 << 20)
    journal.open()
    journal.append(encode(Batch(5, 1, (SEEN, stored([1]), asked(1)))), 2)
    journal.close()
    catalog.raise_epoch(TENANT, 1)
    with writing(catalog.folder, tmp_path / "journal") as writer:
        assert writer.flush(DEADLINE_S)
    assert [catalog.count(table) for table in ("blocks", "locations", "prompts")] == [0, 0, 0]


def test_a_process_that_closes_while_the_database_is_away_leaves_all_to_the_next(
    server: Server, tmp_path: Path
) -> None:
    with writing(server.folder, tmp_path / "journal", budget_s=5.0) as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        kill(server)
        for number in range(1_000):
            writer.offer(stored([number]))
    server.start()
    with writing(server.folder, tmp_path / "journal", budget_s=5.0) as writer:
        writer.offer(stored([1_000]))
        assert writer.flush(PATIENCE_S)
        assert writer.stats().dropped_rows == {}
    with catalog_in(server.folder) as catalog:
        assert _keys_in(catalog) == _expected(1_001)


def test_a_writer_closes_in_time_beside_a_stopped_server(server: Server, tmp_path: Path) -> None:
    with frozen(server):
        began = time.monotonic()
        with writing(server.folder, tmp_path / "journal", budget_s=0.5, migration_budget_s=0.5) as writer:
            writer.offer(SEEN)
            writer.offer(stored(range(10)))
        assert time.monotonic() - began < 10
        assert writer.stats().journal_rows == 10


# --- a database that answers, but no ---------------------------------------------------------------------------------


def test_a_read_only_server_is_written_once_it_takes_writes_again(catalog: Database, tmp_path: Path) -> None:
    with writing(catalog.folder, tmp_path / "journal") as writer:
        writer.offer(SEEN)
        assert writer.flush(DEADLINE_S)
        name = catalog.value("select current_database()")
        catalog.sql(f"alter database {name} set default_transaction_read_only = on")
        catalog.sql("set default_transaction_read_only = off")
        catalog.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'kvpool'")
        writer.offer(stored([1]))
        eventually(lambda: writer.stats().journal_rows == 1, "it is kept")
        eventually(lambda: "read-only" in writer.stats().last_error, "it says why")
        catalog.sql(f"alter database {name} set default_transaction_read_only = off")
        catalog.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'kvpool'")
        assert writer.flush(DEADLINE_S)
    assert _keys_in(catalog) == {key(1)}


def test_a_server_out_of_connections_is_written_once_there_is_one(server: Server, tmp_path: Path) -> None:
    with writing(server.folder, tmp_path / "journal") as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
    with catalog_in(server.folder) as catalog:
        with writing(server.folder, tmp_path / "journal") as writer, ExitStack() as others:
            with suppress(psycopg.OperationalError):
                while True:
                    others.enter_context(bare(server.folder))
            writer.offer(stored([1]))
            eventually(lambda: writer.stats().journal_rows == 1, "it is kept", PATIENCE_S)
            assert "too many clients" in writer.stats().last_error
            others.close()
            assert writer.flush(PATIENCE_S)
        assert _keys_in(catalog) == {key(1)}


@pytest.mark.parametrize(("budget_s", "in_time"), [(10.0, True), (1.0, False)], ids=["patient", "impatient"])
def test_statements_of_two_seconds_are_late_and_nothing_else(
    catalog: Database, tmp_path: Path, budget_s: float, in_time: bool
) -> None:
    catalog.sql("""create function kvpool.dawdle() returns trigger language plpgsql as
                   $$ begin perform pg_sleep(2); return null; end $$""")
    with writing(catalog.folder, tmp_path / "journal", budget_s=budget_s) as writer:
        writer.offer(SEEN)
        assert writer.flush(DEADLINE_S)
        catalog.sql("""create trigger dawdle before insert on kvpool.blocks
                       for each statement execute function kvpool.dawdle()""")
        writer.offer(stored([1]))
        writer.offer(asked(1))
        if not in_time:
            eventually(lambda: writer.stats().journal_rows > 0, "it is kept")
            catalog.sql("alter table kvpool.blocks disable trigger dawdle")
        assert writer.flush(DEADLINE_S)
        assert (writer.stats().replayed_batches > 0) is not in_time
    assert catalog.sql("select leaf, asks from kvpool.prompts") == [(key(1), 1)]


def test_a_newer_schema_is_neither_written_nor_read(catalog: Database, tmp_path: Path) -> None:
    newer = newest_version() + 1
    catalog.sql("insert into kvpool.migrations (version, name, checksum) values (%s, 'later', 'x')", newer)
    with writing(catalog.folder, tmp_path / "journal") as writer:
        writer.offer(SEEN)
        writer.offer(stored([1]))
        eventually(lambda: f"it needs a kvpool that knows version {newer}" in writer.stats().last_error, "it says so")
        eventually(lambda: writer.stats().journal_rows == 1, "it is kept")
    assert catalog.count("models") == 0


# --- nothing is unbounded --------------------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_used_is_said_once_and_memory_serves(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING), writing(server.folder, tmp_path / "file" / "journal") as writer:
        writer.offer(SEEN)
        assert writer.flush(PATIENCE_S)
        kill(server)
        writer.offer(stored([1]))
        eventually(lambda: writer.stats().last_error != "", "it is noticed", PATIENCE_S)
        server.start()
        assert writer.flush(PATIENCE_S)
    assert caplog.text.count("the journal cannot be used") == 1


def test_faults_leave_neither_threads_nor_descriptors(server: Server, tmp_path: Path) -> None:

    def once() -> None:
        with writing(server.folder, tmp_path / "journal", budget_s=5.0) as writer:
            writer.offer(SEEN)
            writer.offer(stored(range(10)))
            assert writer.flush(PATIENCE_S)
            kill(server)
            writer.offer(stored(range(10, 20)))
            eventually(lambda: writer.stats().journal_rows > 0, "it is kept", PATIENCE_S)
            server.start()
            assert writer.flush(PATIENCE_S)

    once()
    before = footprint()
    once()
    once()
    holds_no_more_than(before)


def test_blocks_of_a_model_that_was_never_named_do_not_stop_the_rest(catalog: Database) -> None:
    with writing(catalog.folder) as writer:
        writer.offer(SEEN)
        writer.offer(stored([1], tree=tree_of(OTHER_MODEL)))
        writer.offer(stored([2]))
        assert writer.flush(DEADLINE_S)
    assert _keys_in(catalog) == {key(2)}


def test_nothing_of_a_report_shows_in_a_log(catalog: Database, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), writing(catalog.folder) as writer:
        writer.offer(SEEN)
        writer.offer(stored([1], nbytes=1 << 70))
        assert writer.flush(DEADLINE_S)
    assert keys([1]).hex() not in caplog.text
    assert TENANT.hex() not in caplog.text


def test_a_writer_that_was_never_started_closes(empty_database: Path) -> None:
    connections = connections_to(empty_database)
    writer = CatalogWriter(connections, None, node=NODE, schema=Schema())
    assert writer.close(1.0)

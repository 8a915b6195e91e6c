"""What is reported stands in the catalog afterwards, once, whoever reports it beside whom."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.catalog import storing
from kvpool.catalog.rows import (
    NO_NODE,
    Batch,
    BlocksRemoved,
    BlocksStored,
    Op,
    PricesSet,
    SharedPrefixRow,
    SharedReport,
    UsageReport,
)
from kvpool.catalog.trail import locate, trail
from kvpool.tiers.tier import TierName
from tests.catalog.connecting import DEADLINE_S, bare
from tests.catalog.samples import (
    MODEL,
    NBYTES,
    NODE,
    NOW_S,
    OTHER_MODEL,
    OTHER_NODE,
    OTHER_TENANT,
    SEEN,
    TENANT,
    TREE,
    Database,
    asked,
    key,
    removed,
    stored,
    tree_of,
    used,
)
from tests.waiting import eventually


def test_stored_blocks_are_there_with_their_place_in_the_prompt(catalog: Database) -> None:
    catalog.write(SEEN, stored([1, 2, 3], depth=5))
    rows = catalog.sql("select key, parent, depth, tokens, hits from kvpool.blocks order by depth")
    assert rows == [(key(1), key(-1), 5, 16, 0), (key(2), key(1), 6, 16, 0), (key(3), key(2), 7, 16, 0)]
    assert catalog.locations() == {(key(number), "ram", NODE) for number in (1, 2, 3)}


def test_a_copy_in_a_shared_tier_is_no_nodes(catalog: Database) -> None:
    catalog.write(SEEN, stored([1], tier=TierName.DRAGONFLY), node=NODE)
    catalog.write(SEEN, stored([1], tier=TierName.DRAGONFLY), node=OTHER_NODE)
    assert catalog.locations() == {(key(1), "dragonfly", NO_NODE)}


def test_blocks_of_a_model_that_nobody_named_are_left_out(catalog: Database) -> None:
    catalog.write(stored([1]), asked(1), SEEN)
    assert catalog.count("blocks") == 1
    catalog.write(stored([2], tree=tree_of(OTHER_MODEL)), asked(2, tree=tree_of(OTHER_MODEL)))
    assert catalog.count("blocks") == 1
    assert catalog.count("prompts") == 1


@pytest.mark.parametrize("erased", [TENANT, bytes(16)], ids=["its tenant", "all tenants"])
def test_rows_of_an_erased_epoch_are_left_out(catalog: Database, erased: bytes) -> None:
    catalog.raise_epoch(erased, 2)
    prefix = SharedPrefixRow(tree_of(epoch=1), key(1), 1, 16, 1, 1)
    catalog.write(SEEN, stored([1], tree=tree_of(epoch=1)), asked(1, tree=tree_of(epoch=1)), SharedReport((prefix,), 1))
    assert [catalog.count(table) for table in ("blocks", "locations", "prompts", "shared_prefixes")] == [0, 0, 0, 0]
    catalog.write(SEEN, stored([2], tree=tree_of(epoch=2)), asked(2, tree=tree_of(epoch=2)))
    assert [catalog.count(table) for table in ("blocks", "locations", "prompts")] == [1, 1, 1]


def test_nothing_of_an_epoch_comes_in_once_it_was_raised(catalog: Database) -> None:
    """Who writes holds the epoch; who raises it waits for him."""
    raised = threading.Event()

    def raise_it() -> None:
        with bare(catalog.folder) as connection:
            connection.execute("select kvpool.raise_epoch(%s, 1)", (TENANT,))
        raised.set()

    with ThreadPoolExecutor(1) as threads:
        with catalog.connection.transaction():
            storing.write(catalog.connection, NODE, 1, [SEEN, stored([1])])
            done = threads.submit(raise_it)
            assert not raised.wait(0.3), "a writer is at it"
        done.result(20)
    catalog.write(SEEN, stored([2]))
    assert [row[0] for row in catalog.sql("select key from kvpool.blocks")] == [key(1)]


def test_a_batch_is_claimed_once_and_only_forwards(catalog: Database) -> None:
    assert catalog.claim(Batch(7, 1, ()))
    assert not catalog.claim(Batch(7, 1, ()))
    assert catalog.claim(Batch(7, 3, ()))
    assert not catalog.claim(Batch(7, 2, ()))
    assert catalog.claim(Batch(8, 1, ())), "another session counts by itself"
    assert catalog.claim(Batch(7, 1, ()), node=OTHER_NODE)


def test_of_storing_and_removing_in_one_batch_the_last_counts(catalog: Database) -> None:
    catalog.write(SEEN, stored([1, 2, 3]), removed([1, 2]), stored([2]))
    assert catalog.locations() == {(key(2), "ram", NODE), (key(3), "ram", NODE)}
    catalog.write(removed([3]), stored([3]), removed([2]))
    assert catalog.locations() == {(key(3), "ram", NODE)}
    catalog.check_sums()


def test_a_removal_takes_every_codec_of_its_node_alone(catalog: Database) -> None:
    catalog.write(SEEN, stored([1], codec=0), stored([1], codec=3), node=NODE)
    catalog.write(stored([1]), node=OTHER_NODE)
    catalog.write(removed([1]), node=NODE)
    assert catalog.locations() == {(key(1), "ram", OTHER_NODE)}


def test_uses_are_counted_one_by_one(catalog: Database) -> None:
    catalog.write(SEEN, stored([1, 2]))
    catalog.write(used([1, 1, 2], NOW_S + 60), used([1], NOW_S + 30))
    rows = catalog.sql("select key, hits, extract(epoch from last_used_at)::float8 from kvpool.blocks")
    assert sorted(rows) == sorted([(key(1), 3, NOW_S + 60), (key(2), 1, NOW_S + 60)])


def test_prompts_that_are_asked_again_are_one_row(catalog: Database) -> None:
    catalog.write(SEEN, asked(1, at_s=NOW_S), asked(1, tokens=120, at_s=NOW_S + 5), asked(2))
    catalog.write(asked(1, tokens=130, at_s=NOW_S + 9))
    columns = "tokens, asks, extract(epoch from first_asked_at)::float8, extract(epoch from last_asked_at)::float8"
    rows = catalog.sql(f"select {columns} from kvpool.prompts where leaf = %s", key(1))  # noqa: S608 - constants
    assert rows == [(130, 3, NOW_S, NOW_S + 9)]


def test_a_report_of_use_replaces_the_one_before(catalog: Database) -> None:
    def report(asked_blocks: int) -> UsageReport:
        return UsageReport(MODEL, TENANT, asked_blocks, 5, (1, 2, 3, 4, 5), 80, 0.5, NOW_S)

    catalog.write(SEEN, report(10), report(20))
    catalog.write(report(30))
    assert catalog.sql("select asked_blocks, loaded_gpu, loaded_ssd from kvpool.usage") == [(30, 1, 5)]


def test_a_report_of_shared_prefixes_replaces_the_nodes_last_one(catalog: Database) -> None:
    def report(*numbers: int) -> SharedReport:
        return SharedReport(tuple(SharedPrefixRow(TREE, key(n), n, 16 * n, n, NBYTES) for n in numbers), NOW_S)

    catalog.write(SEEN, report(1, 2))
    catalog.write(report(5), node=OTHER_NODE)
    catalog.write(report(2, 3))
    rows = catalog.sql("select node, depth from kvpool.shared_prefixes order by 1, 2")
    assert rows == [(NODE, 2), (NODE, 3), (OTHER_NODE, 5)]
    catalog.write(report())
    assert catalog.count("shared_prefixes") == 1


def test_the_newest_prices_count(catalog: Database) -> None:
    catalog.write(PricesSet(2.5, 3.9, 0.2, NOW_S))
    catalog.write(PricesSet(9.0, 9.0, 9.0, NOW_S - 10))
    assert dict(catalog.sql("select name, value from kvpool.prices")) == {
        "gpuHour": 2.5,
        "ramGiBMonth": 3.9,
        "ssdGiBMonth": 0.2,
    }


def test_the_trail_says_how_the_last_copy_went(catalog: Database) -> None:
    catalog.write(SEEN, stored([1]), removed([1], reason="evicted"), removed([1], tier=TierName.SSD, reason="corrupt"))
    catalog.write(removed([1], tier=TierName.DRAGONFLY, reason="refused", at_s=NOW_S + 1))
    found = trail(catalog.connection, [key(1), key(2)])
    assert found == {key(1): (TierName.DRAGONFLY, NO_NODE, "refused", NOW_S + 1)}


def test_blocks_are_located_one_by_one_and_many_at_once(catalog: Database) -> None:
    catalog.write(SEEN, stored([1, 2]), stored([2], tier=TierName.SSD, codec=3, nbytes=7, at_s=NOW_S + 1))
    in_ram, on_ssd = (TierName.RAM, NODE, 0, NBYTES, NOW_S), (TierName.SSD, NODE, 3, 7, NOW_S + 1)
    assert locate(catalog.connection, [key(2)]) == {key(2): [in_ram, on_ssd]}
    wanted = [key(number) for number in range(4)]
    assert locate(catalog.connection, wanted) == {key(1): [in_ram], key(2): [in_ram, on_ssd]}
    assert locate(catalog.connection, []) == {}


_NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True)
_TIERS = st.sampled_from([TierName.RAM, TierName.SSD, TierName.DRAGONFLY])
_STEPS = st.lists(
    st.lists(
        st.one_of(
            st.builds(
                lambda numbers, tier, codec, at: stored(numbers, tier=tier, codec=codec, at_s=NOW_S + 50_000 * at),
                _NUMBERS, _TIERS, st.integers(0, 1), st.integers(0, 3),
            ),
            st.builds(lambda numbers, tier: removed(numbers, tier=tier), _NUMBERS, _TIERS),
            st.builds(used, _NUMBERS),
        ),
        max_size=6,
    ),
    max_size=6,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=_STEPS)
def test_the_locations_are_what_was_stored_and_not_removed_and_the_sums_agree(
    catalog: Database, batches: list[list[Op]]
) -> None:
    catalog.sql("truncate kvpool.models, kvpool.blocks, kvpool.evictions, kvpool.holdings cascade")
    model: set[tuple[bytes, str, UUID, int]] = set()
    for ops in batches:
        catalog.write(SEEN, *ops)
        for op in ops:
            if isinstance(op, BlocksStored):
                node = storing.node_of(op.tier, NODE)
                model |= {(op.keys[at : at + 16], op.tier.value, node, op.codec) for at in range(0, len(op.keys), 16)}
            elif isinstance(op, BlocksRemoved):
                gone = {(op.keys[at : at + 16], op.tier.value) for at in range(0, len(op.keys), 16)}
                model = {row for row in model if row[:2] not in gone}
    assert set(catalog.sql("select key, tier, node, codec from kvpool.locations")) == model
    catalog.check_sums()


def _deadlocks(catalog: Database) -> int:
    count: int = catalog.value("select deadlocks from pg_stat_database where datname = current_database()")
    return count


def test_two_writers_of_the_same_blocks_never_deadlock(catalog: Database) -> None:
    """The same shared-tier copies, uses and prompts, in whatever order each has them."""
    catalog.write(SEEN)

    def write_shuffled(seed: int) -> None:
        rng = random.Random(seed)
        with bare(catalog.folder) as connection:
            for _ in range(40):
                ops: list[Op] = []
                for _ in range(12):
                    numbers = rng.sample(range(400), 40)
                    makers: list[Callable[[], Op]] = [
                        partial(stored, numbers, tier=TierName.DRAGONFLY, at_s=rng.random() * 1e9),
                        partial(removed, numbers, tier=TierName.DRAGONFLY),
                        partial(used, numbers),
                        partial(asked, numbers[0]),
                    ]
                    ops.append(rng.choice(makers)())
                with connection.transaction():
                    storing.write(connection, UUID(int=seed + 1), 1, ops)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write_shuffled, range(3)))
    catalog.sql("select pg_stat_clear_snapshot()")
    assert _deadlocks(catalog) == 0
    catalog.check_sums()


def test_a_writer_that_waited_does_not_turn_back_for_what_was_added_meanwhile(catalog: Database) -> None:
    """It holds the second copy and waits for the third, while the first is added and held by one who wants the second.

    Removing the first, it would wait for him, who waits for it."""
    first, second, third = sorted(range(3), key=key)
    in_dragonfly = partial(stored, tier=TierName.DRAGONFLY)
    catalog.write(SEEN, in_dragonfly([second, third]), stored([first]))

    def waits(writer: psycopg.Connection[tuple[Any, ...]]) -> Callable[[], bool]:
        waiting = "select exists (select from pg_stat_activity where pid = %s and wait_event_type = 'Lock')"
        return lambda: bool(catalog.value(waiting, writer.info.backend_pid))

    def write(writer: psycopg.Connection[tuple[Any, ...]], *ops: Op) -> None:
        with writer.transaction():
            storing.write(writer, NODE, 1, ops)

    with (
        ThreadPoolExecutor(2) as threads,
        bare(catalog.folder) as one,
        bare(catalog.folder) as other,
        bare(catalog.folder) as last,
    ):
        with last.transaction():
            storing.write(last, OTHER_NODE, 1, [in_dragonfly([third])])
            gone = removed([first], tier=TierName.DRAGONFLY)
            ends = [threads.submit(write, one, in_dragonfly([second, third]), gone)]
            eventually(waits(one), "waits for the third")
            catalog.write(in_dragonfly([first]))
            ends.append(threads.submit(write, other, in_dragonfly([first, second])))
            eventually(waits(other), "waits for the second")
        for end in ends:
            end.result(DEADLINE_S)
    assert _deadlocks(catalog) == 0
    assert {row[0] for row in catalog.locations() if row[1] == "dragonfly"} == {key(number) for number in range(3)}


def test_a_writer_does_not_wait_for_another_ones_blocks(catalog: Database) -> None:
    catalog.write(SEEN)
    with bare(catalog.folder) as other, other.transaction():
        storing.write(other, OTHER_NODE, 1, [stored(range(100, 200)), asked(100), removed(range(5))])
        catalog.sql("set lock_timeout = '2s'")
        catalog.write(stored(range(100)), asked(1), removed(range(50, 60)))
    assert catalog.count("blocks") == 200


@pytest.mark.parametrize("wrong", [stored([1], nbytes=1 << 70), stored([1], codec=1 << 20)], ids=["size", "codec"])
def test_a_row_that_no_column_holds_is_an_error_and_leaves_nothing(catalog: Database, wrong: BlocksStored) -> None:
    with pytest.raises(psycopg.DataError):
        catalog.write(SEEN, wrong)
    assert catalog.count("blocks") == 0


def test_a_tenant_of_another_model_is_another_row_of_use(catalog: Database) -> None:
    report = UsageReport(MODEL, TENANT, 1, 1, (0, 0, 0, 0, 0), 1, 1.0, NOW_S)
    catalog.write(SEEN, report, report._replace(tenant=OTHER_TENANT))
    assert catalog.count("usage") == 2


# --- blocks refer to their models, though not by a foreign key of the database's own ----------------------------------

_BLOCK = """insert into kvpool.blocks (key, fingerprint, tenant, epoch, parent, depth, tokens, created_at, last_used_at)
            values (%s, %s, %s, 0, %s, 0, 16, now(), now())"""


def _insert_block(connection: psycopg.Connection[tuple[Any, ...]], number: int) -> None:
    connection.execute(_BLOCK, (key(number), MODEL, TENANT, key(-1)))


def test_a_block_of_a_model_that_is_not_there_is_refused(catalog: Database) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        _insert_block(catalog.connection, 1)
    assert catalog.count("blocks") == 0


def test_a_model_cannot_go_while_blocks_of_it_come_and_takes_those_along(catalog: Database) -> None:
    catalog.write(SEEN)
    with ThreadPoolExecutor(1) as threads, bare(catalog.folder) as other:
        with catalog.connection.transaction():
            _insert_block(catalog.connection, 1)
            deleting = threads.submit(other.execute, "delete from kvpool.models where fingerprint = %s", (MODEL,))
            with pytest.raises(TimeoutError):
                deleting.result(0.3)
        deleting.result(20)
    assert catalog.count("blocks") == 0


def test_blocks_cannot_come_while_their_model_goes(catalog: Database) -> None:
    catalog.write(SEEN)
    with ThreadPoolExecutor(1) as threads, bare(catalog.folder) as other:
        with catalog.connection.transaction():
            catalog.sql("delete from kvpool.models where fingerprint = %s", MODEL)
            inserting = threads.submit(_insert_block, other, 1)
            with pytest.raises(TimeoutError):
                inserting.result(0.3)
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            inserting.result(20)
    assert catalog.count("blocks") == 0

"""The catalog stays within its bounds, and what it lets go of is the oldest."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from kvpool.catalog import trimming
from kvpool.catalog.rows import NO_NODE, Batch, SharedPrefixRow, SharedReport, UsageReport
from kvpool.catalog.trail import trail
from kvpool.catalog.trimming import CatalogLimits, chores
from kvpool.tiers.tier import TierName
from tests.catalog.connecting import bare
from tests.catalog.samples import (
    MODEL,
    NODE,
    NOW_S,
    OTHER_NODE,
    SEEN,
    TENANT,
    TREE,
    Database,
    asked,
    key,
    removed,
    stored,
)

LONG_S = 1e9
SHORT_S = 1000.0


def test_the_trail_keeps_the_newest_entries(catalog: Database) -> None:
    catalog.write(SEEN, removed(range(100)))
    trimming.trim_trail(catalog.connection, most=30, age_s=LONG_S)
    assert set(trail(catalog.connection, [key(number) for number in range(100)])) == {key(n) for n in range(70, 100)}


def test_the_trail_forgets_what_is_too_old(catalog: Database) -> None:
    catalog.write(removed([1], at_s=time.time() - 2 * SHORT_S), removed([2], at_s=time.time()))
    trimming.trim_trail(catalog.connection, most=100, age_s=SHORT_S)
    assert set(trail(catalog.connection, [key(1), key(2)])) == {key(2)}


def test_a_block_goes_when_neither_a_copy_nor_the_trail_names_it(catalog: Database) -> None:
    catalog.write(SEEN, stored(range(4)), removed([0, 1, 2]), removed([0]), stored([1]))
    assert catalog.count("blocks") == 4
    trimming.trim_trail(catalog.connection, most=1, age_s=LONG_S)  # keeps the second removal of 0
    assert {row[0] for row in catalog.sql("select key from kvpool.blocks")} == {key(0), key(1), key(3)}
    trimming.trim_trail(catalog.connection, most=0, age_s=LONG_S)
    assert {row[0] for row in catalog.sql("select key from kvpool.blocks")} == {key(1), key(3)}


def test_two_who_trim_at_once_do_not_wait_for_each_other(catalog: Database) -> None:
    catalog.write(removed(range(10)))
    with bare(catalog.folder) as other, other.transaction():
        trimming.trim_trail(other, most=0, age_s=LONG_S)
        catalog.sql("set lock_timeout = '1s'")
        assert not trimming.trim_trail(catalog.connection, most=0, age_s=LONG_S)
    assert catalog.count("evictions") == 0


def test_the_prompts_asked_for_last_are_kept(catalog: Database) -> None:
    now = time.time()
    catalog.write(SEEN, *(asked(number, at_s=now - number) for number in range(20)))
    trimming.trim_prompts(catalog.connection, most=5, age_s=LONG_S)
    left = {row[0] for row in catalog.sql("select leaf from kvpool.prompts")}
    assert left == {key(number) for number in range(6)}
    trimming.trim_prompts(catalog.connection, most=5, age_s=2.5)
    assert catalog.count("prompts") <= 3


def test_copies_in_a_tier_that_forgets_expire_and_leave_a_trail(catalog: Database) -> None:
    now = time.time()
    catalog.write(
        SEEN,
        stored([1], tier=TierName.DRAGONFLY, at_s=now - 2 * SHORT_S),
        stored([2], tier=TierName.DRAGONFLY, at_s=now),
        stored([3], at_s=now - 2 * SHORT_S),
    )
    trimming.expire(catalog.connection, TierName.DRAGONFLY, SHORT_S)
    assert catalog.locations() == {(key(2), "dragonfly", NO_NODE), (key(3), "ram", NODE)}
    assert trail(catalog.connection, [key(1)])[key(1)].reason == "ttl"
    catalog.check_sums()


def test_sums_are_folded_and_stay_the_same(catalog: Database) -> None:
    catalog.write(SEEN)
    for number in range(30):
        catalog.write(stored([number]), removed([number - 1]))
    before = catalog.count("holdings")
    catalog.connection.execute(trimming._FOLD_HOLDINGS, {"rows": 1000})
    assert catalog.count("holdings") == 1 < before
    catalog.check_sums()


def test_folding_beside_writers_loses_nothing(catalog: Database) -> None:
    catalog.write(SEEN)

    def fold() -> None:
        with bare(catalog.folder) as connection:
            for _ in range(60):
                connection.execute(trimming._FOLD_HOLDINGS, {"rows": 20})

    with ThreadPoolExecutor(2) as threads:
        folding = [threads.submit(fold) for _ in range(2)]
        for number in range(60):
            catalog.write(stored([number]), removed([number - 5]))
        for done in folding:
            done.result()
    catalog.check_sums()


def test_counters_of_sessions_long_over_are_added_up(catalog: Database) -> None:
    old = UsageReport(MODEL, TENANT, 10, 5, (1, 2, 3, 4, 5), 80, 0.5, NOW_S)
    catalog.write(SEEN, old, node=NODE)
    catalog.write(old, node=OTHER_NODE)
    trimming.fold_usage(catalog.connection, SHORT_S)
    catalog.write(old._replace(at_s=time.time()), node=NODE)
    trimming.fold_usage(catalog.connection, SHORT_S)
    rows = catalog.sql("select node, asked_blocks, loaded_ssd, saved_prefill_s from kvpool.usage order by 1")
    assert rows == [(NO_NODE, 20, 10, 1.0), (NODE, 10, 5, 0.5)]


def test_a_node_that_never_came_back_holds_nothing(catalog: Database) -> None:
    for node in (NODE, OTHER_NODE):
        assert catalog.claim(Batch(1, 1, ()), node=node)
        catalog.write(SEEN, stored([1], tier=TierName.SSD), node=node)
    catalog.write(SharedReport((SharedPrefixRow(TREE, key(1), 1, 16, 1, 1),), NOW_S))
    catalog.sql("update kvpool.writers set at = now() - interval '2 hours' where node = %s", OTHER_NODE)
    for chore in chores(CatalogLimits(node_age_s=3600)):
        while chore(catalog.connection):
            pass
    assert catalog.locations() == {(key(1), "ssd", NODE)}
    assert catalog.sql("select node from kvpool.writers") == [(NODE,)]
    assert catalog.count("shared_prefixes") == 0

"""The views say what the reports add up to."""

from __future__ import annotations

import time

import pytest

from kvpool.catalog.rows import PricesSet, SharedPrefixRow, SharedReport, UsageReport
from kvpool.tiers.tier import TierName
from tests.catalog.samples import (
    MODEL,
    NODE,
    NOW_S,
    OTHER_NODE,
    SEEN,
    TENANT,
    TREE,
    Database,
    key,
    removed,
    stored,
)

GIB = 1 << 30


def test_held_is_per_model_tenant_tier_and_age(catalog: Database) -> None:
    now = time.time()
    day_s = 86_400
    catalog.write(
        SEEN,
        stored(range(10), nbytes=100, at_s=now),
        stored(range(10), nbytes=100, at_s=now - 3 * day_s, tier=TierName.SSD),
        stored(range(10, 14), nbytes=100, at_s=now - 20 * day_s, tier=TierName.SSD),
        stored(range(20, 21), nbytes=100, at_s=now - 200 * day_s, tier=TierName.SSD),
        removed([0]),
    )
    rows = catalog.sql("select model, tenant, tier, age, blocks, bytes from kvpool.held order by 3, 5 desc")
    tenant = TENANT.hex()
    assert rows == [
        ("m", tenant, "ram", "today", 9, 900),
        ("m", tenant, "ssd", "week", 10, 1000),
        ("m", tenant, "ssd", "month", 4, 400),
        ("m", tenant, "ssd", "older", 1, 100),
    ]


def test_top_shared_prefixes_adds_the_nodes_up(catalog: Database) -> None:
    def report(**hits: int) -> SharedReport:
        return SharedReport(tuple(SharedPrefixRow(TREE, key(int(n[1:])), 2, 32, h, 10) for n, h in hits.items()), NOW_S)

    catalog.write(SEEN, report(k1=5, k2=6), node=NODE)
    catalog.write(report(k1=4), node=OTHER_NODE)
    rows = catalog.sql("select key, hits, nodes, bytes, tokens from kvpool.top_shared_prefixes")
    assert rows == [(key(1).hex(), 9, 2, 20, 32), (key(2).hex(), 6, 1, 10, 32)]


def test_saved_and_cost_follow_usage_and_prices(catalog: Database) -> None:
    catalog.write(SEEN, UsageReport(MODEL, TENANT, 100, 75, (1, 2, 3, 4, 5), 1200, 7200.0, NOW_S))
    catalog.write(stored([1], nbytes=2 * GIB), stored([1], nbytes=4 * GIB, tier=TierName.SSD))
    saved = catalog.sql("select model, hit_ratio::float8, loaded_ram, saved_tokens, saved_prefill_s from kvpool.saved")
    assert saved == [("m", 0.75, 2, 1200, 7200.0)]
    columns = "ram_per_month, ssd_per_month, gpu_hours_saved, gpu_cost_saved"
    assert catalog.sql(f"select {columns} from kvpool.cost") == [(None, None, 2.0, None)]  # noqa: S608 - constants
    catalog.write(PricesSet(2.5, 3.9, 0.2, NOW_S))
    ((ram, ssd, hours, gpu),) = catalog.sql(f"select {columns} from kvpool.cost")  # noqa: S608 - constants
    assert (ram, ssd, hours, gpu) == (pytest.approx(7.8), pytest.approx(0.8), 2.0, 5.0)


def test_every_table_and_view_says_what_it_is(catalog: Database) -> None:
    silent = catalog.sql("""
        select relname from pg_class where relnamespace = 'kvpool'::regnamespace and relkind in ('r', 'v')
        and obj_description(oid) is null and relname <> 'migrations'""")
    assert silent == []

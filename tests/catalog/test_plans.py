"""Over a large catalog, no statement that is shipped reads a large table from end to end."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.abc import Params

import kvpool.catalog
from kvpool.catalog import erasing, find, metadata, storing, trail, trimming
from kvpool.catalog.find import Cursor, Filters
from kvpool.catalog.rows import (
    Batch,
    ModelForgotten,
    Op,
    PricesSet,
    SharedPrefixRow,
    SharedReport,
    TenantErased,
    TiersCleared,
    UsageReport,
)
from kvpool.catalog.statement import Statement
from kvpool.catalog.trimming import CatalogLimits
from kvpool.tiers.tier import TierName
from tests.catalog.connecting import address_of
from tests.catalog.samples import (
    BIG_TABLES,
    MODEL,
    NODE,
    NOW_S,
    OTHER_TENANT,
    SEEN,
    TENANT,
    TREE,
    asked,
    catalog_in,
    key,
    removed,
    stored,
    tree_of,
    used,
)
from tests.local.servers import postgres_database

ROWS = 100_000
PROMPT_BLOCKS = 100
HALF = ROWS // 2
ELSEWHERE = ("kvpool.catalog.payload", "kvpool.catalog.authority")
"""Their statements are planned beside the tests of what they do."""


class Recorder(psycopg.Connection[tuple[Any, ...]]):
    """Keeps every statement of ours that goes over it, with its parameters, and its plan before it is executed."""

    plans: dict[bytes, list[str]]

    def execute(
        self, query: Any, params: Params | None = None, *, prepare: bool | None = None, binary: bool = False
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        if isinstance(query, Statement):
            explain = super().execute(b"explain (costs off) " + bytes(query), params)
            self.plans[bytes(query)] = [row[0] for row in explain.fetchall()]
        return super().execute(query, params, prepare=prepare, binary=binary)


@pytest.fixture(scope="module")
def recorder(postgres_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """A catalog of 100,000 blocks, two copies of each, 100,000 prompts, and 100,000 entries of the trail."""
    with postgres_database(postgres_folder, tmp_path_factory.mktemp("plans")) as folder:
        with catalog_in(folder) as catalog:
            for start in range(0, ROWS, 5_000):
                ops: list[Op] = [SEEN]
                for first in range(start, start + 5_000, PROMPT_BLOCKS):
                    numbers = range(first, first + PROMPT_BLOCKS)
                    tree = TREE if first < HALF else tree_of(tenant=OTHER_TENANT)
                    at_s = NOW_S + first
                    ops.append(stored(numbers, tree=tree, at_s=at_s))
                    ops.append(stored(numbers, tree=tree, at_s=at_s, tier=TierName.DRAGONFLY))
                    ops.append(removed(numbers, tier=TierName.SSD, at_s=at_s))
                    ops += [asked(number, tree=tree, at_s=at_s) for number in numbers]
                catalog.write(*ops)
            catalog.sql("""update kvpool.blocks set metadata = '{"app": "chat"}' where depth = 0""")
            catalog.sql("vacuum analyze")
        address = address_of(folder)
        with Recorder.connect(
            address.url, user=address.username, password=address.password, autocommit=True
        ) as connection:
            connection.plans = {}
            yield connection


def _store(recorder: Recorder) -> None:
    some = range(1_000)
    prefix = SharedPrefixRow(TREE, key(1), 1, 16, 1, 1)
    batch = Batch(1, 1, ())
    with recorder.transaction():
        storing.is_written(recorder, NODE, batch)
        storing.claim(recorder, NODE, batch)
        storing.forget_sessions(recorder, NODE, but=1)
        ops: list[Op] = [
            SEEN,
            stored(range(ROWS, ROWS + 1_000)),
            stored(some, tier=TierName.DRAGONFLY),
            removed(some),
            removed(range(500), tier=TierName.DRAGONFLY),
            used(range(2_000, 3_000)),
            *(asked(number) for number in some),
            UsageReport(MODEL, TENANT, 1, 1, (0, 0, 0, 0, 0), 1, 1.0, NOW_S),
            SharedReport((prefix,), NOW_S),
            PricesSet(1, 1, 1, NOW_S),
        ]
        storing.write(recorder, NODE, 1, ops)


def _ask(recorder: Recorder) -> None:
    trail.locate(recorder, [key(1)])
    trail.locate(recorder, [key(number) for number in range(256)])
    trail.trail(recorder, [key(number) for number in range(256)])


def _find(recorder: Recorder) -> None:
    """Every combination of filters."""
    for shape in find.all_shapes():
        for look, last in ((find.find_blocks, key(7)), (find.find_prompts, 7)):
            filters = Filters(
                fingerprint=MODEL,
                tenant=TENANT if shape.tenant else None,
                under=key(50) if shape.under else None,
                keys=[key(number) for number in range(40, 60)] if shape.keys else None,
                used_before_s=NOW_S + 5_000 if shape.used_before else None,
                where={"app": "chat"} if shape.where else {},
                after=Cursor(TENANT, int(NOW_S * 1e6), last) if shape.after else None,
                limit=100,
            )
            look(recorder, filters)


def _describe(recorder: Recorder) -> None:
    (prompt,) = recorder.execute("select id from kvpool.prompts limit 1").fetchone() or (0,)
    for describe, what in (
        (metadata.describe_model, MODEL),
        (metadata.describe_prompt, prompt),
        (metadata.describe_block, key(30_000)),
    ):
        change: Callable[..., int] = describe
        change(recorder, what, {"app": "chat"}, 1)
        with pytest.raises(metadata.LostRaceError):
            change(recorder, what, {}, 999)


def _trim(recorder: Recorder) -> None:
    old_s = time.time() - NOW_S
    trimming.trim_trail(recorder, most=ROWS - 1_000, age_s=2 * old_s)
    trimming.trim_prompts(recorder, most=ROWS - 1_000, age_s=2 * old_s)
    trimming.expire(recorder, TierName.DRAGONFLY, old_s - 1_000)
    for chore in trimming.chores(CatalogLimits(eviction_age_s=2 * old_s, prompt_age_s=2 * old_s, node_age_s=0.0)):
        chore(recorder)
    recorder.execute(trimming._FOLD_HOLDINGS, {"rows": 1_000})


def _erase(recorder: Recorder) -> None:
    for op in (TiersCleared((TierName.RAM,), "restarted", NOW_S), TenantErased(OTHER_TENANT, 1), ModelForgotten(MODEL)):
        assert erasing.write_alone(recorder, NODE, op, passes=1_000)
    while trimming.forget_node(recorder, 0.0):
        continue


def _views(recorder: Recorder) -> None:
    for view in ("held", "top_shared_prefixes", "saved", "cost"):
        recorder.execute(Statement(f"select * from kvpool.{view}"))  # noqa: S608 - a view's name


def _shipped() -> dict[bytes, str]:
    """Every statement in the package, and where it stands."""
    found: dict[bytes, str] = {}
    for module in pkgutil.walk_packages(kvpool.catalog.__path__, "kvpool.catalog."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Statement) and not module.name.startswith(ELSEWHERE):
                found[bytes(value)] = f"{module.name}.{name}"
    return found


def test_no_statement_reads_a_large_table_from_end_to_end(recorder: Recorder) -> None:
    _store(recorder)
    _ask(recorder)
    _find(recorder)
    _describe(recorder)
    _views(recorder)
    _trim(recorder)
    _erase(recorder)
    missing = {name for text, name in _shipped().items() if text not in recorder.plans}
    assert missing == set(), "every statement that is shipped was planned"
    assert len(recorder.plans) > 150, "and every combination of filters"
    scans = [f"Seq Scan on {table}" for table in BIG_TABLES]
    guilty = {
        query.decode(): "\n".join(plan)
        for query, plan in recorder.plans.items()
        if any(scan in line for line in plan for scan in scans)
    }
    assert guilty == {}, "\n\n".join(f"{query}\n{plan}" for query, plan in guilty.items())

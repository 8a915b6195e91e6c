"""What is erased, forgotten or cleared leaves nothing behind, and nothing of others is touched."""

from __future__ import annotations

from kvpool.catalog import erasing
from kvpool.catalog.erasing import write_alone
from kvpool.catalog.rows import (
    Alone,
    ModelForgotten,
    SharedPrefixRow,
    SharedReport,
    TenantErased,
    TiersCleared,
    UsageReport,
    model_seen,
)
from kvpool.catalog.trail import trail
from kvpool.tiers.tier import TierName
from tests.catalog.samples import (
    MODEL,
    NODE,
    NOW_S,
    OTHER_IDENTITY,
    OTHER_MODEL,
    OTHER_NODE,
    OTHER_TENANT,
    SEEN,
    TENANT,
    Database,
    asked,
    key,
    removed,
    stored,
    tree_of,
)

_COLUMNS = {
    "blocks": "tenant", "locations": "tenant", "prompts": "tenant", "shared_prefixes": "tenant", "usage": "tenant",
}  # fmt: skip


def _do(catalog: Database, op: Alone) -> None:
    assert write_alone(catalog.connection, NODE, op, passes=1_000)


def _fill(catalog: Database) -> None:
    catalog.write(SEEN, model_seen(OTHER_IDENTITY, NOW_S))
    for at, (model, tenant) in enumerate(
        [(MODEL, TENANT), (MODEL, OTHER_TENANT), (OTHER_MODEL, TENANT), (OTHER_MODEL, OTHER_TENANT)]
    ):
        tree = tree_of(model, tenant)
        numbers = range(1000 * at, 1000 * at + 50)
        prefix = SharedPrefixRow(tree, key(numbers[0]), 1, 16, 1, 1)
        catalog.write(
            stored(numbers, tree=tree),
            stored(numbers, tree=tree, tier=TierName.SSD),
            removed(numbers[:10]),
            *(asked(number, tree=tree) for number in numbers),
            UsageReport(model, tenant, 1, 1, (0, 0, 0, 0, 0), 1, 1.0, NOW_S),
        )
        catalog.write(SharedReport((prefix,), NOW_S), node=NODE if at % 2 else OTHER_NODE)


def _rows_of(catalog: Database, column: str, value: bytes) -> dict[str, int]:
    query = "select count(*) from kvpool.{} where {} = %s"
    tables = ("blocks", "locations", "prompts", "shared_prefixes", "usage")
    return {table: catalog.value(query.format(table, column), value) for table in tables}


def test_of_an_erased_tenant_nothing_is_left_and_others_keep_everything(catalog: Database) -> None:
    _fill(catalog)
    others = _rows_of(catalog, "tenant", OTHER_TENANT)
    _do(catalog, TenantErased(TENANT, 1))
    assert set(_rows_of(catalog, "tenant", TENANT).values()) == {0}
    assert _rows_of(catalog, "tenant", OTHER_TENANT) == others
    assert trail(catalog.connection, [key(0), key(2000)]) == {}
    assert set(trail(catalog.connection, [key(1000), key(3000)])) == {key(1000), key(3000)}
    catalog.check_sums()


def test_an_erased_tenants_later_epoch_stays(catalog: Database) -> None:
    catalog.write(SEEN, stored([1]), stored([2], tree=tree_of(epoch=1)), asked(1), asked(2, tree=tree_of(epoch=1)))
    _do(catalog, TenantErased(TENANT, 1))
    assert catalog.sql("select key from kvpool.blocks") == [(key(2),)]
    assert catalog.sql("select leaf from kvpool.prompts") == [(key(2),)]


def test_a_removal_goes_on_where_it_stopped_and_ends(catalog: Database) -> None:
    count = erasing.PASS_ROWS * 2 + 17
    catalog.write(SEEN, stored(range(count)))
    done = [write_alone(catalog.connection, NODE, TenantErased(TENANT, 1), passes=1) for _ in range(4)]
    assert done == [False, False, False, True]
    assert catalog.count("locations") == 0


def test_of_a_forgotten_model_nothing_is_left_and_others_keep_everything(catalog: Database) -> None:
    _fill(catalog)
    others = _rows_of(catalog, "fingerprint", OTHER_MODEL)
    _do(catalog, ModelForgotten(MODEL))
    assert set(_rows_of(catalog, "fingerprint", MODEL).values()) == {0}
    assert _rows_of(catalog, "fingerprint", OTHER_MODEL) == others
    assert catalog.sql("select fingerprint from kvpool.models") == [(OTHER_MODEL,)]
    catalog.check_sums()


def test_a_node_that_lost_its_memory_keeps_its_disk_and_other_nodes_theirs(catalog: Database) -> None:
    catalog.write(SEEN, stored([1, 2]), stored([1, 2], tier=TierName.SSD), node=NODE)
    catalog.write(stored([1, 2]), node=OTHER_NODE)
    _do(catalog, TiersCleared((TierName.GPU, TierName.RAM), "restarted", NOW_S))
    expected = {(key(n), tier, node) for n in (1, 2) for tier, node in (("ssd", NODE), ("ram", OTHER_NODE))}
    assert catalog.locations() == expected
    assert trail(catalog.connection, [key(1)]) == {key(1): (TierName.RAM, NODE, "restarted", NOW_S)}
    catalog.check_sums()


def test_a_model_that_people_delete_by_hand_takes_its_rows_and_sums_along(catalog: Database) -> None:
    _fill(catalog)
    catalog.sql("delete from kvpool.models where fingerprint = %s", MODEL)
    assert set(_rows_of(catalog, "fingerprint", MODEL).values()) == {0}
    catalog.check_sums()

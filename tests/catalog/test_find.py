"""What is found is what was asked for, page by page, and nothing that a caller says becomes part of a statement."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.catalog.find import Filters, find_blocks, find_prompts
from kvpool.catalog.metadata import describe_block, describe_prompt
from kvpool.catalog.rows import model_seen
from kvpool.errors import InputError
from tests.catalog.samples import (
    MODEL,
    NOW_S,
    OTHER_IDENTITY,
    OTHER_MODEL,
    OTHER_TENANT,
    SEEN,
    TENANT,
    Database,
    asked,
    key,
    stored,
    tree_of,
)


def _found(catalog: Database, **filters: Any) -> list[bytes]:
    return [row.key for row in find_blocks(catalog.connection, Filters(fingerprint=MODEL, **filters)).rows]


def _asked(catalog: Database, **filters: Any) -> list[bytes]:
    return [row.leaf for row in find_prompts(catalog.connection, Filters(fingerprint=MODEL, **filters)).rows]


def _family(catalog: Database) -> None:
    """1 - 2 - 3, and after 2 also 4 - 5; apart from them 9. Later numbers were used later."""
    catalog.write(SEEN, model_seen(OTHER_IDENTITY, NOW_S))
    for number, parent in ((1, -1), (2, 1), (3, 2), (4, 2), (5, 4), (9, -1)):
        catalog.write(stored([number], parent=key(parent), at_s=NOW_S + number), asked(number, at_s=NOW_S + number))
    catalog.write(stored([20], tree=tree_of(tenant=OTHER_TENANT)), stored([30], tree=tree_of(OTHER_MODEL)))


def test_blocks_are_found_by_model_and_tenant_used_longest_ago_first(catalog: Database) -> None:
    _family(catalog)
    assert _found(catalog, tenant=TENANT) == [key(number) for number in (1, 2, 3, 4, 5, 9)]
    assert _found(catalog, tenant=OTHER_TENANT) == [key(20)]
    assert set(_found(catalog)) == {key(number) for number in (1, 2, 3, 4, 5, 9, 20)}


def test_a_prefix_finds_itself_and_what_comes_after_it(catalog: Database) -> None:
    _family(catalog)
    assert _found(catalog, tenant=TENANT, under=key(2)) == [key(number) for number in (2, 3, 4, 5)]
    assert _asked(catalog, tenant=TENANT, under=key(4)) == [key(4), key(5)]
    assert _found(catalog, tenant=OTHER_TENANT, under=key(2)) == []


def test_older_than_is_by_the_last_use(catalog: Database) -> None:
    _family(catalog)
    assert _found(catalog, tenant=TENANT, used_before_s=NOW_S + 3) == [key(1), key(2)]
    assert _asked(catalog, tenant=TENANT, used_before_s=NOW_S + 3) == [key(1), key(2)]


def test_earlier_epochs_are_not_found(catalog: Database) -> None:
    catalog.write(SEEN, stored([1]), stored([2], tree=tree_of(epoch=1)), asked(1), asked(2, tree=tree_of(epoch=1)))
    assert _found(catalog, tenant=TENANT, epoch=1) == [key(2)]
    assert _asked(catalog, tenant=TENANT, epoch=1) == [key(2)]


def test_metadata_is_found_by_what_it_contains(catalog: Database) -> None:
    _family(catalog)
    describe_block(catalog.connection, key(3), {"app": "chat", "tags": ["a", "b"], "deep": {"x": 1, "y": 2}}, 1)
    prompt = catalog.value("select id from kvpool.prompts where leaf = %s", key(3))
    describe_prompt(catalog.connection, prompt, {"app": "chat"}, 1)
    for where in ({"app": "chat"}, {"tags": ["b"]}, {"deep": {"y": 2}}, {"app": "chat", "deep": {"x": 1}}):
        assert _found(catalog, tenant=TENANT, where=where) == [key(3)]
    assert _found(catalog, tenant=TENANT, where={"app": "other"}) == []
    assert _asked(catalog, where={"app": "chat"}) == [key(3)]


def test_what_a_caller_says_is_no_sql(catalog: Database) -> None:
    _family(catalog)
    nasty = "'; drop table kvpool.blocks; --"
    assert _found(catalog, tenant=TENANT, where={nasty: nasty, "%(limit)s": "%s"}) == []
    assert catalog.count("blocks") == 8


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.integers(0, 3), max_size=12), limit=st.integers(1, 5), one_tenant=st.booleans())
def test_pages_joined_are_the_whole(catalog: Database, times: list[int], limit: int, one_tenant: bool) -> None:
    catalog.sql("truncate kvpool.models, kvpool.blocks cascade")
    catalog.write(SEEN)
    for number, at in enumerate(times):
        tree = tree_of(tenant=TENANT if one_tenant or number % 2 else OTHER_TENANT)
        used_s = NOW_S + at + 0.123457
        catalog.write(stored([number], tree=tree, at_s=used_s), asked(number, tree=tree, at_s=used_s))
    for find, name in ((find_blocks, "key"), (find_prompts, "leaf")):
        got, after = [], None
        while True:
            page = find(catalog.connection, Filters(fingerprint=MODEL, limit=limit, after=after))
            got += [getattr(row, name) for row in page.rows]
            assert len(page.rows) <= limit
            after = page.next
            if after is None:
                break
        assert len(got) == len(times)
        assert set(got) == {key(number) for number in range(len(times))}


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 10_001}, {"where": {"x": object()}}])
def test_what_cannot_be_asked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Filters(fingerprint=MODEL, **wrong)

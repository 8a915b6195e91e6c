"""Notes are changed by one at a time; who comes second is told so, and the last versions are kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvpool.catalog.metadata import (
    KEPT_VERSIONS,
    MAX_BYTES,
    LostRaceError,
    describe_block,
    describe_model,
    describe_prompt,
)
from kvpool.errors import InputError
from tests.catalog.connecting import bare
from tests.catalog.samples import MODEL, SEEN, Database, asked, key, stored

Change = Callable[[Any, dict[str, Any], int], int]


def _changes(catalog: Database) -> dict[str, Change]:
    catalog.write(SEEN, stored([1]), asked(1))
    prompt = catalog.value("select id from kvpool.prompts")
    return {
        "models": lambda connection, noted, version: describe_model(connection, MODEL, noted, version),
        "prompts": lambda connection, noted, version: describe_prompt(connection, prompt, noted, version),
        "blocks": lambda connection, noted, version: describe_block(connection, key(1), noted, version),
    }


@pytest.mark.parametrize("of", ["models", "prompts", "blocks"])
def test_a_change_against_an_old_version_is_refused_with_the_new_one(catalog: Database, of: str) -> None:
    change = _changes(catalog)[of]
    assert change(catalog.connection, {"owner": "ann"}, 1) == 2
    with pytest.raises(LostRaceError, match="read as version 1, and it has version 2 now"):
        change(catalog.connection, {"owner": "bob"}, 1)
    assert catalog.value(f"select metadata from kvpool.{of}") == {"owner": "ann"}  # noqa: S608 - a table's name


@pytest.mark.parametrize("of", ["models", "prompts", "blocks"])
def test_of_those_who_race_exactly_one_wins_each_version(catalog: Database, of: str) -> None:
    change = _changes(catalog)[of]

    def add_one(_: int) -> None:
        with bare(catalog.folder) as connection:
            for _ in range(10):
                while True:
                    query = f"select metadata, version from kvpool.{of}"  # noqa: S608 - a table's name
                    row = connection.execute(query.encode()).fetchone()
                    assert row is not None
                    try:
                        change(connection, {"count": row[0].get("count", 0) + 1}, row[1])
                        break
                    except LostRaceError:
                        continue

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(add_one, range(3)))
    assert catalog.sql(f"select metadata, version from kvpool.{of}") == [({"count": 30}, 31)]  # noqa: S608 - as above


@pytest.mark.parametrize(("of", "history"), [("models", "model_history"), ("prompts", "prompt_history")])
def test_the_last_versions_are_kept_and_no_more(catalog: Database, of: str, history: str) -> None:
    change = _changes(catalog)[of]
    for version in range(1, 25):
        change(catalog.connection, {"is": version + 1}, version)
    rows = catalog.sql(f"select version, metadata from kvpool.{history} order by 1")  # noqa: S608 - a table's name
    assert [version for version, _ in rows] == list(range(25 - KEPT_VERSIONS, 25))
    assert rows[-1] == (24, {"is": 24})


def test_notes_about_what_is_gone_are_refused(catalog: Database) -> None:
    with pytest.raises(LostRaceError, match="it is gone"):
        describe_model(catalog.connection, MODEL, {}, 1)


@pytest.mark.parametrize("noted", [{"x": float("nan")}, {"x": object()}, {"x": "y" * MAX_BYTES}])
def test_notes_that_json_cannot_hold_or_that_are_too_long_are_refused(catalog: Database, noted: dict[str, Any]) -> None:
    catalog.write(SEEN)
    with pytest.raises(InputError):
        describe_model(catalog.connection, MODEL, noted, 1)

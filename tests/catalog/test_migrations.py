"""The schema is brought up to date by whoever comes first, and left alone where it is ahead."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from kvpool.catalog.migrations import (
    CatalogDifferentError,
    CatalogTooNewError,
    Migration,
    Schema,
    check_version,
    migrate,
    migrations,
    newest_version,
)
from kvpool.tiers.tier import TierUnavailableError
from tests.catalog.connecting import address_of, bare
from tests.catalog.samples import Database

PROCESSES = 10


def _migrate_at_once(
    folder: Path, barrier: multiprocessing.synchronize.Barrier, answers: multiprocessing.Queue[int]
) -> None:
    with bare(folder) as connection:
        barrier.wait()
        answers.put(migrate(connection))


def test_ten_processes_that_start_at_once_apply_every_step_once(empty_database: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=_migrate_at_once, args=(empty_database, barrier, answers)) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    applied = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sum(applied) == len(migrations())
    with bare(empty_database) as connection:
        recorded = connection.execute("select version, checksum from kvpool.migrations order by 1").fetchall()
    assert recorded == [(step.version, step.checksum) for step in migrations()]


def test_steps_are_numbered_from_one_without_gaps() -> None:
    assert [step.version for step in migrations()] == list(range(1, newest_version() + 1))


def test_a_schema_that_is_up_to_date_is_not_touched(catalog: Database) -> None:
    catalog.sql("set default_transaction_read_only = on")
    assert migrate(catalog.connection) == 0


def test_a_newer_schema_is_refused_with_both_versions(catalog: Database) -> None:
    newer = newest_version() + 1
    catalog.sql("insert into kvpool.migrations (version, name, checksum) values (%s, 'later', 'x')", newer)
    for refused in (lambda: migrate(catalog.connection), lambda: check_version(catalog.connection)):
        with pytest.raises(CatalogTooNewError, match=f"has version {newer}.*up to {newer - 1}.*knows version {newer}"):
            refused()
    with pytest.raises(TierUnavailableError):
        migrate(catalog.connection)


def test_a_newer_program_is_noticed_while_this_one_runs(catalog: Database) -> None:
    now_s = [0.0]
    schema = Schema(clock=lambda: now_s[0])
    schema.ready(catalog.connection)
    catalog.sql("insert into kvpool.migrations (version, name, checksum) values (999, 'later', 'x')")
    schema.ready(catalog.connection)
    now_s[0] = 11.0
    with pytest.raises(CatalogTooNewError):
        schema.ready(catalog.connection)


def test_a_step_that_was_applied_in_another_form_is_refused(catalog: Database) -> None:
    catalog.sql("update kvpool.migrations set checksum = 'x' where version = 1")
    with pytest.raises(CatalogDifferentError, match="step 1"):
        migrate(catalog.connection)


def test_a_step_that_fails_leaves_nothing_and_those_before_it_stay(empty_database: Path) -> None:
    steps = (
        Migration(1, "good", "create table kvpool.good (id int);"),
        Migration(2, "bad", "create table kvpool.half (id int); select 1 / 0;"),
    )
    with bare(empty_database) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            migrate(connection, steps)
        tables = connection.execute("select relname from pg_class where relname in ('good', 'half')").fetchall()
        assert tables == [("good",)]
        assert migrate(connection, (steps[0], Migration(2, "mended", "create table kvpool.half (id int)"))) == 1


def test_a_user_who_may_not_create_schemas_needs_only_the_schema(empty_database: Path) -> None:
    address = address_of(empty_database)
    with bare(empty_database) as admin:
        user, password = f"plain_{id(admin):x}", "a password"
        name = sql.Identifier(user)
        admin.execute(sql.SQL("create role {} login password {}").format(name, sql.Literal(password)))
        try:
            admin.execute(sql.SQL("create schema kvpool authorization {}").format(name))
            with psycopg.connect(address.url, user=user, password=password, autocommit=True) as connection:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute("create schema another")
                assert migrate(connection) == len(migrations())
        finally:
            admin.execute(sql.SQL("drop owned by {} cascade").format(name))
            admin.execute(sql.SQL("drop role {}").format(name))

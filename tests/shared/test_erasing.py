"""What is erased is matched by nobody any more: on no node, from no tier, whatever was away meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, LiteralString

from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.tiers.dragonfly.names import parts_of, tenant_pattern
from kvpool.tiers.tier import TierName
from tests.local.clients import postgres_client
from tests.local.servers import Server
from tests.pool.kv import MIB, check, flushed, load, matched, prompt, spec, store
from tests.tiers.dragonfly.servers import client_of
from tests.waiting import eventually

from .pools import (
    EMBEDDED_QDRANT,
    catalog_of,
    in_normal_mode,
    looked_up,
    open_shared,
    prompts_of,
    remote_of,
    reported,
)

DRAGONFLY, DATABASE, RAM, SSD = TierName.DRAGONFLY, TierName.DATABASE, TierName.RAM, TierName.SSD
GONE, STAYS = "gone", "stays"
CLEARED_S = 40.0
"""Each tier is cleared twice, some seconds apart."""
_OF_TENANT: dict[str, LiteralString] = {
    "payloads": "select count(*) from kvpool.payloads where tenant = %s and epoch < %s",
    "blocks": "select count(*) from kvpool.blocks where tenant = %s and epoch < %s",
    "prompts": "select count(*) from kvpool.prompts where tenant = %s and epoch < %s",
    "shared": "select count(*) from kvpool.shared_prefixes where tenant = %s and epoch < %s",
}


def left_of(pool: Pool, tenant: str, redis: Path | None, postgres: Path | None) -> dict[str, int]:
    """What there is in shared tiers of the tenant's epochs before the one that this pool knows."""
    digest = pool._engine.tenants.digest(tenant)
    epoch = pool._engine.tenants.epochs.of(digest)
    found: dict[str, int] = {}
    if redis is not None:
        with client_of(redis) as client:
            parts = [parts_of(name) for name in client.scan_iter(tenant_pattern(digest))]
        found["redis"] = sum(part is not None and part.epoch < epoch for part in parts)
    if postgres is not None:
        with postgres_client(postgres) as connection:
            for table, query in _OF_TENANT.items():
                row = connection.execute(query, [digest, epoch]).fetchone()
                assert row is not None
                found[table] = row[0]
    return {place: count for place, count in found.items() if count}


def trees_of_tenant(pool: Pool, tenant: str) -> list[int]:
    """The epochs of the trees in which something of this tenant could be matched."""
    digest = pool._engine.tenants.digest(tenant)
    index = pool._engine.index
    with index.lock:
        trees = [tree for tree in index.trees.values() if tree.id.tenant == digest]
        return [tree.id.epoch for tree in trees if any(node.blocks for node in tree.nodes())]


def test_erasing_covers_every_tier_of_every_node(tmp_path: Path, dragonfly: Path, postgres: Path) -> None:
    servers: dict[str, Any] = {"dragonfly": dragonfly, "database": postgres, "ssd": 8 * MIB}
    with (
        open_shared(tmp_path / "one", name="one", **servers) as one,
        open_shared(tmp_path / "two", name="two", **servers) as two,
    ):
        ours, theirs = one.register(spec()), two.register(spec())
        for tenant in (GONE, STAYS):
            store(ours, prompt(8, seed=1), tenant)
            store(theirs, prompt(6, seed=2), tenant)
        reported(one)
        reported(two)
        assert looked_up(ours, prompt(6, seed=2), GONE) == {DRAGONFLY: 6}
        reported(one)
        report = one.erase(tenant=GONE, deadline_s=20.0)
        assert report.epoch == 1
        assert report.blocks == {RAM: 14, SSD: 8, DRAGONFLY: 14, DATABASE: 14}
        assert (report.pending_tiers, report.unconfirmed_nodes, report.catalog_told) == ((), (), True)
        for model, seed, blocks in ((ours, 1, 8), (theirs, 2, 6)):
            assert looked_up(model, prompt(blocks, seed), GONE) == {}
            assert load(model, prompt(blocks, seed), STAYS) == blocks
        eventually(lambda: left_of(one, GONE, dragonfly, postgres) == {}, "nothing is left of it")
        for pool in (one, two):
            assert trees_of_tenant(pool, GONE) in ([], [1])
            check(pool, [])
        assert catalog_of(one).stats.dropped_rows == {}
    for directory, seed, blocks in ((tmp_path / "one", 1, 8), (tmp_path / "two", 2, 6)):
        with open_shared(directory, ssd=8 * MIB) as pool:  # with nobody to ask
            assert trees_of_tenant(pool, GONE) == []
            assert len(trees_of_tenant(pool, STAYS)) == 1
            assert matched(pool.model("m"), prompt(blocks, seed), GONE) == 0
            assert load(pool.model("m"), prompt(blocks, seed), STAYS) == blocks


def test_vectors_of_an_erased_tenants_prompts_go_too(tmp_path: Path, postgres: Path) -> None:
    with open_shared(tmp_path / "one", database=postgres, database_options=EMBEDDED_QDRANT) as pool:
        model = pool.register(spec())
        for seed in range(3):
            store(model, prompt(4, seed), GONE)
        store(model, prompt(4, seed=1), STAYS)
        assert prompts_of(pool).flush(CLEARED_S)
        vectors = prompts_of(pool)._vectors
        assert vectors is not None
        assert vectors.count() == 4
        pool.erase(tenant=GONE)
        eventually(lambda: vectors.count() == 1, "only the other tenant's is left")


@contextmanager
def writers(models: list[Model], seeds: range) -> Iterator[None]:
    """Threads that store prompts of the tenant, and load them, while the block runs."""
    ended = threading.Event()
    errors: list[BaseException] = []

    def write(model: Model, number: int) -> None:
        random = Random(number)
        try:
            while not ended.is_set():
                tokens = prompt(1 + random.randrange(8), seed=random.choice(seeds))
                store(model, tokens, GONE)
                looked_up(model, tokens, GONE)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(model, number)) for number, model in enumerate(models)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_writers_on_two_nodes_that_race_with_an_erasure_leave_nothing_of_before(
    tmp_path: Path, dragonfly: Path, postgres: Path
) -> None:
    servers: dict[str, Any] = {"dragonfly": dragonfly, "database": postgres, "ssd": 8 * MIB}
    with (
        open_shared(tmp_path / "one", name="one", **servers) as one,
        open_shared(tmp_path / "two", name="two", **servers) as two,
    ):
        ours, theirs = one.register(spec()), two.register(spec())
        with writers([ours, ours, theirs, theirs], range(100, 110)):
            for number in range(1, 4):
                before = prompt(4, seed=number)
                store(ours, before, GONE)
                store(theirs, before, GONE)
                report = (one, two)[number % 2].erase(tenant=GONE, deadline_s=20.0)
                assert (report.epoch, report.unconfirmed_nodes, report.catalog_told) == (number, (), True)
                assert looked_up(ours, before, GONE) == {}
                assert looked_up(theirs, before, GONE) == {}
        for pool in (one, two):
            eventually(lambda pool=pool: remote_of(pool).eraser.pending == 0, "cleared twice", CLEARED_S)  # type: ignore[misc]
            reported(pool)
        eventually(lambda: left_of(one, GONE, dragonfly, postgres) == {}, "nothing of before is left")
        for pool in (one, two):
            check(pool, [])
            eventually(lambda pool=pool: set(trees_of_tenant(pool, GONE)) <= {3}, "nor here")  # type: ignore[misc]


def test_a_node_that_was_down_is_named_and_serves_nothing_of_it_when_it_comes_back_with_all_servers_away(
    tmp_path: Path, own_redis: Server, own_postgres: Server
) -> None:
    servers: dict[str, Any] = {"dragonfly": own_redis.folder, "database": own_postgres.folder, "ssd": 8 * MIB}
    down = {"name": "down", **servers}
    with ExitStack() as stack:
        one = stack.enter_context(open_shared(tmp_path / "one", name="one", **servers))
        ours = one.register(spec())
        with open_shared(tmp_path / "down", **down) as pool:
            for tenant in (GONE, STAYS):
                store(pool.register(spec()), prompt(8, seed=1), tenant)
            reported(pool)
        report = one.erase(tenant=GONE, deadline_s=1.0)
        assert [name.partition("@")[0] for name in report.unconfirmed_nodes] == ["down"]
        assert report.blocks == {RAM: 0, SSD: 0, DRAGONFLY: 8, DATABASE: 8} or report.blocks == {
            DRAGONFLY: 8, DATABASE: 8,
        }  # fmt: skip
        own_postgres.stop()
        own_redis.stop()
        with open_shared(tmp_path / "down", **down) as pool:
            model = pool.model("m")
            assert pool.stats().mode == "memory-only"
            for tenant in (GONE, STAYS):
                assert looked_up(model, prompt(8, seed=1), tenant) == {}, "nobody knows yet who was erased"
            own_redis.start()
            own_postgres.start()
            in_normal_mode(pool)
            assert looked_up(model, prompt(8, seed=1), GONE) == {}
            assert looked_up(model, prompt(8, seed=1), STAYS) == {SSD: 8}
            check(pool, [])
            in_normal_mode(one)
            again = one.erase(tenant="somebody", deadline_s=20.0)
            assert again.unconfirmed_nodes == (), "now it knows"
        assert looked_up(ours, prompt(8, seed=1), GONE) == {}


def test_an_erasure_while_the_catalog_is_away_holds_here_at_once_and_elsewhere_once_it_is_back(
    tmp_path: Path, own_postgres: Server
) -> None:
    with (
        open_shared(tmp_path / "one", name="one", database=own_postgres.folder) as one,
        open_shared(tmp_path / "two", name="two", database=own_postgres.folder) as two,
    ):
        ours, theirs = one.register(spec()), two.register(spec())
        store(ours, prompt(4), GONE)
        reported(one)
        assert looked_up(theirs, prompt(4), GONE) == {DATABASE: 4}
        own_postgres.kill()
        report = one.erase(tenant=GONE, deadline_s=0.5)
        assert not report.catalog_told
        assert report.pending_tiers == (DATABASE,)
        assert looked_up(ours, prompt(4), GONE) == {}
        own_postgres.start()
        eventually(lambda: matched(theirs, prompt(4), GONE) == 0, "the other node hears of it")
        eventually(lambda: left_of(one, GONE, None, own_postgres.folder) == {}, "nothing is left of it")
        in_normal_mode(one)
        assert one.erase(tenant="somebody").unconfirmed_nodes == ()


def test_an_erasure_that_a_killed_node_made_without_the_catalog_is_told_by_its_next_process(
    tmp_path: Path, own_postgres: Server
) -> None:
    database: dict[str, Any] = {"database": own_postgres.folder}
    with open_shared(tmp_path / "two", name="two", **database) as two:
        theirs = two.register(spec())
        store(theirs, prompt(4), GONE)
        reported(two)
        with open_shared(tmp_path / "one", name="one", **database) as one:
            assert looked_up(one.register(spec()), prompt(4), GONE) == {DATABASE: 4}
            own_postgres.kill()
            assert not one.erase(tenant=GONE, deadline_s=0.2).catalog_told
        own_postgres.start()
        in_normal_mode(two)
        assert load(theirs, prompt(4), GONE) == 4, "nobody has told it"
        with open_shared(tmp_path / "one", name="one", **database):
            eventually(lambda: matched(theirs, prompt(4), GONE) == 0, "it is told")
            assert looked_up(theirs, prompt(4), GONE) == {}


def test_an_epoch_that_cannot_be_made_durable_counts_at_once_and_is_confirmed_once_it_is(
    tmp_path: Path, postgres: Path
) -> None:
    with (
        open_shared(tmp_path / "one", name="one", database=postgres) as one,
        open_shared(tmp_path / "two", name="two", database=postgres) as two,
    ):
        ours, theirs = one.register(spec()), two.register(spec())
        store(theirs, prompt(4), GONE)
        reported(two)
        epochs = tmp_path / "two" / "EPOCHS"
        epochs.rename(tmp_path / "put-by")
        epochs.mkdir()
        assert [name.partition("@")[0] for name in one.erase(tenant=GONE, deadline_s=3.0).unconfirmed_nodes] == ["two"]
        assert matched(theirs, prompt(4), GONE) == 0
        assert looked_up(theirs, prompt(4), GONE) == {}
        epochs.rmdir()
        assert one.erase(tenant="somebody", deadline_s=20.0).unconfirmed_nodes == ()
        del ours
    with open_shared(tmp_path / "two", name="two") as two:
        assert two._engine.tenants.epochs.of(two._engine.tenants.digest(GONE)) == 1


def test_without_a_catalog_other_nodes_hear_of_an_erasure_from_dragonfly(tmp_path: Path, own_redis: Server) -> None:
    with (
        open_shared(tmp_path / "one", dragonfly=own_redis.folder) as one,
        open_shared(tmp_path / "two", dragonfly=own_redis.folder) as two,
    ):
        ours, theirs = one.register(spec()), two.register(spec())
        store(theirs, prompt(4), GONE)
        flushed(two)
        assert looked_up(ours, prompt(4), GONE) == {DRAGONFLY: 4}
        assert one.erase(tenant=GONE).blocks[DRAGONFLY] == 4
        eventually(lambda: matched(theirs, prompt(4), GONE) == 0, "it hears of it, though it looks nothing up")
        assert looked_up(theirs, prompt(5), GONE) == {}


def test_without_a_catalog_an_erasure_while_dragonfly_is_away_is_told_when_it_is_back(
    tmp_path: Path, own_redis: Server
) -> None:
    with (
        open_shared(tmp_path / "one", dragonfly=own_redis.folder) as one,
        open_shared(tmp_path / "two", dragonfly=own_redis.folder) as two,
    ):
        theirs = two.register(spec())
        store(theirs, prompt(4), GONE)
        flushed(two)
        own_redis.stop()
        assert one.erase(tenant=GONE, deadline_s=0.1).pending_tiers == (DRAGONFLY,)
        own_redis.start()
        in_normal_mode(one)
        in_normal_mode(two)
        eventually(lambda: looked_up(theirs, prompt(5), GONE) == {}, "it hears of it")
        eventually(lambda: left_of(one, GONE, own_redis.folder, None) == {}, "and nothing is left")

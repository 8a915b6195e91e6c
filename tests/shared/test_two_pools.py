"""Pools that share nothing but a server: what one has stored, another serves, cold; and nothing that it may not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from kvpool.api.codec import Codec
from kvpool.codecs import NUMBERS
from kvpool.config import RuntimeConfig
from kvpool.pool.model import Model
from kvpool.pool.node_file import load_or_create_node
from kvpool.pool.pool import Pool
from kvpool.pool.stats import SharedShareStats
from kvpool.tiers.dragonfly.names import PREFIX
from kvpool.tiers.tier import TierName
from tests.local.clients import postgres_client
from tests.pool.kv import DEADLINE_S, MIB, RECORD, check, flushed, prompt, spec, store
from tests.pool.test_pool_codecs import BOUND, Floats
from tests.tiers.dragonfly.servers import client_of
from tests.waiting import eventually

from .neighbour import neighbour
from .pools import looked_up, open_shared, reported, shared_config

DRAGONFLY, DATABASE, RAM = TierName.DRAGONFLY, TierName.DATABASE, TierName.RAM
INT8 = Codec.INT8_ASYMMETRIC


@pytest.mark.parametrize("tier", [DRAGONFLY, DATABASE])
def test_a_cold_process_serves_what_another_process_has_stored(tmp_path: Path, tier: TierName, request: Any) -> None:
    folder: Path = request.getfixturevalue({DRAGONFLY: "dragonfly", DATABASE: "postgres"}[tier])
    server: dict[str, Any] = {tier.value: folder}
    warm, cold = ((tmp_path / name, shared_config(tmp_path / name, **server)) for name in ("warm", "cold"))
    with neighbour(*warm) as first:
        assert first.ask("store", "m", "acme", 50, 1) == [50, 0]
        assert first.ask("flush")
    with neighbour(*cold) as second:
        assert second.ask("serve", "m", "acme", 50, 1) == {tier.value: 50}
        assert second.ask("serve", "m", "acme", 50, 1) == {RAM.value: 50}
        assert second.ask("serve", "m", "acme", 50, 2) == {}
        assert second.ask("serve", "m", "other", 50, 1) == {}
        assert second.ask("serve", "n", "acme", 50, 1) == {}
        assert not second.ask("torch"), "pools without a lossy codec or a GPU do without torch"


def test_a_cold_pool_serves_what_another_goes_on_to_store(tmp_path: Path, dragonfly: Path, postgres: Path) -> None:
    servers: dict[str, Any] = {"dragonfly": dragonfly, "database": postgres}
    tokens = prompt(40)
    with open_shared(tmp_path / "one", **servers) as one, open_shared(tmp_path / "two", **servers) as two:
        ours, theirs = one.register(spec()), two.register(spec())
        for blocks, known in ((10, 0), (25, 10), (40, 25)):
            store(ours, tokens[: blocks * 4])
            flushed(one)
            served = looked_up(theirs, tokens)
            assert served.get(RAM, 0) == known
            assert sum(served.values()) == blocks
        check(two, [])
        assert two.stats().mode == "normal"


def test_a_prompt_longer_than_the_memory_of_either_pool_is_served_as_far_as_it_fits(
    tmp_path: Path, dragonfly: Path
) -> None:
    tokens = prompt(60)
    with open_shared(tmp_path / "one", dragonfly=dragonfly, ram=80 * RECORD) as one:
        store(one.register(spec()), tokens)
        flushed(one)
    with open_shared(tmp_path / "two", dragonfly=dragonfly, ram=24 * RECORD) as two:
        model = two.register(spec())
        for _ in range(3):
            assert 12 <= sum(looked_up(model, tokens).values()) <= 24
        check(two, [])


@pytest.mark.parametrize("tier", [DRAGONFLY, DATABASE])
def test_a_lossless_pool_never_gets_a_lossy_record_and_a_lossy_one_reads_both(
    tmp_path: Path, tier: TierName, request: Any
) -> None:
    folder: Path = request.getfixturevalue({DRAGONFLY: "dragonfly", DATABASE: "postgres"}[tier])

    def pool(name: str, codec: Codec, **options: Any) -> Pool:
        server: dict[str, Any] = {tier.value: folder, f"{tier.value}_options": {"codec": codec}}
        return open_shared(tmp_path / name, **server, **options)

    with pool("lossless", Codec.NONE) as lossless, pool("lossy", INT8, ram=64 * RECORD, ssd=8 * MIB) as lossy:
        exact, small = lossless.register(spec()), lossy.register(spec())
        stored(small, seed=1)
        stored(exact, seed=2)
        for each in (lossless, lossy):
            flushed(each)
        assert arrived(exact, seed=1) == [], "int8 is not read"
        assert arrived(small, seed=2) == [0.0] * BLOCKS, "what was not encoded is read, and is as it was"
        assert arrived(small, seed=1) == [0.0] * BLOCKS, "it is in memory as it was stored"
    with pool("also-lossy", INT8) as other:
        errors = arrived(other.register(spec()), seed=1)
        assert len(errors) == BLOCKS
        assert all(0.0 < error < BOUND[INT8] for error in errors), "another pool of that codec reads it"
    with pool("also-lossless", Codec.NONE) as other:
        model = other.register(spec())
        assert arrived(model, seed=1) == []
        assert arrived(model, seed=2) == [0.0] * BLOCKS
        stored(model, seed=1)
        flushed(other)
        assert arrived(model, seed=1) == [0.0] * BLOCKS
    with pool("third-lossless", Codec.NONE) as other:
        assert arrived(other.register(spec()), seed=1) == [0.0] * BLOCKS, "both records of a block are kept"


def test_a_key_in_dragonfly_says_the_codec_and_names_nobody(tmp_path: Path, dragonfly: Path) -> None:
    with open_shared(tmp_path / "lossy", dragonfly=dragonfly, dragonfly_options={"codec": INT8}) as pool:
        stored(pool.register(spec("secret-model")), seed=1, tenant="secret-tenant")
        flushed(pool)
    with client_of(dragonfly) as client:
        names = list(client.scan_iter(f"{PREFIX}*"))
        assert {int(name.split(b":")[5]) for name in names} == {NUMBERS[INT8]}
        assert all(client.pttl(name) > 0 for name in names), "nothing is kept without an end"
        assert not any(b"secret" in name for name in client.scan_iter("*"))


def test_pools_with_other_quotas_serve_each_others_blocks(tmp_path: Path, dragonfly: Path) -> None:
    quotas = [{"name": "m", "quotas": {"dragonfly": {"limitBytes": 8 * RECORD}, "ram": {"limitBytes": 30 * RECORD}}}]
    narrow = shared_config(tmp_path / "narrow", dragonfly=dragonfly).model_dump(mode="json", by_alias=True)
    with (
        Pool.open(RuntimeConfig.model_validate({**narrow, "models": quotas}),
                  directory=tmp_path / "narrow") as one,
        open_shared(tmp_path / "wide", dragonfly=dragonfly) as two,
    ):  # fmt: skip
        limited, free = one.register(spec()), two.register(spec())
        store(limited, prompt(20, seed=1))
        store(free, prompt(20, seed=2))
        flushed(one)
        flushed(two)
        assert sum(looked_up(limited, prompt(20, seed=2)).values()) == 20, "its limit is on what it writes"
        assert sum(looked_up(free, prompt(20, seed=1)).values()) <= 8
        share = one.stats().accounts[0].shared[DRAGONFLY]
        assert 0 < share.used_bytes <= share.limit_bytes == 8 * RECORD
        assert two.stats().accounts[0].shared == {}
        check(one, [])


def test_a_models_limit_in_the_database_holds_for_all_pools_together(tmp_path: Path, postgres: Path) -> None:
    quotas = [{"name": "m", "quotas": {"database": {"limitBytes": 8 * RECORD}}}]
    pools = []
    with ExitStack() as stack:
        for name in ("one", "two"):
            config = shared_config(tmp_path / name, database=postgres).model_dump(mode="json", by_alias=True)
            limited = RuntimeConfig.model_validate({**config, "models": quotas})
            pools.append(stack.enter_context(Pool.open(limited, directory=tmp_path / name)))
        for seed, pool in enumerate(pools):
            store(pool.register(spec()), prompt(20, seed=seed))
            flushed(pool)

        def shares() -> list[SharedShareStats]:
            return [pool.stats().accounts[0].shared[DATABASE] for pool in pools]

        eventually(
            lambda: all(0 < share.used_bytes <= 8 * RECORD for share in shares()), "both say what both have there"
        )
        assert {share.limit_bytes for share in shares()} == {8 * RECORD}


def test_the_catalog_says_on_which_node_and_in_which_shared_tier_a_block_lies(
    tmp_path: Path, dragonfly: Path, postgres: Path
) -> None:
    servers: dict[str, Any] = {"dragonfly": dragonfly, "database": postgres}
    with open_shared(tmp_path / "one", **servers) as one, open_shared(tmp_path / "two", **servers) as two:
        store(one.register(spec()), prompt(6))
        reported(one)
        assert looked_up(two.register(spec()), prompt(6)) == {DRAGONFLY: 6}
        reported(two)
        with postgres_client(postgres) as connection:
            rows = connection.execute(
                "select tier, node, count(*) from kvpool.locations group by 1, 2 order by 1, 2"
            ).fetchall()
        nodes = sorted(load_or_create_node(pool.directory) for pool in (one, two))
        everybody = UUID(int=0)
        assert rows == [
            ("database", everybody, 6), ("dragonfly", everybody, 6), ("ram", nodes[0], 6), ("ram", nodes[1], 6)
        ]  # fmt: skip


BLOCKS = 6


def stored(model: Model, *, seed: int, tenant: str = "default") -> None:
    assert model.store(prompt(BLOCKS, seed), Floats(model, seed), tenant=tenant).stored == BLOCKS


def arrived(model: Model, *, seed: int) -> Sequence[float]:
    """The relative error of each block that a lookup brings."""
    floats = Floats(model, seed)
    with model.match(prompt(BLOCKS, seed)) as lease:
        lease.wait(DEADLINE_S)
        blocks = lease.load(floats) // model.layout.block_tokens
    assert list(floats.arrived) == list(range(blocks))
    return [0.0 if np.array_equal(payload.view(np.float32), floats.values(at)) else floats.error(at)
            for at, payload in floats.arrived.items()]  # fmt: skip

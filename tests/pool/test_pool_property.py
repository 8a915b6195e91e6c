"""The whole pool against a naive model: what was stored, and not erased since, is an upper bound of what is there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import Verdict
from kvpool.prefix.node import RAM
from tests.waiting import eventually

from .disks import SickDisk
from .kv import (
    BLOCK_TOKENS,
    KIB,
    LAYOUT,
    RECORD,
    WIDE,
    Prompt,
    check_chains_on_ssd,
    check_index,
    config,
    disk_usage,
    empty_ram,
    flushed,
    is_within_capacity,
    open_pool,
    spec,
)

MODELS = {"small": LAYOUT, "wide": WIDE}
TENANTS = ("acme", "other")


class Asked(NamedTuple):
    """A prompt of one model and tenant; each block is one of three, with an extra key or without."""

    model: str
    tenant: str
    blocks: tuple[tuple[int, bytes], ...]
    more_tokens: int

    @property
    def tokens(self) -> list[int]:
        tokens = [1000 * block + at for block, _ in self.blocks for at in range(BLOCK_TOKENS)]
        return tokens + [7] * self.more_tokens

    @property
    def extras(self) -> dict[int, bytes]:
        return {at: extra for at, (_, extra) in enumerate(self.blocks) if extra}

    def prefixes(self, depth: int) -> set[tuple[str, str, tuple[tuple[int, bytes], ...]]]:
        return {(self.model, self.tenant, self.blocks[: end + 1]) for end in range(depth)}


@dataclass
class Held:
    """A lease that is kept open."""

    asked: Asked
    lease: Lease
    sink_salt: str


blocks = st.tuples(st.integers(0, 2), st.sampled_from([b"", b"", b"", b"", b"x"]))
asked = st.builds(
    Asked,
    model=st.sampled_from(sorted(MODELS)),
    tenant=st.sampled_from(TENANTS),
    blocks=st.lists(blocks, max_size=7).map(tuple),
    more_tokens=st.integers(0, BLOCK_TOKENS - 1),
)
ram_bytes = st.integers(4, 14).map(lambda blocks: blocks * WIDE.record_bytes // 2 + RECORD)
ssd_bytes = st.sampled_from([160 * KIB, 256 * KIB, 512 * KIB])


class PoolAgainstModel(RuleBasedStateMachine):
    @initialize(ram=ram_bytes, ssd=st.none() | ssd_bytes, second_hit=st.booleans())
    def open(self, ram: int, ssd: int | None, second_hit: bool) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a directory of our own is made
        self.base = Path(tempfile.mkdtemp(prefix="kvpool-test-", dir=memory))
        self.generation = 0
        self.options: dict[str, Any] = {"ram": ram, "ssd": ssd}
        if ssd is not None:
            self.options["secondHit"] = second_hit
        self.stored: set[tuple[str, str, tuple[tuple[int, bytes], ...]]] = set()
        self.erasures = dict.fromkeys(TENANTS, 0)
        self.held: list[Held] = []
        self._open()

    def _open(self) -> None:
        self.disk = SickDisk()
        self.was_ill = False
        self.pool: Pool = open_pool(self.directory, disk=self.disk, **self.options)
        self.models: dict[str, Model] = {
            name: self.pool.register(spec(name, layout=layout)) for name, layout in MODELS.items()
        }

    @property
    def directory(self) -> Path:
        return self.base / str(self.generation)

    def _salt(self, tenant: str) -> str:
        return f"{tenant} {self.erasures[tenant]}"

    def _match(self, asked: Asked) -> Lease:
        lease = self.models[asked.model].match(asked.tokens, tenant=asked.tenant, extra_keys=asked.extras)
        assert lease.blocks <= len(asked.blocks)
        assert asked.prefixes(lease.blocks) <= self.stored, "nothing is promised that was not stored"
        return lease

    def _load(self, asked: Asked, lease: Lease, salt: str) -> int:
        sink = Prompt(self.models[asked.model], asked.tokens, salt, asked.extras)
        arrived = lease.load(sink) // BLOCK_TOKENS
        assert sink.wrong == []
        assert sink.written == list(range(arrived))
        assert arrived <= lease.blocks
        assert sum(lease.served.values()) == arrived
        return arrived

    @rule(asked=asked)
    def store(self, asked: Asked) -> None:
        model = self.models[asked.model]
        source = Prompt(model, asked.tokens, self._salt(asked.tenant), asked.extras)
        result = model.store(asked.tokens, source, tenant=asked.tenant, extra_keys=asked.extras)
        refused = sum(result.refused.values())
        assert result.stored + result.already_there + refused == len(asked.blocks)
        assert all(result.refused.values())
        there = result.stored + result.already_there
        assert result.already_there == 0 or asked.prefixes(1) <= self.stored
        self.stored |= asked.prefixes(there)

    @rule(asked=asked)
    def load(self, asked: Asked) -> None:
        flushed(self.pool)
        with self._match(asked) as lease:
            arrived = self._load(asked, lease, self._salt(asked.tenant))
            excused = self.held or self.was_ill
            assert arrived == lease.blocks or excused, "with no other lease there is a slot to load through"

    @precondition(lambda self: len(self.held) < 3)
    @rule(asked=asked)
    def hold(self, asked: Asked) -> None:
        self.held.append(Held(asked, self._match(asked), self._salt(asked.tenant)))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 2), load_first=st.booleans())
    def let_go(self, which: int, load_first: bool) -> None:
        held = self.held.pop(which % len(self.held))
        if load_first:
            self._load(held.asked, held.lease, held.sink_salt)
        held.lease.close()

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 2))
    def load_held(self, which: int) -> None:
        held = self.held[which % len(self.held)]
        self._load(held.asked, held.lease, held.sink_salt)

    @rule(tenant=st.sampled_from(TENANTS))
    def erase(self, tenant: str) -> None:
        self.pool.erase(tenant=tenant)
        self.erasures[tenant] += 1
        self.stored = {prefix for prefix in self.stored if prefix[1] != tenant}

    @rule()
    def flush(self) -> None:
        flushed(self.pool)

    @rule()
    def evict(self) -> None:
        empty_ram(self.pool)

    @rule(asked=asked)
    def explain(self, asked: Asked) -> None:
        reports = self.models[asked.model].explain(asked.tokens, tenant=asked.tenant, extra_keys=asked.extras)
        assert [report.block for report in reports] == list(range(len(asked.blocks)))
        with self._match(asked) as lease:
            assert [report.verdict for report in reports].count(Verdict.HELD) == lease.blocks
        for at, report in enumerate(reports):
            if report.verdict is Verdict.NEVER_STORED:
                assert (asked.model, asked.tenant, asked.blocks[: at + 1]) not in self.stored

    @rule(ram=ram_bytes, ssd=ssd_bytes)
    def reload(self, ram: int, ssd: int) -> None:
        self.options["ram"] = ram
        if self.options["ssd"] is not None:
            self.options["ssd"] = ssd
        report = self.pool.reload(config(**self.options))
        assert report.needs_restart == ()

    @precondition(lambda self: self.options["ssd"] is not None)
    @rule(call=st.sampled_from(["pwritev", "preadv", "fallocate", "create", "open", "fdatasync", "rename", "unlink"]))
    def fall_ill(self, call: str) -> None:
        """Until `recover`, or a restart on a sound disk, calls of this name fail."""
        self.disk.errors = {call: errno.EIO}
        self.was_ill = True

    @rule()
    def recover(self) -> None:
        self.disk.recover()

    @rule()
    def restart(self) -> None:
        self._drop_leases()
        self.pool.close()
        self._open()

    @rule()
    def crash(self) -> None:
        """Everything goes on from what lay on the disk at one moment while the pool was open."""
        self._drop_leases()
        shutil.copytree(self.directory, self.base / str(self.generation + 1))
        self.pool.close(deadline_s=0)
        shutil.rmtree(self.directory)
        self.generation += 1
        self._open()

    def _drop_leases(self) -> None:
        for held in self.held:
            held.lease.close()
        self.held = []

    @invariant()
    def everything_agrees(self) -> None:
        flushed(self.pool)
        engine = self.pool._engine
        if not self.held and not self.was_ill:
            eventually(lambda: is_within_capacity(self.pool), "capacities hold")
        check_index(self.pool, [held.lease for held in self.held])
        engine.ram.slab.check_integrity()
        eventually(lambda: engine.ram.used_bytes == engine.index.copy_bytes[RAM], "every slot in use is one block's")
        tier = engine.store.tier
        if tier is not None:
            assert tier.stats().live_records == engine.index.copies[2]
            assert tier.used_bytes <= tier.capacity_bytes or self.held or self.was_ill
            if not self.was_ill:
                check_chains_on_ssd(self.pool)
        assert self.pool.stats().mode == "normal" or self.was_ill

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self._drop_leases()
        if self.options["ssd"] is not None and not self.was_ill:
            eventually(lambda: disk_usage(self.directory) <= self.options["ssd"], "the directory is within capacity")
        self.pool.close()
        shutil.rmtree(self.base)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
def test_a_pool_against_its_model_for_long() -> None:
    longer = settings(TestPoolAgainstModel.settings, max_examples=600, derandomize=False)
    run_state_machine_as_test(PoolAgainstModel, settings=longer)

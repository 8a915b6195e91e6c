"""What changes while a pool is open, and what it tells of its blocks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvpool.errors import ConfigError
from kvpool.pool.events import BlockRemoved, BlockStored, Event
from kvpool.pool.pool import Pool
from kvpool.tiers.tier import TierName
from tests.pool.kv import MIB, RECORD, config, eventually, load, prompt, spec, store


def test_a_reload_says_what_took_effect_and_what_needs_a_restart(tmp_path: Path) -> None:
    with Pool.open(config(ram=64 * RECORD, ssd=8 * MIB), directory=tmp_path) as pool:
        other = config(ram=32 * RECORD, ssd=16 * MIB, budgetS=0.5)
        other = other.model_copy(update={"block_tokens": 8})
        report = pool.reload(other)
        assert set(report.applied) == {
            "spec.tiers.ram.capacity",
            "spec.tiers.ssd.capacity",
            "spec.tiers.ssd.budget",
        }
        assert report.needs_restart == ("spec.blockTokens",)
        assert pool.config.block_tokens == 4
        assert pool.reload(pool.config).applied == ()


def test_lowering_ram_keeps_what_is_leased_and_gives_memory_back_when_the_lease_ends(tmp_path: Path) -> None:
    with Pool.open(config(ram=64 * RECORD), directory=tmp_path) as pool:
        model = pool.register(spec())
        for seed in range(1, 8):
            store(model, prompt(8, seed=seed))
        with model.match(prompt(8, seed=1)) as lease:
            pool.reload(config(ram=16 * RECORD))
            assert lease.blocks == 8
            assert load(model, prompt(8, seed=1)) == 8
        eventually(lambda: pool.stats().tiers[TierName.RAM].used_bytes <= 16 * RECORD, "memory is given back")
        assert pool.stats().tiers[TierName.RAM].capacity_bytes == 16 * RECORD


def test_raising_ram_gives_room_at_once(tmp_path: Path) -> None:
    with Pool.open(config(ram=8 * RECORD), directory=tmp_path) as pool:
        model = pool.register(spec())
        pool.reload(config(ram=64 * RECORD))
        assert store(model, prompt(40, seed=1)).stored == 40


def test_a_capacity_that_cannot_work_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with Pool.open(config(ram=64 * RECORD, ssd=8 * MIB), directory=tmp_path) as pool:
        with pytest.raises(ConfigError, match="ssd capacity"):
            pool.reload(config(ram=32 * RECORD, ssd=4096))
        assert pool.stats().tiers[TierName.RAM].capacity_bytes == 64 * RECORD
        assert pool.stats().tiers[TierName.SSD].capacity_bytes == 8 * MIB


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def stored(self, medium: TierName) -> list[bytes]:
        what = [event.what for event in self.events]
        return [key for one in what if isinstance(one, BlockStored) and one.medium is medium for key in one.keys]

    def removed(self, medium: TierName) -> list[bytes]:
        what = [event.what for event in self.events]
        return [key for one in what if isinstance(one, BlockRemoved) and one.medium is medium for key in one.keys]


def test_every_block_is_told_when_it_is_stored_saved_and_removed(tmp_path: Path) -> None:
    with Pool.open(config(ram=8 * RECORD, ssd=8 * MIB), directory=tmp_path) as pool:
        model = pool.register(spec())
        listener = Listener()
        pool.subscribe(listener)
        store(model, prompt(3, seed=1))
        assert pool.flush(10)
        keys = [report.key for report in model.explain(prompt(3, seed=1))]
        eventually(lambda: len(listener.stored(TierName.SSD)) == 3, "all is told")
        assert listener.stored(TierName.RAM) == listener.stored(TierName.SSD) == keys
        store(model, prompt(8, seed=2))
        eventually(lambda: len(listener.removed(TierName.RAM)) == 3, "evictions are told")
        assert sorted(listener.removed(TierName.RAM)) == sorted(keys)
        assert load(model, prompt(3, seed=1)) == 3
        eventually(lambda: listener.stored(TierName.RAM).count(keys[0]) == 2, "promotion is told")
        assert [event.sequence for event in listener.events] == list(range(len(listener.events)))


def test_a_stored_event_names_the_block_before_it_and_the_tokens(tmp_path: Path) -> None:
    with Pool.open(config(), directory=tmp_path) as pool:
        model = pool.register(spec())
        store(model, prompt(2, seed=1))
        listener = Listener()
        pool.subscribe(listener)
        store(model, prompt(4, seed=1))
        eventually(lambda: len(listener.events) == 1, "the store is told")
        (what,) = [event.what for event in listener.events]
        assert isinstance(what, BlockStored)
        keys = [report.key for report in model.explain(prompt(4, seed=1))]
        assert (what.parent, list(what.keys)) == (keys[1], keys[2:])
        assert what.tokens == b"".join(token.to_bytes(4, "little") for token in prompt(4, seed=1)[8:])
        assert (what.block_tokens, what.fingerprint) == (4, model.identity.fingerprint)


def test_a_listener_that_hangs_or_fails_holds_nobody_up(tmp_path: Path) -> None:
    release = threading.Event()

    def hangs(event: Event) -> None:
        release.wait(30)

    def fails(event: Event) -> None:
        raise ValueError("a listener's own fault")

    with Pool.open(config(), directory=tmp_path) as pool:
        model = pool.register(spec())
        listener = Listener()
        for each in (hangs, fails, listener):
            pool.subscribe(each)
        for seed in range(1, 6):
            store(model, prompt(2, seed=seed))
        eventually(lambda: len(listener.events) == 5, "the others are told")
        release.set()


def test_nothing_is_told_after_unsubscribing(tmp_path: Path) -> None:
    with Pool.open(config(), directory=tmp_path) as pool:
        model = pool.register(spec())
        listener = Listener()
        unsubscribe = pool.subscribe(listener)
        unsubscribe()
        store(model, prompt(2, seed=1))
        assert listener.events == []

"""Whoever listens is told of every block that is stored or removed, in order, and holds nobody up."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from kvpool.blocks.identity import BlockKey
from kvpool.blocks.tokens import token_bytes
from kvpool.pool import events as events_module
from kvpool.pool.events import BlockRemoved, BlockStored, Event
from kvpool.pool.model import Model
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .disks import SickDisk
from .kv import BLOCK_TOKENS, MIB, RECORD, empty_ram, flushed, load, open_pool, prompt, spec, store, stored_below

RAM, SSD = TierName.RAM, TierName.SSD
FOUR = prompt(4, seed=1)


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def told(self, count: int) -> list[BlockStored | BlockRemoved]:
        """What the first `count` events say, once they are there; there are no more."""
        eventually(lambda: len(self.events) >= count, f"{count} events")
        assert [event.sequence for event in self.events] == list(range(count))
        return [event.what for event in self.events]


def keys_of(model: Model, tokens: list[int], **options: Any) -> tuple[BlockKey, ...]:
    return tuple(report.key for report in model.explain(tokens, **options))


def test_a_store_is_told_with_keys_parent_tokens_and_medium(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model, listener = pool.register(spec()), Listener()
        pool.subscribe(listener)
        store(model, [*FOUR, 7])
        store(model, FOUR + prompt(2, seed=2))
        first, second = listener.told(2)
        keys = keys_of(model, FOUR + prompt(2, seed=2))
        assert isinstance(first, BlockStored)
        root = first.parent
        assert first == BlockStored(keys[:4], root, token_bytes(FOUR), BLOCK_TOKENS, model.identity.fingerprint, RAM)
        assert second == BlockStored(
            keys[4:], keys[3], token_bytes(prompt(2, seed=2)), BLOCK_TOKENS, model.identity.fingerprint, RAM
        )
        assert root not in keys


def test_a_prompt_of_many_blocks_is_told_in_pieces_that_follow_each_other(tmp_path: Path) -> None:
    tokens = prompt(70)
    with open_pool(tmp_path, ram=128 * RECORD) as pool:
        model, listener = pool.register(spec()), Listener()
        pool.subscribe(listener)
        store(model, tokens)
        pieces = [piece for piece in listener.told(3) if isinstance(piece, BlockStored)]
        assert [key for piece in pieces for key in piece.keys] == list(keys_of(model, tokens))
        assert b"".join(piece.tokens for piece in pieces) == token_bytes(tokens)
        assert [piece.parent for piece in pieces[1:]] == [piece.keys[-1] for piece in pieces[:-1]]


def test_what_was_there_before_is_not_told(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model, listener = pool.register(spec()), Listener()
        store(model, FOUR)
        pool.subscribe(listener)
        store(model, FOUR)
        load(model, FOUR)
        store(model, prompt(1, seed=2))
        (only,) = listener.told(1)
        assert only[0] == keys_of(model, prompt(1, seed=2))


def test_tenants_and_extra_keys_have_keys_of_their_own(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model, listener = pool.register(spec()), Listener()
        pool.subscribe(listener)
        store(model, FOUR, "acme")
        store(model, FOUR, "other")
        store(model, FOUR, "acme", extra_keys={0: b"cat"})
        told = listener.told(3)
        assert told[0][0] == keys_of(model, FOUR, tenant="acme")
        assert told[1][0] == keys_of(model, FOUR, tenant="other")
        assert told[2][0] == keys_of(model, FOUR, tenant="acme", extra_keys={0: b"cat"})
        assert len({key for what in told for key in what[0]}) == 12


def test_the_way_down_to_ssd_and_up_again_is_told(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model, listener = pool.register(spec()), Listener()
        pool.subscribe(listener)
        stored_below(pool, model, FOUR)
        load(model, FOUR)
        stored, saved, evicted, promoted = listener.told(4)
        keys = keys_of(model, FOUR)
        assert isinstance(stored, BlockStored)
        assert saved == stored._replace(tokens=b"", medium=SSD)
        assert evicted == BlockRemoved(keys[::-1], RAM)
        assert promoted == stored


def test_a_segment_that_is_freed_is_told(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=8 * RECORD, ssd=MIB // 2) as pool:
        model, listener = pool.register(spec()), Listener()
        pool.subscribe(listener)
        for seed in range(40):
            stored_below(pool, model, prompt(4, seed=seed))
        first = set(keys_of(model, prompt(4, seed=0)))
        pool.close()
        removed = [event.what for event in listener.events if isinstance(event.what, BlockRemoved)]
        assert first <= {key for what in removed if what.medium is SSD for key in what.keys}


def test_an_erasure_is_told_for_every_medium(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model, listener = pool.register(spec()), Listener()
        store(model, FOUR, "acme")
        flushed(pool)
        keys = keys_of(model, FOUR, tenant="acme")
        pool.subscribe(listener)
        pool.erase(tenant="acme")
        told = listener.told(2)
        assert {what.medium: set(what.keys) for what in told if isinstance(what, BlockRemoved)} == {
            RAM: set(keys),
            SSD: set(keys),
        }


def test_what_the_disk_refuses_is_not_told(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=MIB, disk=disk) as pool:
        model, listener = pool.register(spec()), Listener()
        disk.errors = {"pwritev": 5}
        pool.subscribe(listener)
        store(model, FOUR)
        flushed(pool)
        empty_ram(pool)
        stored, evicted = listener.told(2)
        assert isinstance(stored, BlockStored)
        assert evicted == BlockRemoved(stored.keys[::-1], RAM)


def test_what_ends_a_subscription_delivers_what_is_queued_and_nothing_more(tmp_path: Path) -> None:
    with open_pool(tmp_path, ram=128 * RECORD) as pool:
        model, listener, other = pool.register(spec()), Listener(), Listener()
        unsubscribe = pool.subscribe(listener)
        pool.subscribe(other)
        for seed in range(50):
            store(model, prompt(1, seed=seed))
        unsubscribe()
        assert len(listener.events) == 50
        store(model, prompt(1, seed=100))
        unsubscribe()
        other.told(51)
        assert len(listener.events) == 50


def test_closing_delivers_what_is_queued(tmp_path: Path) -> None:
    listener = Listener()
    with open_pool(tmp_path, ram=128 * RECORD, ssd=MIB) as pool:
        model = pool.register(spec())
        pool.subscribe(listener)
        for seed in range(50):
            store(model, prompt(1, seed=seed))
    saved = [event.what for event in listener.events if isinstance(event.what, BlockStored)]
    assert sum(len(what.keys) for what in saved if what.medium is SSD) == 50


def test_a_listener_may_end_its_own_subscription(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        told: list[Event] = []

        def once(event: Event) -> None:
            told.append(event)
            unsubscribe()

        unsubscribe = pool.subscribe(once)
        store(model, FOUR)
        eventually(lambda: not pool._engine.events.active, "it has ended")
        store(model, prompt(1, seed=2))
        assert len(told) == 1


def test_a_slow_listener_holds_up_neither_stores_nor_other_listeners(tmp_path: Path) -> None:
    go_on = threading.Event()
    slow: list[Event] = []

    def waits(event: Event) -> None:
        assert go_on.wait(60)
        slow.append(event)

    with open_pool(tmp_path) as pool:
        model, quick = pool.register(spec()), Listener()
        pool.subscribe(waits)
        pool.subscribe(quick)
        for seed in range(20):
            assert store(model, prompt(1, seed=seed)).stored == 1
        quick.told(20)
        assert slow == []
        go_on.set()
        eventually(lambda: len(slow) == 20, "it catches up")
        assert [event.sequence for event in slow] == list(range(20))


def test_a_listener_that_fails_is_logged_and_told_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []

    def fails(event: Event) -> None:
        told.append(event.sequence)
        raise ZeroDivisionError

    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        pool.subscribe(fails)
        for seed in range(3):
            store(model, prompt(1, seed=seed))
        eventually(lambda: told == [0, 1, 2], "all are told")
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in failures][:1] == ["a listener of pool events failed at event 0"]


def test_what_a_listener_misses_shows_as_a_gap_in_the_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "QUEUE_BYTES", 10_000)
    entered, go_on = threading.Event(), threading.Event()
    told: list[int] = []

    def waits(event: Event) -> None:
        entered.set()
        assert go_on.wait(60)
        told.append(event.sequence)

    with open_pool(tmp_path, ram=200 * RECORD) as pool:
        model = pool.register(spec())
        unsubscribe = pool.subscribe(waits)
        store(model, prompt(1, seed=0))
        assert entered.wait(20)
        for seed in range(1, 100):
            store(model, prompt(1, seed=seed))
        go_on.set()
        unsubscribe()
    assert told[0] == 0
    assert told[1] > 1, "the oldest of those that waited were dropped"
    assert told[1:] == list(range(told[1], 100)), "and the newest are all there"
    assert len(told) < 30


def test_a_listener_that_hangs_does_not_keep_the_pool_from_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module._Subscription, "CLOSE_SECONDS", 0.05)
    entered, go_on = threading.Event(), threading.Event()

    def hangs(event: Event) -> None:
        entered.set()
        assert go_on.wait(60)

    pool = open_pool(tmp_path)
    model = pool.register(spec())
    pool.subscribe(hangs)
    store(model, FOUR)
    assert entered.wait(20)
    try:
        pool.close()
        open_pool(tmp_path).close()
    finally:
        go_on.set()

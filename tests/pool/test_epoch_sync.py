"""Epochs of a node in step with an authority: what only one of them knows, the other learns; nothing before that."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from kvpool.blocks.identity import ALL_TENANTS, TenantDigest
from kvpool.pool.epochs import Epochs
from kvpool.pool.remote.epoch_sync import HEARTBEAT_EVERY_S, HINT_EVERY_S, HINTS_AT_ONCE, EpochSync
from kvpool.tiers.tier import TierName, TierUnavailableError

A, B = TenantDigest(b"a" * 16), TenantDigest(b"b" * 16)
NODE = UUID(int=1)


class Raised(NamedTuple):
    epoch: int
    sequence: int


class Authority:
    """Keeps epochs in this process; `away` makes every call fail."""

    def __init__(self) -> None:
        self.epochs: dict[TenantDigest, int] = {}
        self.changes: list[TenantDigest] = []
        self.heartbeats: list[int] = []
        self.away = False

    def raise_epoch(self, tenant: TenantDigest, at_least: int) -> Raised:
        self._answer()
        if at_least > self.epochs.get(tenant, 0):
            self.epochs[tenant] = at_least
            self.changes.append(tenant)
        return Raised(self.epochs[tenant], len(self.changes))

    def changes_since(self, sequence: int) -> tuple[list[tuple[TenantDigest, int]], int]:
        self._answer()
        return [(tenant, self.epochs[tenant]) for tenant in self.changes[sequence:]], len(self.changes)

    def heartbeat(self, node: UUID, name: str, confirmed: int) -> None:
        self._answer()
        self.heartbeats.append(confirmed)

    def _answer(self) -> None:
        if self.away:
            raise TierUnavailableError(TierName.DATABASE, "away")


class Hints:
    def __init__(self) -> None:
        self.noted: dict[TenantDigest, int] = {}
        self.looks = 0

    def epoch_hint(self, tenant: TenantDigest) -> int | None:
        self.looks += 1
        return self.noted.get(tenant)

    def note_epoch(self, tenant: TenantDigest, epoch: int) -> None:
        self.noted[tenant] = max(epoch, self.noted.get(tenant, 0))


class Node:
    """A node with epochs of its own, and a clock."""

    def __init__(self, directory: Path, authority: Any = None, hints: Any = None) -> None:
        directory.mkdir(exist_ok=True)
        self.now_s = 0.0
        self.adoptions = 0
        self.epochs = Epochs.load(directory, is_new=not (directory / "EPOCHS").exists())
        self.sync = EpochSync(self.epochs, NODE, "node", adopted=self._note, clock=lambda: self.now_s)
        self.sync.authority, self.sync.hints = authority, hints

    def _note(self) -> None:
        self.adoptions += 1


def test_nothing_is_trusted_before_the_authority_has_answered_once_and_all_is_from_then_on(tmp_path: Path) -> None:
    authority = Authority()
    authority.away = True
    node = Node(tmp_path, authority)
    assert not node.sync.trusted
    with pytest.raises(TierUnavailableError):
        node.sync.step()
    assert not node.sync.trusted
    authority.away = False
    node.sync.step()
    authority.away = True
    assert node.sync.trusted


def test_without_an_authority_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    assert Node(tmp_path).sync.trusted


def test_what_was_erased_elsewhere_is_taken_over_and_is_durable(tmp_path: Path) -> None:
    authority = Authority()
    node = Node(tmp_path, authority)
    node.sync.step()
    authority.raise_epoch(A, 3)
    node.sync.step()
    assert node.epochs.of(A) == 3
    assert node.adoptions == 1
    assert Node(tmp_path).epochs.of(A) == 3


def test_what_was_erased_here_while_the_authority_was_away_is_told_later_and_after_a_restart(tmp_path: Path) -> None:
    authority = Authority()
    authority.away = True
    node = Node(tmp_path, authority)
    assert node.sync.tell(A, node.epochs.raise_epoch(A)) is None
    authority.away = False
    node.sync.step()
    assert authority.epochs == {A: 1}
    node.epochs.raise_epoch(B)
    Node(tmp_path, authority).sync.step()
    assert authority.epochs == {A: 1, B: 1}


def test_a_higher_epoch_there_wins_over_the_one_that_is_told(tmp_path: Path) -> None:
    authority = Authority()
    authority.raise_epoch(A, 7)
    node = Node(tmp_path, authority)
    node.sync.tell(A, node.epochs.raise_epoch(A))
    assert node.epochs.of(A) == 7


def test_the_floor_of_all_tenants_travels_both_ways(tmp_path: Path) -> None:
    authority = Authority()
    node = Node(tmp_path / "one", authority)
    floor = node.epochs.raise_all()
    node.sync.step()
    assert authority.epochs == {ALL_TENANTS: floor}
    other = Node(tmp_path / "two", authority)
    other.sync.step()
    assert other.epochs.floor == floor
    assert other.epochs.of(B) == floor


def test_a_node_says_at_once_what_it_knows_of_and_that_it_lives_from_time_to_time(tmp_path: Path) -> None:
    authority = Authority()
    node = Node(tmp_path, authority)
    for _ in range(3):
        node.sync.step()
    assert authority.heartbeats == [0]
    authority.raise_epoch(A, 1)
    node.sync.step()
    assert authority.heartbeats == [0, 1]
    node.now_s += HEARTBEAT_EVERY_S
    node.sync.step()
    assert authority.heartbeats == [0, 1, 1]


def test_a_change_that_cannot_be_kept_is_not_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority()
    node = Node(tmp_path, authority)
    node.sync.step()
    authority.raise_epoch(A, 1)

    def fail(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr("kvpool.pool.epochs.replace_file", fail)
        with pytest.raises(OSError, match="no space"):
            node.sync.step()
    assert authority.heartbeats == [0]
    node.sync.step()
    assert authority.heartbeats == [0, 1]
    assert Node(tmp_path).epochs.of(A) == 1


def test_a_hint_is_believed_if_it_is_higher_and_looked_at_no_more_often_than_is_of_use(tmp_path: Path) -> None:
    hints = Hints()
    one, two = Node(tmp_path / "one", hints=hints), Node(tmp_path / "two", hints=hints)
    one.sync.tell(A, one.epochs.raise_epoch(A))
    for _ in range(5):
        two.sync.look_at_hint(A)
    assert two.epochs.of(A) == 1
    assert hints.looks == 1
    hints.noted[A] = 0
    two.now_s += HINT_EVERY_S
    two.sync.look_at_hint(A)
    assert two.epochs.of(A) == 1
    assert two.adoptions == 1


def test_without_an_authority_a_chore_hears_of_all_tenants_a_bounded_number_at_a_time(tmp_path: Path) -> None:
    hints = Hints()
    node = Node(tmp_path, hints=hints)
    tenants = [TenantDigest(number.to_bytes(16, "big")) for number in range(2 * HINTS_AT_ONCE)]
    hints.noted = dict.fromkeys(tenants, 3)
    node.sync.follow_hints(tenants)
    assert hints.looks == HINTS_AT_ONCE
    node.sync.follow_hints(tenants)
    node.sync.follow_hints(tenants)
    assert hints.looks == 2 * HINTS_AT_ONCE, "no more often than is of use"
    assert {node.epochs.of(tenant) for tenant in tenants} == {3}
    informed = Node(tmp_path / "informed", authority=Authority(), hints=hints)
    informed.sync.follow_hints(tenants)
    assert hints.looks == 2 * HINTS_AT_ONCE, "who has an authority asks that"

"""Epochs never decrease: not by restarts, crashes, full disks or damage."""

import hashlib
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpool.blocks.identity import TenantDigest
from kvpool.errors import IncompatibleDataError, InputError
from kvpool.pool.epochs import MAX_EPOCH, Epochs

ACME, BETA, OTHER = (TenantDigest(bytes([number]) * 16) for number in range(3))
FEW_TENANTS = 3


def new(directory: Path) -> Epochs:
    return Epochs.load(directory, is_new=True)


def again(directory: Path) -> Epochs:
    return Epochs.load(directory, is_new=False)


def test_an_unknown_tenants_epoch_is_zero(tmp_path: Path) -> None:
    assert new(tmp_path).of(ACME) == 0


def test_a_raised_epoch_survives_a_restart_and_is_its_tenants_alone(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    assert [epochs.raise_epoch(ACME), epochs.raise_epoch(ACME)] == [1, 2]
    restarted = again(tmp_path)
    assert restarted.trusted
    assert (restarted.of(ACME), restarted.of(BETA)) == (2, 0)


def test_raising_all_lifts_every_tenant_above_all_that_was(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    epochs.raise_epoch(ACME)
    epochs.raise_epoch(ACME)
    assert epochs.raise_all() == 3
    for known in (epochs, again(tmp_path)):
        assert {known.of(ACME), known.of(BETA), known.floor} == {3}
    assert epochs.raise_epoch(BETA) == 4


def test_a_higher_epoch_that_was_seen_is_adopted_and_a_lower_one_is_not(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    assert epochs.at_least(ACME, 5)
    assert not epochs.at_least(ACME, 4)
    assert epochs.of(ACME) == 5
    epochs.save()
    assert again(tmp_path).of(ACME) == 5


def test_what_was_adopted_is_durable_with_the_next_raise_too(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    epochs.at_least(ACME, 5)
    epochs.raise_epoch(BETA)
    assert again(tmp_path).of(ACME) == 5


def test_an_epoch_that_no_record_can_have_is_refused(tmp_path: Path) -> None:
    for epoch in (-1, MAX_EPOCH + 1):
        with pytest.raises(InputError):
            new(tmp_path).at_least(ACME, epoch)
    with pytest.raises(InputError):
        new(tmp_path).at_least(TenantDigest(b"short"), 1)


def test_a_missing_file_is_trusted_in_a_new_directory_only(tmp_path: Path) -> None:
    assert not again(tmp_path).trusted
    assert new(tmp_path).trusted
    assert again(tmp_path).trusted


def test_a_flip_of_any_byte_is_found(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    epochs.raise_epoch(ACME)
    good = (tmp_path / "EPOCHS").read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0x41
        (tmp_path / "EPOCHS").write_bytes(damaged)
        assert not again(tmp_path).trusted


def test_a_file_of_any_other_length_is_found(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    epochs.raise_epoch(ACME)
    good = (tmp_path / "EPOCHS").read_bytes()
    for other in [good[:length] for length in range(len(good))] + [good + b"\0"]:
        (tmp_path / "EPOCHS").write_bytes(other)
        assert not again(tmp_path).trusted


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    epochs.raise_all()
    epochs.raise_epoch(BETA)
    start = struct.pack("<8sI", b"kvpool\0E", 1)
    body = start + checksum(start) + struct.pack("<QI16sQ", 1, 1, BETA, 2)
    assert (tmp_path / "EPOCHS").read_bytes() == body + checksum(body)
    assert checksum(body).hex() == "0a52934972075fdde0e09140c77ef68a"


def test_a_newer_programs_file_is_refused_and_kept(tmp_path: Path) -> None:
    start = struct.pack("<8sI", b"kvpool\0E", 2)
    newer = start + checksum(start) + b"whatever version 2 holds"
    (tmp_path / "EPOCHS").write_bytes(newer)
    with pytest.raises(IncompatibleDataError, match="format 2"):
        again(tmp_path)
    assert (tmp_path / "EPOCHS").read_bytes() == newer


def test_after_a_loss_nothing_is_trusted_until_all_seen_epochs_are_left_behind(tmp_path: Path) -> None:
    new(tmp_path).raise_epoch(ACME)
    (tmp_path / "EPOCHS").write_bytes(b"damaged")
    epochs = again(tmp_path)
    with pytest.raises(RuntimeError):
        epochs.raise_epoch(BETA)
    assert not again(tmp_path).trusted

    epochs.at_least(BETA, 9)
    epochs.distrust_up_to(7)

    for known in (epochs, again(tmp_path)):
        assert known.trusted
        assert known.of(ACME) == known.of(BETA) == 10


def test_more_tenants_than_the_bound_cost_blocks_but_no_epoch_decreases(tmp_path: Path) -> None:
    epochs = Epochs.load(tmp_path, is_new=True, max_tenants=2)
    raised = {tenant: epochs.raise_epoch(tenant) for tenant in (ACME, BETA)}
    epochs.raise_epoch(ACME)
    assert epochs.raise_epoch(OTHER) > 1
    assert len(epochs) == 0
    assert all(epochs.of(tenant) > epoch for tenant, epoch in raised.items())
    assert again(tmp_path).of(BETA) == epochs.of(BETA)


def test_a_raise_that_cannot_be_written_raises_and_changes_nothing(tmp_path: Path) -> None:
    epochs = new(tmp_path)
    epochs.raise_epoch(ACME)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            epochs.raise_epoch(BETA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    for known in (epochs, again(tmp_path)):
        assert (known.of(ACME), known.of(BETA)) == (1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["EPOCHS"]
    assert epochs.raise_epoch(BETA) == 1


def test_a_raise_that_returned_is_known_after_kill_9(tmp_path: Path) -> None:
    raiser = (
        "import sys; from pathlib import Path; from kvpool.pool.epochs import Epochs\n"
        "epochs = Epochs.load(Path(sys.argv[1]), is_new=True)\n"
        "while True: print(epochs.raise_epoch(bytes(16)), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", raiser, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split(b"\n")[:-1]
    returned = max(map(int, said), default=20)
    known = again(tmp_path)
    assert known.trusted
    assert known.of(ACME) in (returned, returned + 1)


@given(st.dictionaries(st.binary(min_size=16, max_size=16).map(TenantDigest), st.integers(0, MAX_EPOCH), max_size=20))
@settings(max_examples=30)
def test_whatever_was_adopted_is_read_back(adopted: dict[TenantDigest, int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        epochs = new(Path(name))
        for tenant, epoch in adopted.items():
            epochs.at_least(tenant, epoch)
        epochs.save()
        restarted = again(Path(name))
        assert {tenant: restarted.of(tenant) for tenant in adopted} == adopted


class NeverDecreasing(RuleBasedStateMachine):
    """Any order of raises, adoptions, losses and restarts; the file is lost in some of them."""

    tenants = st.integers(0, 5).map(lambda number: TenantDigest(bytes([number]) * 16))

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name)
        self.epochs = Epochs.load(self.path, is_new=True, max_tenants=FEW_TENANTS)
        self.seen: dict[TenantDigest, int] = {}

    @rule(tenant=tenants)
    def raise_one(self, tenant: TenantDigest) -> None:
        before = self.epochs.of(tenant)
        assert self.epochs.raise_epoch(tenant) == self.epochs.of(tenant) > before

    @rule()
    def raise_all(self) -> None:
        assert self.epochs.raise_all() > max(self.seen.values(), default=-1)

    @rule(tenant=tenants, epoch=st.integers(0, 50))
    def adopt(self, tenant: TenantDigest, epoch: int) -> None:
        self.epochs.at_least(tenant, epoch)
        assert self.epochs.of(tenant) >= epoch

    @rule()
    def restart(self) -> None:
        self.epochs.save()
        self.epochs = Epochs.load(self.path, is_new=False, max_tenants=FEW_TENANTS)
        assert self.epochs.trusted

    @rule()
    def lose_the_file(self) -> None:
        (self.path / "EPOCHS").unlink()
        self.epochs = Epochs.load(self.path, is_new=False, max_tenants=FEW_TENANTS)
        assert not self.epochs.trusted
        self.epochs.distrust_up_to(max(self.seen.values(), default=0))

    @invariant()
    def no_epoch_has_decreased_and_memory_is_bounded(self) -> None:
        for number in range(6):
            tenant = TenantDigest(bytes([number]) * 16)
            assert self.epochs.of(tenant) >= self.seen.get(tenant, 0)
            self.seen[tenant] = self.epochs.of(tenant)
        assert len(self.epochs) <= FEW_TENANTS

    def teardown(self) -> None:
        self.directory.cleanup()


NeverDecreasing.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_no_epoch_decreases_in_any_order_of_events = NeverDecreasing.TestCase


def checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=b"kvpool-epochs").digest()

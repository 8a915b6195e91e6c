"""Faults cost a recomputation, never a wrong answer, and nobody waits for them. Each fault is made for real."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.errors import ConfigError, DirectoryInUseError, IncompatibleDataError
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import Verdict
from kvpool.prefix.node import SSD as SSD_LEVEL
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

from .disks import SickDisk, from_the_nth_on
from .kv import (
    BLOCK_TOKENS,
    KIB,
    MIB,
    RECORD,
    check,
    disk_usage,
    empty_ram,
    flushed,
    load,
    loaded_blocks,
    matched,
    open_pool,
    prompt,
    segment_files,
    served,
    spec,
    store,
    stored_below,
)

RAM, SSD = TierName.RAM, TierName.SSD
FOUR = prompt(4, seed=1)
TINY = KVLayout(layers=1, kv_heads=1, head_size=4, dtype=Dtype.FLOAT16, block_tokens=BLOCK_TOKENS)
"""64 bytes of payload, 8 KiB of record: two pages, and most of the second is padding."""


def corrupt_records(pool: Pool) -> int:
    """Records that were found damaged, at start or when they were read."""
    stats = pool.stats()
    return sum(stats.tiers[SSD].corrupt.values()) + sum(stats.restored.dropped.values())


def serves_and_heals(directory: Path, prompts: list[list[int]], **options: Any) -> int:
    """Open the pool of damaged files: nothing wrong comes back, and what is stored again is there. Blocks kept."""
    with open_pool(directory, **options) as pool:
        model = pool.register(spec(layout=TINY))
        kept = [load(model, tokens) for tokens in prompts]
        for tokens in prompts:
            store(model, tokens)
        flushed(pool)
        empty_ram(pool)
        assert [load(model, tokens) for tokens in prompts] == [len(tokens) // BLOCK_TOKENS for tokens in prompts]
        check(pool, leases=())
        lost = sum(len(tokens) // BLOCK_TOKENS for tokens in prompts) - sum(kept)
        assert bool(corrupt_records(pool)) or not lost, "what was lost is counted"
    with open_pool(directory, **options) as pool:
        assert [load(pool.model("m"), tokens) for tokens in prompts] == [len(t) // BLOCK_TOKENS for t in prompts]
        check(pool, leases=())
    return sum(kept)


# -- damage on the disk ------------------------------------------------------------------------------------------------

PROMPTS = [prompt(4, seed=1), prompt(2, seed=1) + prompt(2, seed=2), prompt(3, seed=3)]
"""Nine blocks in all, two of them shared."""
PLENTY = 256 * KIB


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool's directory with all of `PROMPTS` on SSD. Not to be changed: to be copied."""
    directory = tmp_path_factory.mktemp("sound") / "pool"
    with open_pool(directory, ssd=PLENTY) as pool:
        model = pool.register(spec(layout=TINY))
        for tokens in PROMPTS:
            store(model, tokens)
            flushed(pool)
    return directory


def positions(sound: Path, step: int) -> Iterator[tuple[str, int]]:
    at = 0
    for file in segment_files(sound):
        size = file.stat().st_size
        for offset in range(at % step, size, step):
            yield file.name, offset
        at += size


def test_a_flipped_byte_is_never_a_wrong_block(sound: Path, quick_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _flip(list(positions(sound, 389)), sound, quick_path, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_a_flipped_byte_anywhere_is_never_a_wrong_block(
    sound: Path, quick_path: Path, caplog: pytest.LogCaptureFixture, part: int
) -> None:
    _flip(list(positions(sound, 1))[part::16], sound, quick_path, caplog)


def _flip(where: list[tuple[str, int]], sound: Path, work: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flip one byte between close and open, for each of these places."""
    caplog.set_level(logging.WARNING)
    total = sum(len(tokens) // BLOCK_TOKENS for tokens in PROMPTS)
    assert len(where) > 100
    for number, (name, offset) in enumerate(where):
        directory = work / f"{number}"
        shutil.copytree(sound, directory)
        _overwrite(directory / "ssd" / name, offset)
        caplog.clear()
        with open_pool(directory, ssd=PLENTY) as pool:
            model = pool.register(spec(layout=TINY))
            kept = sum(load(model, tokens) for tokens in PROMPTS)
            if kept < total:
                assert corrupt_records(pool) > 0, f"{name} at {offset}: {total - kept} blocks are gone uncounted"
                assert caplog.records, f"{name} at {offset}: nothing was said"
            for tokens in PROMPTS:
                store(model, tokens)
            flushed(pool)
            empty_ram(pool)
            assert sum(load(model, tokens) for tokens in PROMPTS) == total, f"{name} at {offset}: it stays lost"
            check(pool, leases=())
        shutil.rmtree(directory)


def _overwrite(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        (byte,) = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte ^ 0xFF]))


def test_damage_that_is_found_when_a_block_is_read_is_explained(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    shutil.copytree(sound, directory)
    file = next(segment_files(directory))
    _overwrite(file, 2 * 4096)  # the first record's payload: header page of the segment, head page of the record
    with open_pool(directory, ssd=PLENTY) as pool:
        model = pool.register(spec(layout=TINY))
        assert matched(model, PROMPTS[0]) == 4
        assert load(model, PROMPTS[0]) == 0
        assert pool.stats().tiers[SSD].corrupt == {"payload-checksum": 1}
        assert pool.stats().mode == "normal", "one bad record is no bad disk"
        assert [report.verdict for report in model.explain(PROMPTS[0])] == [Verdict.CORRUPT] + [Verdict.UNREACHABLE] * 3
        assert load(model, PROMPTS[2]) == 3
        check(pool, leases=())


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 3 * 4096, -4096, -4097, -1])
def test_a_truncated_segment_is_never_a_wrong_block(sound: Path, tmp_path: Path, nbytes: int) -> None:
    shutil.copytree(sound, tmp_path / "pool")
    file = next(segment_files(tmp_path / "pool"))
    os.truncate(file, nbytes % file.stat().st_size)
    serves_and_heals(tmp_path / "pool", PROMPTS, ssd=PLENTY)


def test_a_segment_that_grew_is_never_a_wrong_block(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "pool")
    with next(segment_files(tmp_path / "pool")).open("ab") as file:
        file.write(bytes(4096))
    serves_and_heals(tmp_path / "pool", PROMPTS, ssd=PLENTY)


def test_a_segment_that_was_deleted_is_a_miss(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "pool")
    next(segment_files(tmp_path / "pool")).unlink()
    with open_pool(tmp_path / "pool", ssd=PLENTY) as pool:
        model = pool.register(spec(layout=TINY))
        assert [load(model, tokens) for tokens in PROMPTS] == [0, 0, 3]
        assert store(model, PROMPTS[0]).stored == 4
        check(pool, leases=())


def test_foreign_files_are_left_alone_and_never_a_block(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pool"
    shutil.copytree(sound, directory)
    ours = next(segment_files(directory))
    random = Random(1)
    foreign = {
        "00ffff.segment": random.randbytes(ours.stat().st_size),
        "00fffe.segment": ours.read_bytes(),
        "00fffd.segment": bytes(4096),
        "notes.txt": b"mine",
    }
    for name, content in foreign.items():
        (directory / "ssd" / name).write_bytes(content)
    (directory / "ssd" / "00fffc.segment").symlink_to(ours)
    (directory / "ssd" / "00fffb.segment").mkdir()
    assert serves_and_heals(directory, PROMPTS, ssd=MIB) == 11
    assert (directory / "ssd" / "notes.txt").read_bytes() == b"mine"
    assert (directory / "ssd" / "00fffc.segment").is_symlink()
    assert (directory / "ssd" / "00fffb.segment").is_dir()


def test_segments_of_another_pool_are_never_a_block(sound: Path, tmp_path: Path) -> None:
    """The same model, tokens and tenant, but another pool's secret: other keys."""
    directory = tmp_path / "pool"
    open_pool(directory, ssd=PLENTY).close()
    for file in segment_files(sound):
        shutil.copy(file, directory / "ssd")
    assert serves_and_heals(directory, PROMPTS, ssd=PLENTY) == 0


def test_a_segment_that_is_deleted_while_the_pool_is_open_costs_only_its_own_blocks(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        prompts = [prompt(5, seed=seed) for seed in range(8)]
        for tokens in prompts:
            stored_below(pool, model, tokens)
        next(segment_files(tmp_path)).unlink()
        pool._engine.store.tier._space.descriptors.close_all()  # type: ignore[union-attr]
        kept = [load(model, tokens) for tokens in prompts]
        assert 0 < sum(kept) < 40
        assert pool.stats().mode == "normal"
        for tokens in prompts:
            store(model, tokens)
        assert [load(model, tokens) for tokens in prompts] == [5] * 8
        check(pool, leases=())


# -- a disk that stalls ------------------------------------------------------------------------------------------------


def test_a_read_that_stalls_costs_its_budget_once_and_late_bytes_find_nobody(tmp_path: Path) -> None:
    disk = SickDisk()
    late = prompt(6, seed=1)
    with open_pool(tmp_path, ram=16 * RECORD, ssd=4 * MIB, budgetS=0.05, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, late)
        disk.stalls = lambda name: name == "preadv"
        try:
            began = time.monotonic()
            assert load(model, late) == 0
            assert time.monotonic() - began < 5.0, "about the budget, on a busy machine too"
            assert pool.stats().mode == "no-ssd"
            assert not pool.stats().tiers[SSD].available
            assert "no progress" in pool.stats().tiers[SSD].last_error
            assert matched(model, late) == 0, "nothing is promised that lies on SSD alone"
            for seed in range(10, 20):  # the memory is used by others meanwhile, all of it
                flushed(pool)
                store(model, prompt(4, seed=seed))
                assert load(model, prompt(4, seed=seed)) == 4
            in_ram = [seed for seed in range(10, 20) if matched(model, prompt(4, seed=seed)) == 4]
            assert len(in_ram) >= 2
        finally:
            disk.recover()
        eventually(lambda: not pool._engine.readers.pending, "the late read ends")
        assert [load(model, prompt(4, seed=seed)) for seed in in_ram] == [4] * len(in_ram)
        eventually(lambda: pool.stats().mode == "normal", "a probe finds the disk well again")
        check(pool, leases=())
        assert load(model, late) == 6


def test_what_arrived_before_the_stall_is_delivered(tmp_path: Path) -> None:
    disk = SickDisk()
    tokens = prompt(96)
    with open_pool(tmp_path, ram=200 * RECORD, ssd=32 * MIB, budgetS=0.2, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, tokens)
        disk.stalls = from_the_nth_on("preadv", 2)
        try:
            arrived = load(model, tokens)
            assert 0 < arrived < 96
            assert pool.stats().short_loads == 1
            assert served(model, tokens) == {RAM: arrived}, "what arrived was kept, and is all that is promised"
        finally:
            disk.recover()
        eventually(lambda: pool.stats().mode == "normal", "a probe finds the disk well again")
        assert load(model, tokens) == 96
        check(pool, leases=())


def test_one_read_that_hangs_is_given_up_although_others_go_on(tmp_path: Path) -> None:
    """Progress of others is no progress of this one."""
    disk = SickDisk()
    first, second = prompt(3, seed=1), prompt(3, seed=2)
    with open_pool(tmp_path, ssd=4 * MIB, budgetS=0.2, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, first)
        stored_below(pool, model, second)
        given_up = threading.Event()
        reading = threading.Thread(target=_read_on, args=(pool, model.match(second), disk, given_up))
        reading.start()
        disk.stalls = _only_the_first("preadv")
        try:
            began = time.monotonic()
            assert load(model, first) == 0
            assert time.monotonic() - began < 5.0
        finally:
            given_up.set()
            reading.join()
            disk.recover()
        eventually(lambda: pool.stats().mode == "normal", "a probe finds the disk well again")
        assert load(model, first) == 3


def _read_on(pool: Pool, lease: Lease, disk: SickDisk, until: threading.Event) -> None:
    """Once a call hangs, read what is leased, over and over."""
    store, index = pool._engine.store, pool._engine.index
    with lease:
        assert lease._pin is not None
        places = index.places(lease._pin, SSD_LEVEL)
        eventually(lambda: disk.held > 0, "the read of the other prompt hangs")
        while not until.is_set():
            assert all(store.read(places, [aligned(RECORD) for _ in places]))


def _only_the_first(name: str) -> Callable[[str], bool]:
    seen: list[str] = []

    def stalls(called: str) -> bool:
        if called == name:
            seen.append(called)
        return called == name and len(seen) == 1

    return stalls


def test_a_write_that_stalls_holds_nobody_up_but_the_writers(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ram=16 * RECORD, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        disk.stalls = lambda name: name in ("pwritev", "create", "fallocate")
        try:
            for seed in range(10, 30):
                store(model, prompt(4, seed=seed))
                assert load(model, FOUR) == 4
        finally:
            disk.recover()
        flushed(pool)
        check(pool, leases=())


# -- a disk that fails -------------------------------------------------------------------------------------------------

ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS]


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("call", ["pwritev", "fallocate", "create"])
def test_a_disk_that_cannot_be_written_is_a_degradation_that_ends_by_itself(
    tmp_path: Path, call: str, error: int
) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        disk.errors = {call: error}
        assert store(model, FOUR).stored == 4
        eventually(lambda: pool.stats().mode == "no-ssd", "the first write fails")
        assert errno.errorcode[error] in pool.stats().tiers[SSD].last_error
        assert load(model, FOUR) == 4
        flushed(pool)
        store(model, prompt(2, seed=5))
        flushed(pool)
        assert sum(pool.stats().write_behind.dropped_blocks.values()) >= 4
        assert pool.stats().tiers[SSD].blocks == 0
        disk.recover()
        stores_until_normal(pool, model)
        check(pool, leases=())


def stores_until_normal(pool: Pool, model: Model) -> None:
    """The first write after the breaker's pause is the probe."""
    seeds = iter(range(1000, 1_000_000))

    def is_normal() -> bool:
        store(model, prompt(1, seed=next(seeds)))
        return pool.flush(0.1) and pool.stats().mode == "normal"

    eventually(is_normal, "the tier is in use again")


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)
def test_what_lies_on_a_disk_that_cannot_be_written_is_still_served(tmp_path: Path, error: int) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        disk.errors = {"pwritev": error, "fallocate": error, "create": error}
        store(model, prompt(3, seed=2))
        eventually(lambda: pool.stats().mode == "no-ssd", "the write fails")
        assert served(model, FOUR) == {SSD: 4}
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        assert load(pool.model("m"), FOUR) == 4


def test_a_disk_that_cannot_be_read_is_a_degradation_that_ends_by_itself(tmp_path: Path) -> None:
    disk = SickDisk()
    with open_pool(tmp_path, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        stored_below(pool, model, FOUR)
        disk.errors = {"preadv": errno.EIO}
        assert load(model, FOUR) == 0
        assert pool.stats().mode == "no-ssd"
        assert matched(model, FOUR) == 0
        assert {report.verdict for report in model.explain(FOUR)} <= {Verdict.TIER_DOWN, Verdict.UNREACHABLE}
        assert corrupt_records(pool) == 0, "no record is blamed for a disk that is out"
        disk.recover()
        eventually(lambda: pool.stats().mode == "normal", "a probe finds the disk well again")
        assert load(model, FOUR) == 4
        check(pool, leases=())


@pytest.mark.parametrize("call", ["make_directory", "open", "preadv", "pwritev"])
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)
def test_an_ssd_that_cannot_be_opened_is_left_out_and_opened_later(tmp_path: Path, call: str, error: int) -> None:
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        store(pool.register(spec()), FOUR)
    disk = SickDisk()
    disk.errors = {call: error}
    with open_pool(tmp_path, ssd=4 * MIB, disk=disk) as pool:
        model = pool.register(spec())
        if call != "pwritev":  # a lock that cannot name its holder is one all the same
            assert pool.stats().mode == "no-ssd" or load(model, FOUR) == 0
        assert store(model, prompt(3, seed=2)).stored == 3
        assert load(model, prompt(3, seed=2)) == 3
        disk.recover()
        eventually(lambda: matched(model, FOUR) == 4, "it is opened, and what lies there is found")
        assert load(model, FOUR) == 4
        flushed(pool)
        check(pool, leases=())


def test_a_directory_that_becomes_usable_is_used_from_then_on(tmp_path: Path) -> None:
    """Root may write everywhere, so a file stands where the directory should be."""
    open_pool(tmp_path).close()
    (tmp_path / "ssd").write_bytes(b"in the way")
    with open_pool(tmp_path, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        assert pool.stats().mode == "no-ssd"
        assert pool.degradations() == {"no-ssd"}
        assert store(model, FOUR).stored == 4
        (tmp_path / "ssd").unlink()
        eventually(lambda: pool.stats().mode == "normal", "the housekeeper opens it")
        stored_below(pool, model, prompt(3, seed=2))
        assert served(model, prompt(3, seed=2)) == {SSD: 3}
        check(pool, leases=())


def test_what_is_stored_while_a_tier_comes_back_is_not_lost_from_the_index(tmp_path: Path) -> None:
    """All that lies on SSD is entered before the first new record is written there."""
    with open_pool(tmp_path, ram=300 * RECORD, ssd=16 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(30):
            store(model, prompt(6, seed=seed))
    for _ in range(3):
        disk = SickDisk()
        disk.errors = {"make_directory": errno.EIO}
        with open_pool(tmp_path, ram=300 * RECORD, ssd=16 * MIB, disk=disk) as pool:
            model = pool.register(spec())
            disk.recover()
            stores_until_normal(pool, model)
            flushed(pool)
            assert sum(matched(model, prompt(6, seed=seed)) for seed in range(30)) == 180
            tier = pool._engine.store.tier
            assert tier is not None
            assert tier.stats().live_records == pool.stats().tiers[SSD].blocks
            check(pool, leases=())


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 1 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "kvpool-test", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)  # noqa: S607


def test_a_full_disk_is_a_degradation_and_what_lies_there_is_served(small_file_system: Path) -> None:
    with open_pool(small_file_system, ram=400 * RECORD, ssd=4 * MIB) as pool:
        model = pool.register(spec())
        for seed in range(40):
            assert store(model, prompt(6, seed=seed)).stored == 6
            pool.flush(1)
        assert pool.stats().mode == "no-ssd"
        assert "ENOSPC" in pool.stats().tiers[SSD].last_error
        empty_ram(pool)
        kept = [load(model, prompt(6, seed=seed)) for seed in range(40)]
        assert sum(kept) == pool.stats().tiers[SSD].blocks > 0
        check(pool, leases=())
    with open_pool(small_file_system, ssd=4 * MIB) as pool:
        assert [load(pool.model("m"), prompt(6, seed=seed)) for seed in range(40)] == kept
        check(pool, leases=())


def test_on_a_full_disk_an_erasure_that_cannot_be_kept_is_refused_and_changes_nothing(small_file_system: Path) -> None:
    with open_pool(small_file_system) as pool:
        model = pool.register(spec())
        store(model, FOUR, "acme")
        _fill_up(small_file_system)
        with pytest.raises(OSError, match="No space left"):
            pool.erase(tenant="acme")
        assert load(model, FOUR, "acme") == 4
        assert pool.register(spec("another")).name == "another"
        (small_file_system / "filling").unlink()
        assert pool.erase(tenant="acme").epoch == 1
        assert load(model, FOUR, "acme") == 0


def test_a_pool_that_finds_no_room_for_its_own_files_says_so(small_file_system: Path) -> None:
    _fill_up(small_file_system)
    with pytest.raises(ConfigError, match="No space left"):
        open_pool(small_file_system / "pool")
    (small_file_system / "filling").unlink()
    open_pool(small_file_system / "pool").close()


def _fill_up(directory: Path) -> None:
    fd = os.open(directory / "filling", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        os.posix_fallocate(fd, 0, 2 * MIB)
    with suppress(OSError):
        while True:
            os.write(fd, bytes(4096))
    os.close(fd)


# -- who may open it ---------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from tests.pool.kv import open_pool
with open_pool(Path(sys.argv[1]), ssd=1 << 20):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(DirectoryInUseError, match=rf"in use by process {holder.pid} "):
            open_pool(tmp_path, ssd=MIB)
        holder.communicate()
        assert holder.returncode == 0
    open_pool(tmp_path, ssd=MIB).close()


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        holder.kill()
        holder.wait()
    open_pool(tmp_path, ssd=MIB).close()


_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("FORMAT", b"format=1", b"format=2"),
        ("ssd/FORMAT", b"format=1", b"format=2"),
        ("ssd/FORMAT", b"record=1", b"record=2"),
        ("models.json", b'"version": 2', b'"version": 3'),
    ],
)
def test_what_a_newer_program_wrote_is_refused_and_left_alone(
    tmp_path: Path, file: str, old: bytes, new: bytes
) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        store(model, prompt(3, seed=2))
        pool.erase(tenant="other")
    path = tmp_path / file
    before = path.read_bytes()
    assert old in before
    path.write_bytes(before.replace(old, new))
    files = _contents(tmp_path)
    for _ in range(2):
        with pytest.raises(IncompatibleDataError, match="use a newer"):
            open_pool(tmp_path, ssd=MIB)
    assert _contents(tmp_path) == files
    path.write_bytes(before)
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert load(pool.model("m"), FOUR) == 4


def _contents(directory: Path) -> dict[Path, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "LOCK")
    return {path: path.read_bytes() for path in files}


# -- the small files ---------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    if how == "lost":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)


LOST_OR_DAMAGED = ["lost", "empty", "flipped"]


@pytest.mark.parametrize("how", LOST_OR_DAMAGED)
def test_without_the_epochs_no_block_is_believed_and_erased_tenants_stay_erased(tmp_path: Path, how: str) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        store(model, FOUR, "erased")
        store(model, FOUR, "kept")
        pool.erase(tenant="erased")
        store(model, prompt(2, seed=2), "erased")
    damage(tmp_path / "EPOCHS", how)
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.model("m")
        assert matched(model, FOUR, "erased") == matched(model, FOUR, "kept") == 0
        assert matched(model, prompt(2, seed=2), "erased") == 0
        assert store(model, FOUR, "kept").stored == 4
        pool.erase(tenant="erased")
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert load(pool.model("m"), FOUR, "kept") == 4
        assert matched(pool.model("m"), FOUR, "erased") == 0
        check(pool, leases=())


@pytest.mark.parametrize("how", LOST_OR_DAMAGED)
def test_without_the_epochs_and_without_ssd_tenants_can_still_be_erased(tmp_path: Path, how: str) -> None:
    """And what lies on the SSD that is not used now is never believed again."""
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        for _ in range(3):
            store(model, FOUR, "acme")
            pool.erase(tenant="acme")
        store(model, FOUR, "acme")
    damage(tmp_path / "EPOCHS", how)
    with open_pool(tmp_path) as pool:
        model = pool.model("m")
        store(model, prompt(2, seed=2), "acme")
        pool.erase(tenant="acme")
        assert matched(model, prompt(2, seed=2), "acme") == 0
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert matched(pool.model("m"), FOUR, "acme") == 0
        check(pool, leases=())


def test_a_lost_secret_costs_every_block_and_nothing_else(tmp_path: Path) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        store(pool.register(spec()), FOUR)
    (tmp_path / "SECRET").unlink()
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.model("m")
        assert matched(model, FOUR) == 0
        assert pool.stats().restored.dropped["orphan"] == 4
        assert store(model, FOUR).stored == 4
        check(pool, leases=())
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert load(pool.model("m"), FOUR) == 4


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    open_pool(tmp_path).close()
    (tmp_path / "SECRET").write_bytes(b"short")
    with pytest.raises(ConfigError, match="SECRET has 5 bytes; it must be 32"):
        open_pool(tmp_path)
    (tmp_path / "SECRET").unlink()
    open_pool(tmp_path).close()


@pytest.mark.parametrize("how", LOST_OR_DAMAGED)
def test_without_the_registry_models_are_known_once_they_are_registered(tmp_path: Path, how: str) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        store(pool.register(spec()), FOUR)
    damage(tmp_path / "models.json", how)
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert pool.known_models() == []
        assert load(pool.register(spec()), FOUR) == 4
        check(pool, leases=())
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert load(pool.model("m"), FOUR) == 4


@pytest.mark.parametrize("how", LOST_OR_DAMAGED)
def test_without_the_history_misses_are_unknown_and_hits_are_hits(tmp_path: Path, how: str) -> None:
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.register(spec())
        store(model, prompt(2, seed=2), "acme")
        pool.erase(tenant="acme")
        store(model, FOUR)
    damage(tmp_path / "HISTORY", how)
    with open_pool(tmp_path, ssd=MIB) as pool:
        model = pool.model("m")
        assert [report.verdict for report in model.explain(prompt(2, seed=3))] == [Verdict.UNKNOWN] * 2
        assert load(model, FOUR) == 4


def test_the_history_survives_a_start_that_fails(tmp_path: Path) -> None:
    with open_pool(tmp_path) as pool:
        model = pool.register(spec())
        store(model, FOUR)
        empty_ram(pool)
    secret = (tmp_path / "SECRET").read_bytes()
    (tmp_path / "SECRET").write_bytes(b"short")
    with pytest.raises(ConfigError):
        open_pool(tmp_path)
    (tmp_path / "SECRET").write_bytes(secret)
    with open_pool(tmp_path) as pool:
        assert [report.verdict for report in pool.model("m").explain(FOUR)] == [Verdict.EVICTED] * 4


def test_what_is_left_of_a_start_that_was_interrupted_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "FORMAT.tmp").write_bytes(b"kvpool-pool for")
    with open_pool(tmp_path, ssd=MIB) as pool:
        store(pool.register(spec()), FOUR)
    for name in ("SECRET.tmp", "EPOCHS.tmp", "models.json.tmp", "HISTORY.tmp", "ssd/BUDGET.tmp"):
        (tmp_path / name).write_bytes(b"half of it")
    with open_pool(tmp_path, ssd=MIB) as pool:
        assert load(pool.model("m"), FOUR) == 4
        assert disk_usage(tmp_path) <= MIB
        pool.erase(tenant="acme")
        assert loaded_blocks(pool.model("m").match(FOUR), pool.model("m"), FOUR) == 4

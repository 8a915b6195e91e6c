"""The journal loses nothing that it took, whatever happens to its files, and never more than it must."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.catalog.journal import SUFFIX, Entry, Journal, entries_of

MIB = 1 << 20


def opened(directory: Path, max_bytes: int = MIB) -> Journal:
    journal = Journal(directory, max_bytes=max_bytes)
    journal.open()
    return journal


def drained(journal: Journal) -> Iterator[Entry]:
    while (entry := journal.first()) is not None:
        yield entry
        journal.take()


def disk_bytes(directory: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir())


def test_entries_come_back_in_order_and_the_files_go(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    wanted = [Entry(bytes([at]) * 50_000, at) for at in range(40)]
    for entry in wanted[:20]:
        assert journal.append(*entry)
    assert journal.first() == wanted[0]
    assert journal.rows == sum(range(20))
    got = []
    for entry in wanted[20:]:
        got.append(journal.first())
        journal.take()
        assert journal.append(*entry)
    assert [*got, *drained(journal)] == wanted[:20] + wanted[20:] or journal.dropped_rows
    assert journal.is_empty
    assert not list((tmp_path / "j").iterdir())


def test_what_an_earlier_process_left_comes_first(tmp_path: Path) -> None:
    first = opened(tmp_path / "j")
    first.append(b"one", 1)
    first.append(b"two", 2)
    first.close()
    second = opened(tmp_path / "j")
    assert second.rows == 3
    second.append(b"three", 3)
    assert [entry.payload for entry in drained(second)] == [b"one", b"two", b"three"]


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    journal.append(b"x", 1)
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "j").iterdir()} == {0o600}


def test_a_full_journal_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j", max_bytes=256 << 10)
    for number in range(100):
        assert journal.append(number.to_bytes(4, "big") + bytes(9_996), 10)
        assert disk_bytes(tmp_path / "j") <= 256 << 10
    kept = [int.from_bytes(entry.payload[:4], "big") for entry in drained(journal)]
    assert kept == list(range(100 - len(kept), 100))
    assert len(kept) > 15
    assert journal.dropped_rows == 10 * (100 - len(kept))


def test_the_oldest_is_dropped_even_while_it_is_being_taken(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j", max_bytes=64 << 10)
    for number in range(4):
        journal.append(bytes([number]) * 3_000, 1)
    assert journal.first() == Entry(bytes([0]) * 3_000, 1)
    journal.take()
    for number in range(4, 40):
        journal.append(bytes([number]) * 3_000, 1)
    kept = [entry.payload[0] for entry in drained(journal)]
    assert kept == list(range(40 - len(kept), 40))
    assert journal.dropped_rows == 40 - 1 - len(kept)


def test_an_entry_larger_than_the_whole_is_refused_and_counted(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j", max_bytes=64 << 10)
    journal.append(b"small", 1)
    assert not journal.append(bytes(64 << 10), 7)
    assert journal.dropped_rows == 7
    assert [entry.payload for entry in drained(journal)] == [b"small"]


def test_a_journal_found_larger_than_it_may_be_is_cut_down(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j", max_bytes=MIB)
    for number in range(50):
        journal.append(bytes([number]) * 10_000, 1)
    journal.close()
    smaller = opened(tmp_path / "j", max_bytes=256 << 10)
    assert disk_bytes(tmp_path / "j") <= 256 << 10
    kept = [entry.payload[0] for entry in drained(smaller)]
    assert kept == list(range(50 - len(kept), 50))
    assert smaller.dropped_rows + len(kept) == 50


def _journal_of_three(directory: Path) -> tuple[Path, bytes, list[Entry]]:
    wanted = [Entry(b"first", 1), Entry(b"", 2), Entry(b"the third one", 3)]
    journal = opened(directory)
    for entry in wanted:
        journal.append(*entry)
    journal.close()
    (file,) = directory.glob(f"*{SUFFIX}")
    return file, file.read_bytes(), wanted


def test_a_journal_that_was_cut_at_any_byte_keeps_every_whole_entry(tmp_path: Path) -> None:
    file, data, wanted = _journal_of_three(tmp_path / "j")
    ends = [data.index(entry.payload, 8) + len(entry.payload) if entry.payload else 0 for entry in wanted]
    ends[1] = ends[0] + 20
    for cut in range(len(data) + 1):
        file.write_bytes(data[:cut])
        journal = opened(tmp_path / "j")
        journal.append(b"after", 4)
        assert list(drained(journal)) == [
            *(w for w, end in zip(wanted, ends, strict=True) if end <= cut),
            Entry(b"after", 4),
        ]
        for left in (tmp_path / "j").iterdir():
            left.unlink()


def test_a_flipped_byte_costs_its_own_entry_and_no_other(tmp_path: Path) -> None:
    file, data, wanted = _journal_of_three(tmp_path / "j")
    starts = [8, 8 + 20 + 5, 8 + 20 + 5 + 20, len(data)]
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        journal = opened(tmp_path / "j")
        hit = [start <= at < end for start, end in itertools.pairwise(starts)]
        assert list(drained(journal)) == [entry for entry, was_hit in zip(wanted, hit, strict=True) if not was_hit]
        assert bool(journal.damaged_bytes) == any(hit)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 30_000), st.just("take"), st.just("restart")), max_size=60))
def test_it_is_a_queue_without_gaps_but_for_what_it_dropped(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int | str]
) -> None:
    """Entries are numbered by their rows. A restart may bring back what was taken, and nothing else."""
    directory = tmp_path_factory.mktemp("journal")
    journal = opened(directory, max_bytes=128 << 10)
    appended, expected, dropped, may_go_back = 0, 1, False, False
    for step in [*steps, *["take"] * (len(steps) + 1)]:
        if step == "take":
            entry = journal.first()
            dropped = dropped or journal.dropped_rows > 0
            if entry is None:
                assert expected == appended + 1 or dropped
                continue
            assert (
                entry.rows == expected or (dropped and entry.rows > expected) or (may_go_back and entry.rows < expected)
            )
            expected, may_go_back = entry.rows + 1, False
            journal.take()
        elif step == "restart":
            dropped = dropped or journal.dropped_rows > 0
            journal.close()
            journal = opened(directory, max_bytes=128 << 10)
            may_go_back = True
        else:
            appended += 1
            assert journal.append(bytes(int(step)), appended)
        assert disk_bytes(directory) <= 128 << 10
    assert expected == appended + 1
    assert journal.is_empty
    journal.close()
    shutil.rmtree(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)  # noqa: S607 - wherever the system has it


def test_a_full_disk_costs_the_new_entry_and_nothing_else(small_disk: Path) -> None:
    journal = opened(small_disk / "j", max_bytes=8 * MIB)
    taken: list[int] = []

    def append_until_refused() -> None:
        while True:
            journal.append(len(taken).to_bytes(4, "big") + bytes(20_000), 1)
            taken.append(len(taken))

    with pytest.raises(OSError, match="space") as raised:
        append_until_refused()
    assert raised.value.errno == errno.ENOSPC
    assert len(taken) > 5
    assert [int.from_bytes(entry.payload[:4], "big") for entry in drained(journal)] == taken
    assert journal.append(b"room again", 1)
    journal.close()


_APPENDER = """
import sys
from pathlib import Path
from kvpool.catalog.journal import Journal
journal = Journal(Path(sys.argv[1]), max_bytes=64 << 20)
journal.open()
number = 0
while True:
    journal.append(number.to_bytes(4, "big") * 2_000, 1)
    print(number, flush=True)
    number += 1
"""


def test_what_was_taken_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _APPENDER, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 25:
            process.kill()
            break
    told = [25, *map(int, process.stdout.read().split())]
    process.wait()
    process.stdout.close()
    found = [int.from_bytes(entry.payload[:4], "big") for entry in drained(opened(tmp_path / "j"))]
    assert found == list(range(len(found)))
    assert len(found) >= told[-1] + 1


def test_noise_between_entries_is_passed_over() -> None:
    assert list(entries_of(b"kvJ\xe5" * 10 + b"noise")) == []

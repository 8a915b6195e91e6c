"""Segment files that are not as they were left: flipped, cut off, exchanged, of another version, or not ours at all."""

from __future__ import annotations

import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import xxhash

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import VERSION as RECORD_VERSION
from kvpool.errors import IncompatibleDataError
from kvpool.tiers.ssd.segment import FORMAT_VERSION
from kvpool.tiers.ssd.tier import SsdTier

from .disks import DiskWithABadPage, FaultyDisk, QuickDisk, every, nothing
from .records import all_recovered, is_record, put, put_although_full, read, sound

SEGMENT_BYTES = 5 * PAGE_BYTES
"""A header, a record of two pages, one of one, and a footer."""
HEAD_BYTES = 160
"""Of a page, in which whatever says something about others stands."""
CAPACITY_BYTES = 4 * PAGE_BYTES + 4 * SEGMENT_BYTES
SIZES = {1: 2, 2: 1}
"""Pages by number of record."""


def opened(directory: Path) -> SsdTier:
    return SsdTier.open(directory, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, disk=QuickDisk())


def filled(directory: Path) -> SsdTier:
    tier = opened(directory)
    for number, pages in SIZES.items():
        put(tier, [number], pages=pages)
    return tier


@pytest.fixture
def sealed(quick_path: Path) -> Path:
    """A directory with one sealed segment of two records."""
    directory = quick_path / "ssd"
    filled(directory).close()
    return directory


@pytest.fixture
def unsealed(quick_path: Path) -> Iterator[Path]:
    """The same, as a `kill -9` leaves it."""
    tier = filled(quick_path / "living")
    shutil.copytree(quick_path / "living", quick_path / "ssd")
    yield quick_path / "ssd"
    tier.close()


def segment_in(directory: Path) -> Path:
    (path,) = directory.glob("*.segment")
    return path


def whole_records(directory: Path) -> tuple[set[int], SsdTier]:
    """What the directory gives back, byte for byte; anything else that is said to be there fails the test."""
    tier = opened(directory)
    return {number for _, number in sound(tier, all_recovered(tier))}, tier


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of damaged files are thousands of log lines."""
    caplog.set_level(logging.CRITICAL)


def flipped_everywhere(directory: Path, positions: Iterator[int]) -> Iterator[tuple[int, set[int]]]:
    """For each position: what is left when the directory is opened with one bit flipped there."""
    path = segment_in(directory)
    good, marker = path.read_bytes(), (directory / "FORMAT").read_bytes()
    random = Random(1)
    for position in positions:
        for left in directory.iterdir():
            left.unlink()
        (directory / "FORMAT").write_bytes(marker)
        damaged = bytearray(good)
        damaged[position] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        whole, tier = whole_records(directory)
        yield position, whole
        tier.close()


RECORD_ON_PAGE = {0: set[int](), 1: {1}, 2: {1}, 3: {2}, 4: set[int]()}


def test_a_flipped_byte_costs_the_record_that_it_hit_and_no_other(sealed: Path) -> None:
    _flip(sealed, (at for at in range(SEGMENT_BYTES) if at % PAGE_BYTES < HEAD_BYTES or at % 7 == 0))


@pytest.mark.slow
def test_a_flipped_byte_anywhere_costs_the_record_that_it_hit_and_no_other(sealed: Path) -> None:
    _flip(sealed, iter(range(SEGMENT_BYTES)))


def _flip(sealed: Path, positions: Iterator[int]) -> None:
    for position, whole in flipped_everywhere(sealed, positions):
        assert whole == {1, 2} - RECORD_ON_PAGE[position // PAGE_BYTES], f"byte {position}"


def test_a_flipped_byte_in_a_segment_that_was_not_sealed_costs_no_more_but_in_the_header(unsealed: Path) -> None:
    good = segment_in(unsealed).read_bytes()
    says_something = (at for at in range(SEGMENT_BYTES) if good[at] or at % 8 == 0)
    positions = (at for at in says_something if at % PAGE_BYTES < HEAD_BYTES or at % 3 == 0)
    for position, whole in flipped_everywhere(unsealed, positions):
        if position < 88:  # the header, without which nothing can be told from what lay here before
            assert whole <= {1, 2}
        else:
            assert whole == {1, 2} - RECORD_ON_PAGE[position // PAGE_BYTES], f"byte {position}"


def test_a_damaged_file_is_used_again_rightly(sealed: Path) -> None:
    """After each kind of damage the tier stores and gives back as ever, and a restart finds what was stored."""
    path = segment_in(sealed)
    good = path.read_bytes()
    for position in [0, 8, 20, 30, 80, PAGE_BYTES, 2 * PAGE_BYTES, 4 * PAGE_BYTES, len(good) - 1, len(good) - 60]:
        directory = sealed.parent / str(position)
        directory.mkdir()
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        (directory / path.name).write_bytes(damaged)
        _, tier = whole_records(directory)
        for number in range(10, 20):
            put_although_full(tier, number)
        tier.close()
        whole, tier = whole_records(directory)
        assert 19 in whole
        tier.close()


@pytest.mark.parametrize("size", [0, 1, 511, 512, PAGE_BYTES - 1, *range(PAGE_BYTES, SEGMENT_BYTES, PAGE_BYTES), 9_999])
def test_a_truncated_file_is_dropped_and_its_room_is_free_again(sealed: Path, size: int) -> None:
    path = segment_in(sealed)
    path.write_bytes(path.read_bytes()[:size])
    whole, tier = whole_records(sealed)
    assert whole == set()
    assert tier.recovery.dropped["size"] == 1
    assert tier.used_bytes == 4 * PAGE_BYTES
    assert not list(sealed.glob("*.segment"))
    tier.close()


def test_a_file_that_grew_is_dropped(sealed: Path) -> None:
    path = segment_in(sealed)
    path.write_bytes(path.read_bytes() + bytes(PAGE_BYTES))
    whole, tier = whole_records(sealed)
    assert whole == set()
    tier.close()


@pytest.mark.parametrize("content", [bytes(SEGMENT_BYTES), b"\xff" * SEGMENT_BYTES, b"not ours" * 1000, b"x"])
def test_a_file_of_anything_under_a_segment_s_name_is_dropped(sealed: Path, content: bytes) -> None:
    (sealed / "00abcd.segment").write_bytes(content)
    whole, tier = whole_records(sealed)
    assert whole == {1, 2}
    assert sum(tier.recovery.dropped.values()) == 1
    assert not (sealed / "00abcd.segment").exists()
    tier.close()


def test_a_copy_of_a_segment_under_another_name_is_no_second_segment(sealed: Path) -> None:
    shutil.copy(segment_in(sealed), sealed / "00abcd.segment")
    whole, tier = whole_records(sealed)
    assert whole == {1, 2}
    assert tier.recovery.dropped == {"foreign": 1}
    assert len(tier.segments()) == 1
    tier.close()


def test_a_segment_of_another_model_s_records_gives_nothing_wrong(quick_path: Path) -> None:
    """The records of one file in the frame of another: each life has a tag of its own, which they do not carry."""
    one, other = quick_path / "one", quick_path / "other"
    filled(one).close()
    filled(other).close()
    mixed = bytearray(segment_in(one).read_bytes())
    mixed[PAGE_BYTES : 4 * PAGE_BYTES] = segment_in(other).read_bytes()[PAGE_BYTES : 4 * PAGE_BYTES]
    for footer in (True, False):
        if not footer:
            mixed[-PAGE_BYTES:] = bytes(PAGE_BYTES)
        segment_in(one).write_bytes(mixed)
        whole, tier = whole_records(one)
        assert whole == set()
        tier.close()
        assert not footer or all(info.records for info in tier.segments())


def test_what_is_not_ours_is_left_alone_and_named_in_the_log(sealed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (sealed / "notes.txt").write_text("mine")
    (sealed / "subdirectory").mkdir()
    (sealed / "000007.segment").symlink_to(sealed / "notes.txt")
    (sealed / "ffffff.segment").write_bytes(bytes(SEGMENT_BYTES))  # ids end at 7fffff
    whole, tier = whole_records(sealed)
    assert whole == {1, 2}
    assert tier.recovery.foreign_files == 4
    assert tier.used_bytes == 4 * PAGE_BYTES + SEGMENT_BYTES
    for number in range(10, 20):
        put_although_full(tier, number)
    tier.close()
    assert (sealed / "notes.txt").read_text() == "mine"
    assert (sealed / "000007.segment").is_symlink()
    assert "notes.txt is not ours" in caplog.text


def test_a_freed_segment_does_not_come_back_by_a_damaged_header(sealed: Path) -> None:
    _, tier = whole_records(sealed)
    assert tier.free_segment(tier.segments()[0].id)
    tier.close()
    path = segment_in(sealed)
    good = path.read_bytes()
    for position in range(96):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        whole, tier = whole_records(sealed)
        assert whole == set(), f"byte {position}"
        tier.close()


def test_a_damaged_header_is_made_anew_when_its_segment_is_continued(sealed: Path) -> None:
    """The footer vouches for the segment until it is unmade; a crash after that depends on the header."""
    path = segment_in(sealed)
    roomy = SEGMENT_BYTES + 4 * PAGE_BYTES
    directory = sealed.parent / "roomy"
    tier = SsdTier.open(directory, capacity_bytes=1 << 20, segment_bytes=roomy, disk=QuickDisk())
    put(tier, [1, 2])
    tier.close()
    path = segment_in(directory)
    damaged = bytearray(path.read_bytes())
    damaged[30] ^= 0xFF
    path.write_bytes(damaged)
    tier = SsdTier.open(directory, capacity_bytes=1 << 20, segment_bytes=roomy, disk=QuickDisk())
    all_recovered(tier)
    put(tier, [3])
    shutil.copytree(directory, sealed.parent / "crashed")
    tier.close()
    tier = SsdTier.open(sealed.parent / "crashed", capacity_bytes=1 << 20, segment_bytes=roomy, disk=QuickDisk())
    assert {number for _, number in sound(tier, all_recovered(tier))} == {1, 2, 3}
    tier.close()


def test_a_record_damaged_while_the_tier_is_open_is_not_taken_for_whole(sealed: Path) -> None:
    tier = opened(sealed)
    found = {record.depth: record.place for record in all_recovered(tier)}
    path = segment_in(sealed)
    damaged = bytearray(path.read_bytes())
    damaged[PAGE_BYTES + 100] ^= 1
    path.write_bytes(damaged)
    assert not is_record(read(tier, found[1]), 1)
    assert is_record(read(tier, found[2]), 2, pages=1)
    tier.close()


# --- versions ----------------------------------------------------------------------------------------------------


def reversioned(segment: bytes, format_version: int, record_version: int) -> bytes:
    """A segment file as another version might have written it: its header and trailer say so, with right checksums."""
    data = bytearray(segment)
    for at, size in ((0, 80), (len(data) - 104, 96)):
        data[at + 8 : at + 12] = struct.pack("<HH", format_version, record_version)
        data[at + size : at + size + 8] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[at : at + size])))
    return bytes(data)


def test_the_helper_that_changes_versions_is_right(sealed: Path) -> None:
    path = segment_in(sealed)
    assert reversioned(path.read_bytes(), FORMAT_VERSION, RECORD_VERSION) == path.read_bytes()


@pytest.mark.parametrize(
    ("format_version", "record_version"),
    [(FORMAT_VERSION + 1, RECORD_VERSION), (FORMAT_VERSION, RECORD_VERSION + 1), (999, 999)],
)
def test_a_directory_of_a_newer_program_is_refused_and_left_alone(
    sealed: Path, format_version: int, record_version: int
) -> None:
    (sealed / "FORMAT").write_text(f"kvpool-ssd format={format_version} record={record_version}\nand more\n")
    path = segment_in(sealed)
    path.write_bytes(reversioned(path.read_bytes(), format_version, record_version))
    before = {path.name: path.read_bytes() for path in sealed.iterdir()}
    with pytest.raises(IncompatibleDataError, match=f"ssd format {format_version} with record version"):
        opened(sealed)
    assert {path.name: path.read_bytes() for path in sealed.iterdir()} == before


def test_a_newer_program_that_came_while_we_waited_for_the_lock_is_seen(quick_path: Path) -> None:
    directory = quick_path / "ssd"
    newer = b"kvpool-ssd format=%d record=1\n" % (FORMAT_VERSION + 1)

    class Overtaken(QuickDisk):
        def lock(self, fd: int) -> None:
            (directory / "FORMAT").write_bytes(newer)
            super().lock(fd)

    with pytest.raises(IncompatibleDataError):
        SsdTier.open(directory, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, disk=Overtaken())
    assert (directory / "FORMAT").read_bytes() == newer
    (directory / "FORMAT").unlink()
    opened(directory).close()  # and the lock was given back


@pytest.mark.parametrize("text", ["", "something else\n", "kvpool-ssd format=x record=1\n"])
def test_a_marker_that_says_nothing(sealed: Path, text: str) -> None:
    (sealed / "FORMAT").write_text(text)
    if text:
        with pytest.raises(IncompatibleDataError, match="no marker of kvpool's ssd tier"):
            opened(sealed)
    else:  # the file of an interrupted first start
        whole, tier = whole_records(sealed)
        assert whole == {1, 2}
        tier.close()


def test_a_directory_of_an_older_record_version_starts_empty(sealed: Path) -> None:
    (sealed / "FORMAT").write_text(f"kvpool-ssd format={FORMAT_VERSION} record={RECORD_VERSION - 1}\n")
    path = segment_in(sealed)
    path.write_bytes(reversioned(path.read_bytes(), FORMAT_VERSION, RECORD_VERSION - 1))
    whole, tier = whole_records(sealed)
    assert whole == set()
    assert tier.recovery.dropped == {"version": 1}
    put(tier, [5])
    tier.close()
    assert f"record={RECORD_VERSION}\n" in (sealed / "FORMAT").read_text()
    whole, tier = whole_records(sealed)
    assert whole == {5}
    tier.close()


def test_an_unsealed_segment_of_an_older_record_version_is_dropped_too(unsealed: Path) -> None:
    path = segment_in(unsealed)
    data = bytearray(path.read_bytes())
    data[10:12] = struct.pack("<H", RECORD_VERSION - 1)
    data[80:88] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[:80])))
    path.write_bytes(data)
    whole, tier = whole_records(unsealed)
    assert whole == set()
    assert tier.recovery.dropped == {"version": 1}
    tier.close()


# --- what cannot be read -----------------------------------------------------------------------------------------


def test_a_segment_that_cannot_be_read_at_start_up_is_kept_until_its_room_is_needed(sealed: Path) -> None:
    disk = FaultyDisk(QuickDisk())
    tier = SsdTier.open(sealed, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, disk=disk)
    disk.plan = every("open")
    assert all_recovered(tier) == []
    assert tier.recovery.dropped == {"io-error": 1}
    disk.plan = nothing
    tier.close()
    whole, tier = whole_records(sealed)
    assert whole == {1, 2}
    tier.close()

    disk = FaultyDisk(QuickDisk())
    tier = SsdTier.open(sealed, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, disk=disk)
    disk.plan = every("open")
    assert all_recovered(tier) == []
    disk.plan = nothing
    for number in range(10, 20):
        put_although_full(tier, number)
    assert tier.used_bytes <= CAPACITY_BYTES
    tier.close()


@pytest.mark.parametrize("state", ["sealed", "unsealed"])
@pytest.mark.parametrize("page", range(5))
def test_a_page_that_cannot_be_read_costs_at_most_its_record(
    state: str, page: int, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(state)
    tier = SsdTier.open(
        directory, capacity_bytes=CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, disk=DiskWithABadPage(page)
    )
    whole = {number for _, number in sound(tier, all_recovered(tier))}
    lost = {0: {1, 2}, 1: {1}, 2: {1}, 3: {2}, 4: set()}[page]
    assert whole == {1, 2} - lost
    tier.close()


def test_a_footer_makes_up_for_a_header_that_cannot_be_read(quick_path: Path) -> None:
    size = 40 * PAGE_BYTES
    tier = SsdTier.open(quick_path / "ssd", capacity_bytes=1 << 20, segment_bytes=size, disk=QuickDisk())
    put(tier, range(16))
    tier.close()
    tier = SsdTier.open(quick_path / "ssd", capacity_bytes=1 << 20, segment_bytes=size, disk=DiskWithABadPage(0))
    assert len(sound(tier, all_recovered(tier))) == 16
    put(tier, [20])  # not into this one: it is not continued
    assert len(tier.segments()) == 2
    tier.close()

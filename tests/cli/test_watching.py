"""`kvpool run` takes over what is changed in its file, however it is changed, and nothing that is wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvpool.cli.exits import ExitCode
from kvpool.cli.watching import FileWatch, state_of
from tests.cli.command import POOL, kvpool, started

pytestmark = pytest.mark.timeout(60)
QUOTA = "  models: [{name: tiny, quotas: {ram: {limit: SIZE}}}]\n"


class Running:
    """A `kvpool run` whose log is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def logged(self, wanted: str) -> list[str]:
        """The log lines that speak of the file, up to the next one that has `wanted` in it."""
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            if ".yaml" in line:
                lines.append(line.rstrip("\n"))
            if wanted in line:
                return lines
        raise AssertionError(f"it ended without {wanted!r}: {lines}")

    def printed(self, wanted: str) -> str:
        """The next line of output that has `wanted` in it."""
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if wanted in line)


@contextmanager
def running(file: Path, directory: Path) -> Iterator[Running]:
    process = started("run", file, "--directory", directory, "--every", "0.2")
    try:
        found = Running(process)
        found.printed("is open")
        yield found
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == ExitCode.OK


def test_a_changed_file_is_taken_over_and_what_changed_is_said(pool_file: Path, directory: Path) -> None:
    with running(pool_file, directory) as run:
        pool_file.write_text(POOL.replace("ram: {capacity: 16Mi", "ram: {capacity: 32Mi"))
        assert run.logged("was taken over")[0] == f"INFO {pool_file}: spec.tiers.ram.capacity 16Mi -> 32Mi"
        assert "of 32 MiB" in run.printed("of 32 MiB")


def test_a_quota_that_was_edited_is_in_force_and_what_no_longer_fits_goes(
    pool_file: Path, used_directory: Path
) -> None:
    with running(pool_file, used_directory) as run:
        run.printed("(3 blocks)")
        assert kvpool("quota", pool_file, "tiny", "ssd.limit=0", "--add").code == 0
        assert f'{pool_file}: spec.models["tiny"].quotas.ssd.limit absent -> 0' in run.logged("was taken over")[0]
        run.printed("of 64 MiB (0 blocks)")


def test_a_file_that_is_replaced_by_rename_is_followed(pool_file: Path, directory: Path) -> None:
    with running(pool_file, directory) as run:
        new = pool_file.with_name("new.yaml")
        new.write_text(POOL + QUOTA.replace("SIZE", "4Mi"))
        new.rename(pool_file)
        assert "-> 4Mi" in run.logged("was taken over")[0]


def test_a_directory_that_a_config_map_switches_is_followed(tmp_path: Path, directory: Path) -> None:
    def version(number: int, text: str) -> None:
        made = tmp_path / "mount" / f"..{number}"
        made.mkdir(parents=True)
        (made / "pool.yaml").write_text(text)
        link = tmp_path / "mount" / "..data_tmp"
        link.symlink_to(made.name)
        link.rename(tmp_path / "mount" / "..data")

    version(1, POOL)
    file = tmp_path / "mount" / "pool.yaml"
    file.symlink_to("..data/pool.yaml")
    with running(file, directory) as run:
        version(2, POOL + QUOTA.replace("SIZE", "4Mi"))
        assert "quotas.ram.limit absent -> 4Mi" in run.logged("was taken over")[0]


def test_a_broken_file_is_said_with_its_field_and_changes_nothing(pool_file: Path, directory: Path) -> None:
    with running(pool_file, directory) as run:
        pool_file.write_text(POOL.replace("16Mi", "16Mu"))
        assert f"ERROR {pool_file}:6: spec.tiers.ram.capacity is '16Mu'" in run.logged("was not taken over")[0]
        assert "of 16 MiB" in run.printed("of 16 MiB")
        pool_file.write_text(POOL.replace("capacity: 16Mi", "capacity: 32Mi"))
        assert "16Mi -> 32Mi" in run.logged("was taken over")[0]


def test_what_needs_a_restart_is_said(pool_file: Path, directory: Path) -> None:
    with running(pool_file, directory) as run:
        pool_file.write_text(POOL + "  blockTokens: 32\n")
        assert run.logged("needs a restart")[-1].startswith(
            f"WARNING {pool_file}: spec.blockTokens 64 -> 32 needs a restart"
        )


def test_the_log_level_is_taken_over(pool_file: Path, directory: Path) -> None:
    pool_file.write_text(POOL + "  telemetry: {logLevel: error}\n")
    with running(pool_file, directory) as run:
        pool_file.write_text(POOL)
        assert run.logged("was taken over")[0] == f"INFO {pool_file}: spec.telemetry.logLevel error -> info"


def test_a_file_that_goes_and_comes_back_is_said_and_taken_over(pool_file: Path, directory: Path) -> None:
    with running(pool_file, directory) as run:
        pool_file.unlink()
        run.logged(f"{pool_file} is gone")
        pool_file.write_text(POOL.replace("capacity: 16Mi", "capacity: 32Mi"))
        assert "16Mi -> 32Mi" in run.logged("was taken over")[0]


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Path, FileWatch]:
    file = tmp_path / "pool.yaml"
    file.write_text("one")
    return file, FileWatch(file, state_of(file))


def test_a_file_that_stays_as_it_was_has_not_changed(watched: tuple[Path, FileWatch]) -> None:
    _, watch = watched
    assert [watch.has_changed() for _ in range(3)] == [False] * 3


def test_a_change_is_told_once_and_only_when_it_has_stood_for_a_look(watched: tuple[Path, FileWatch]) -> None:
    file, watch = watched
    file.write_text("two, in the making")
    assert not watch.has_changed()
    file.write_text("two, in the making, done")
    assert not watch.has_changed()
    assert watch.has_changed()
    assert not watch.has_changed()


def test_what_was_changed_before_the_first_look_is_found(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text("one")
    watch = FileWatch(file, state_of(file))
    file.write_text("two")
    assert [watch.has_changed(), watch.has_changed()] == [False, True]

"""The pool's directory: ours alone, held once, and never taken from somebody else."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvpool.errors import ConfigError, DirectoryInUseError, IncompatibleDataError
from kvpool.pool.directory import PoolDirectory

AS_ROOT = os.geteuid() == 0


def test_a_new_directory_is_made_with_its_parents_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "data" / "kvpool" / "chat"
    with PoolDirectory.open(path) as directory:
        assert directory.is_new
        assert directory.path == path
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert {directory.ssd.parent, directory.secret.parent, directory.epochs.parent, directory.models.parent} == {
            path
        }


def test_a_directory_that_was_opened_before_is_not_new(tmp_path: Path) -> None:
    PoolDirectory.open(tmp_path / "pool").close()
    with PoolDirectory.open(tmp_path / "pool") as directory:
        assert not directory.is_new


def test_rights_that_others_got_since_are_taken_away(tmp_path: Path) -> None:
    PoolDirectory.open(tmp_path / "pool").close()
    (tmp_path / "pool").chmod(0o755)
    with PoolDirectory.open(tmp_path / "pool"):
        assert stat.S_IMODE((tmp_path / "pool").stat().st_mode) == 0o700


def test_a_second_opening_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    with (
        PoolDirectory.open(tmp_path / "pool"),
        pytest.raises(DirectoryInUseError, match=f"process {os.getpid()} on "),
    ):
        PoolDirectory.open(tmp_path / "pool")


def test_closing_lets_the_next_one_in_and_may_be_repeated(tmp_path: Path) -> None:
    directory = PoolDirectory.open(tmp_path / "pool")
    directory.close()
    directory.close()
    PoolDirectory.open(tmp_path / "pool").close()


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    holder = (
        "import sys; from pathlib import Path; from kvpool.pool.directory import PoolDirectory\n"
        "held = PoolDirectory.open(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "pool")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryInUseError, match=f"process {process.pid} on "):
            PoolDirectory.open(tmp_path / "pool")
        process.send_signal(signal.SIGKILL)
        process.wait()
    PoolDirectory.open(tmp_path / "pool").close()


def test_a_directory_of_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        PoolDirectory.open(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("left", ["LOCK", "FORMAT.tmp", "lost+found"])
def test_what_an_interrupted_first_start_left_behind_is_no_hindrance(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    with PoolDirectory.open(tmp_path) as directory:
        assert directory.is_new


def test_a_newer_programs_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("kvpool-pool format=2\nand more\n")
    with pytest.raises(IncompatibleDataError, match="format 2"):
        PoolDirectory.open(tmp_path)
    assert not (tmp_path / "LOCK").exists()


def test_a_marker_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("ext4\n")
    with pytest.raises(ConfigError, match="no marker"):
        PoolDirectory.open(tmp_path)


def test_a_file_in_its_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "pool").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        PoolDirectory.open(tmp_path / "pool")


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        PoolDirectory.open(tmp_path / "parent" / "pool")

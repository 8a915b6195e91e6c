from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of its own is made in it


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory for hundreds of short lives: in memory where the machine has such a file system, else `tmp_path`."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY, prefix="kvpool-test-") as name:
        yield Path(name)

"""Fixtures of the pool's tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where the machine has one: for tests that open a pool hundreds of times."""
    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own is made there
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="kvpool-test-") as directory:
        yield Path(directory)

"""`kvpool bench shared` measures the dragonfly tier on a real server. What it measures is never looked at."""

from __future__ import annotations

from pathlib import Path

from tests.bench.test_rows import KEYS
from tests.cli.command import kvpool


def test_the_dragonfly_tier_is_measured_beside_probes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ended = kvpool("bench", "shared", "--quick", "--only", "dragonfly", "--directory", tmp_path, "--json")
    assert ended.code == 0
    rows = ended.objects
    assert {row["name"] for row in rows} >= {
        "dragonfly.get.64x256KiB", "dragonfly.put.64x256KiB", "dragonfly.get.32x2MiB", "dragonfly.put.32x2MiB",
        "dragonfly.one-get.1KiB", "dragonfly.pipelined-gets.100B",
    }  # fmt: skip
    for row in rows:
        assert list(row) == KEYS
        assert row["value"] > 0
        assert row["probe"] > 0
        assert str(row["name"]).startswith("dragonfly.")
    assert list(tmp_path.iterdir()) == []

"""`kvpool status --config`."""

from __future__ import annotations

from pathlib import Path

from kvpool.cli.exits import ExitCode
from tests.cli.command import kvpool


def test_status_says_of_each_setting_where_it_comes_from(pool_file: Path) -> None:
    pool_file.write_text(pool_file.read_text() + "  profiles: [chat]\n")
    ended = kvpool("status", "--config", pool_file, "--json")
    assert ended.code == 0
    sources = {setting["path"]: (setting["value"], setting["source"]) for setting in ended.objects}
    assert sources["spec.tiers.ram.capacity"] == ("16Mi", "pool")
    assert sources["spec.sharing.protectShared"] == ("true", "profile chat")
    assert sources["spec.tiers.ssd.budget"] == ("100ms", "default")


def test_status_is_a_table_for_people(pool_file: Path) -> None:
    ended = kvpool("status", "--config", pool_file)
    assert ended.code == 0
    assert ["spec.tiers.ram.capacity", "16Mi", "pool"] in [line.split() for line in ended.out.splitlines()]


def test_every_fault_of_a_file_is_a_line_with_its_place(pool_file: Path) -> None:
    pool_file.write_text(pool_file.read_text().replace("16Mi", "16Mu").replace("secondHit: false", "secondHit: maybe"))
    ended = kvpool("status", "--config", pool_file)
    assert ended.code == ExitCode.USAGE
    lines = ended.err.splitlines()
    assert all(line.startswith(f"kvpool: {pool_file}:") for line in lines)
    assert [path for path in ("ram.capacity", "ram.indexBytes", "ssd.secondHit") if path in ended.err] != []


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    ended = kvpool("status", "--config", tmp_path / "absent.yaml")
    assert ended.code == ExitCode.USAGE
    assert "absent.yaml" in ended.complaint

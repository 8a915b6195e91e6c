"""`kvpool bench` runs, prints rows of the documented form, and cleans up. What it measures is never looked at."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from kvpool.bench.area import benchmarks_of
from kvpool.cli.exits import ExitCode
from tests.bench.test_rows import KEYS
from tests.cli.command import kvpool, started

QUICK = ("--quick", "--seconds", "1")
NAMES = [benchmark.name for benchmark in benchmarks_of("engine")]
MEASURED = [name for name in NAMES if name != "model"]
"""The other one loads a model: half a minute where that was never done."""


def test_every_benchmark_prints_rows_of_the_documented_form_and_removes_its_files(tmp_path: Path) -> None:
    only = [argument for name in MEASURED for argument in ("--only", name)]
    ended = kvpool("bench", *QUICK, *only, "--directory", tmp_path, "--json")
    assert ended.code == 0
    rows = ended.objects
    unmeasured = [row["name"] for row in rows if row["value"] is None]  # where the file system has no O_DIRECT
    assert [line.split()[1] for line in ended.err.splitlines()] == unmeasured
    for row in rows:
        assert list(row) == KEYS
        assert isinstance(row["value"], int | float | None)
        assert (row["probe"] is None) == (row["ratio"] is None)
        assert (row["target"] is None) == (row["met"] is None)
    assert len({row["name"] for row in rows}) == len(rows)
    assert list(dict.fromkeys(row["name"].split(".")[0] for row in rows)) == MEASURED
    assert list(tmp_path.iterdir()) == []


def test_a_row_can_be_asked_for_by_its_name(tmp_path: Path) -> None:
    ended = kvpool("bench", *QUICK, "--only", "slots.free", "--directory", tmp_path, "--json")
    assert [row["name"] for row in ended.objects] == ["slots.free"]


def test_a_trace_comes_from_the_command_line_or_the_environment(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"hash_ids": [1, 2, 3, 4]}\n' * 200)
    asked = ("bench", *QUICK, "--only", "replay.hit-ratio", "--directory", tmp_path, "--json")
    by_option = kvpool(*asked, "--trace", trace)
    by_environment = kvpool(*asked, env={"KVPOOL_TRACE": str(trace)})
    assert by_option.out == by_environment.out != ""
    assert [row["value"] for row in by_option.objects] == [50.0] * 5


def test_people_get_a_head_and_a_table(tmp_path: Path) -> None:
    ended = kvpool("bench", *QUICK, "--only", "slots", "--directory", tmp_path)
    assert ended.code == 0
    for word in ("machine:", "disk:", "date:", "versions: kvpool", "slots.allocate", "<= 200"):
        assert word in ended.out


def test_markdown_is_a_table_with_the_same_rows(tmp_path: Path) -> None:
    ended = kvpool("bench", *QUICK, "--only", "slots", "--directory", tmp_path, "--markdown")
    assert ended.code == 0
    assert "| name | value | unit | probe | ratio | target | met |" in ended.out.splitlines()
    assert sum(line.startswith("| slots.") for line in ended.out.splitlines()) == 4


def test_the_list_names_every_benchmark() -> None:
    ended = kvpool("bench", "--list")
    assert [line.split()[0] for line in ended.out.splitlines()[2:]] == NAMES


@pytest.mark.parametrize(
    "wrong", [("kitchen",), ("--only", "kitchen"), ("--trace", "/absent"), ("--directory", "/proc/none")]
)
def test_what_cannot_be_asked_for_is_one_line(wrong: tuple[str, ...]) -> None:
    ended = kvpool("bench", *wrong)
    assert ended.code == ExitCode.USAGE
    assert ended.complaint


def test_terminating_it_leaves_no_files(tmp_path: Path) -> None:
    asked = ("--only", "slots", "--only", "full", "--quick", "--seconds", "600", "--directory", tmp_path, "--json")
    running = started("bench", *asked)
    assert running.stdout is not None
    for _ in range(4):
        running.stdout.readline()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == ExitCode.TERMINATED
    assert list(tmp_path.iterdir()) == []

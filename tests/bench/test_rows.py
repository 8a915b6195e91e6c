"""Rows and targets of the bench, and how rounds become a figure."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.bench.area import Benchmark, Conditions, UnmeasurableError, benchmarks_of, rows_of, selected
from kvpool.bench.rounds import beside, of_pairs, percentile
from kvpool.bench.row import Figure, Row, at_least, at_most, ratio_at_least, ratio_at_most
from kvpool.errors import ConfigError

KEYS = ["name", "value", "unit", "probe", "ratio", "target", "met"]


def test_a_row_as_json_has_the_documented_keys_in_order() -> None:
    row = Row("ram.store.2MiB", "GiB/s", Figure(14.04321, 16.3, 0.861551), ratio_at_least(0.9))
    assert row.as_json() == {
        "name": "ram.store.2MiB", "value": 14.04, "unit": "GiB/s", "probe": 16.3, "ratio": 0.8616,
        "target": "ratio >= 0.9", "met": False,
    }  # fmt: skip
    assert list(row.as_json()) == KEYS


def test_a_row_that_could_not_be_measured_has_the_same_keys() -> None:
    row = Row("model", "", None, at_most(3), "torch is not installed")
    assert list(row.as_json()) == KEYS
    assert row.as_json()["value"] is None
    assert row.met is None


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (None, None), (at_most(2), True), (at_most(1.9), False), (at_least(2), True), (at_least(2.1), False),
        (ratio_at_most(0.5), True), (ratio_at_most(0.4), False), (ratio_at_least(0.5), True),
        (ratio_at_least(1), False),
    ],
)  # fmt: skip
def test_a_target_is_met_by_the_value_or_by_the_ratio(target: object, met: bool | None) -> None:
    assert Row("a", "s", Figure(2, 4, 0.5), target).met is met  # type: ignore[arg-type]


def test_a_target_on_a_ratio_is_open_where_nothing_was_probed() -> None:
    assert Row("a", "s", Figure(2), ratio_at_least(0.5)).met is None


def test_a_figure_has_medians_and_the_median_of_the_rounds_ratios() -> None:
    assert of_pairs([(1, 2), (10, 10), (3, 2)]) == Figure(3, 2, 1)


def test_subject_and_probe_take_turns_at_going_first() -> None:
    order: list[str] = []

    def measure(name: str, value: float) -> float:
        order.append(name)
        return value

    figure = beside(lambda: measure("subject", 1), lambda: measure("probe", 2), 4)
    assert order == ["subject", "probe", "probe", "subject"] * 2
    assert figure == Figure(1, 2, 0.5)


def test_a_percentile_is_one_of_the_figures() -> None:
    figures = [float(at) for at in range(100)]
    assert [percentile(figures, percent) for percent in (0, 50, 99, 100)] == [0, 50, 99, 99]


def test_units_scale_value_and_probe_but_not_the_ratio() -> None:
    assert Figure(2, 4, 0.5).in_unit(10) == Figure(20, 40, 0.5)
    assert Figure(2).in_unit(10) == Figure(20)


def test_benchmarks_are_chosen_by_name_or_by_row() -> None:
    known = benchmarks_of("engine")
    assert [benchmark.name for benchmark in selected(known, ["ssd.write.2MiB", "match"])] == ["match", "ssd"]
    assert list(selected(known, [])) == list(known)


def test_an_unknown_area_or_benchmark_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="engine"):
        benchmarks_of("kitchen")
    with pytest.raises(ConfigError, match="match"):
        selected(benchmarks_of("engine"), ["matching"])


def test_what_cannot_be_measured_here_is_a_row_with_the_reason_and_its_files_are_removed(tmp_path: Path) -> None:
    def run(conditions: Conditions) -> Iterator[Row]:
        (conditions.directory / "file").touch()
        yield Row("a.first", "s", Figure(1))
        raise UnmeasurableError("no disk")

    rows = list(rows_of(Benchmark("a", "", run), tmp_path, conditions_in))
    assert [(row.name, row.reason) for row in rows] == [("a.first", ""), ("a", "no disk")]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_a_reason_and_other_faults_of_it_are_not(tmp_path: Path) -> None:
    def fail(number: int) -> Iterator[Row]:
        raise OSError(number, os.strerror(number))

    full = Benchmark("a", "", lambda _: fail(errno.ENOSPC))
    assert [row.reason for row in rows_of(full, tmp_path, conditions_in)] == [f"no space is left in {tmp_path}"]
    with pytest.raises(OSError, match="Input/output"):
        list(rows_of(Benchmark("a", "", lambda _: fail(errno.EIO)), tmp_path, conditions_in))


def conditions_in(directory: Path) -> Conditions:
    return Conditions(directory=directory)

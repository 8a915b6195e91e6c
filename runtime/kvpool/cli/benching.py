"""`kvpool bench`: runs benchmarks and prints their rows as they come."""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvpool.bench.area import Benchmark, Conditions, benchmarks_of, rows_of, selected
from kvpool.bench.machine import described
from kvpool.bench.row import Row
from kvpool.cli.output import console, figure, print_json, table
from kvpool.config import default_directory
from kvpool.errors import ConfigError

_WIDTHS = {"name": 46, "value": 9, "unit": 11, "probe": 9, "ratio": 7, "target": 13, "met": 3}
_NUMBERS = ("value", "probe", "ratio")
_MET = {True: "yes", False: "no", None: ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be measured, and how."""

    area: str
    only: tuple[str, ...]
    seconds: float
    trace: Path | None
    directory: Path | None
    scale: float


def bench(asked: Asked, *, json: bool, markdown: bool) -> None:
    """Measure, and print. Raises `ConfigError`."""
    benchmarks = selected(benchmarks_of(asked.area), asked.only)
    if asked.trace is not None and not asked.trace.is_file():
        raise ConfigError(f"{asked.trace}: there is no such trace; see --trace and KVPOOL_TRACE")
    with _scratch(asked.directory) as directory:
        if json:
            _print_json(asked, benchmarks, directory)
        elif markdown:
            _print_markdown(asked, benchmarks, directory)
        else:
            _print_tables(asked, benchmarks, directory)


def list_names(area: str) -> None:
    """Print what can be measured. Raises `ConfigError` for an unknown area."""
    rows = [(benchmark.name, benchmark.about) for benchmark in benchmarks_of(area)]
    console().print(table(("benchmark", "what it measures"), rows))


def _measured(asked: Asked, benchmark: Benchmark, parent: Path) -> Iterator[Row]:
    """The rows of one benchmark that were asked for."""
    if sys.stderr.isatty():
        print(f"measuring {benchmark.name}: {benchmark.about}", file=sys.stderr)

    def conditions(directory: Path) -> Conditions:
        seconds = asked.seconds * min(asked.scale * 10, 1)
        return Conditions(directory=directory, seconds=seconds, trace=asked.trace, scale=asked.scale)

    for row in rows_of(benchmark, parent, conditions):
        if not asked.only or any(f"{row.name}.".startswith(f"{name}.") for name in asked.only) or row.reason:
            yield row


def _print_json(asked: Asked, benchmarks: Sequence[Benchmark], directory: Path) -> None:
    for benchmark in benchmarks:
        for row in _measured(asked, benchmark, directory):
            print_json(row.as_json())
            if row.reason:
                print(f"kvpool: {row.name} was not measured: {row.reason}", file=sys.stderr)


def _print_tables(asked: Asked, benchmarks: Sequence[Benchmark], directory: Path) -> None:
    """A head, then a table for each benchmark when it is done."""
    out = console()
    for name, text in described(directory.parent).items():
        out.print(f"{name + ':':10}{text}")
    for benchmark in benchmarks:
        rows = list(_measured(asked, benchmark, directory))
        made = table(tuple(_WIDTHS), [_cells(row) for row in rows if not row.reason], right=_NUMBERS)
        for column, width in zip(made.columns, _WIDTHS.values(), strict=True):
            column.min_width = width
        out.print(f"\n[bold]{benchmark.name}[/]: {benchmark.about}", made, sep="\n")
        for row in rows:
            if row.reason:
                out.print(f"{row.name} was not measured: {row.reason}", markup=False)


def _print_markdown(asked: Asked, benchmarks: Sequence[Benchmark], directory: Path) -> None:
    for name, text in described(directory.parent).items():
        print(f"- {name}: {text}")
    for benchmark in benchmarks:
        print(f"\n### {benchmark.name}: {benchmark.about}\n")
        print("| " + " | ".join(_WIDTHS) + " |")
        print("|" + "|".join("---:" if name in _NUMBERS else "---" for name in _WIDTHS) + "|")
        for row in _measured(asked, benchmark, directory):
            print("| " + " | ".join(_cells(row)) + " |", flush=True)


def _cells(row: Row) -> tuple[str, ...]:
    value, probe, ratio = row.figure or (None, None, None)
    target = "" if row.target is None else str(row.target)
    numbers = figure(value), row.unit, figure(probe), figure(ratio)
    return row.name, *numbers, target, _MET[row.met]


@contextmanager
def _scratch(directory: Path | None) -> Iterator[Path]:
    """A directory of this process for temporary files, removed afterwards however the command ends.

    It is made where we are told, or beside the pools of this user, for that disk is to be measured.
    """
    parent = directory or default_directory("bench")
    scratch = parent / f"kvpool-bench-{os.getpid()}"
    try:
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"{parent} cannot be used ({error.strerror}): name another with --directory") from None
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if directory is None:
            with suppress(OSError):  # it holds something else, or was never made
                parent.rmdir()

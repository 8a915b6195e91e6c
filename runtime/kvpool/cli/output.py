"""Printing for people and for scripts: tables, sizes, JSON lines."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_PIPE_COLUMNS = 1_000
"""So that nothing is wrapped or cut off where there is no terminal."""
_BINARY = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def console() -> Console:
    """Standard output: as wide as the terminal, or as wide as a line needs."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> Table:
    """A table without frames; the columns in `right` are numbers."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    numbers = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def print_json(value: Mapping[str, object]) -> None:
    """One object on one line, at once."""
    print(json.dumps(value), flush=True)


def size(nbytes: float) -> str:
    """Bytes as people read them: `1.4 MiB`."""
    for unit, scale in _BINARY:
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.4g} {unit}"
    return f"{nbytes:.0f} B"


def figure(value: float | None) -> str:
    """A number to four digits, without an exponent; a dash for none."""
    if value is None:
        return "-"
    digits = float(f"{value:.4g}")
    return f"{digits:,.0f}" if abs(digits) >= 1_000 else f"{digits:g}"


def instant(at_s: float) -> str:
    """Unix seconds as UTC."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

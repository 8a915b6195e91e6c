"""Areas of benchmarks, and how one is run: benchmark by benchmark, in temporary directories that are removed."""

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kvpool.bench.row import Row
from kvpool.errors import ConfigError

AREAS: Mapping[str, str] = {
    "codecs": "kvpool.bench.codecs",
    "engine": "kvpool.bench.engine",
    "gpu": "kvpool.bench.gpu",
    "prefetch": "kvpool.bench.prefetch",
    "quality": "kvpool.bench.quality",
    "shared": "kvpool.bench.shared",
    "sharing": "kvpool.bench.sharing",
    "waterfall": "kvpool.bench.waterfall",
}
"""Name -> the package whose `BENCHMARKS` are the area's; imported when it is run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a run is given. `scale` shrinks every size and count: below 1 the figures mean nothing."""

    directory: Path
    """Empty, and removed after the benchmark."""
    seconds: float = 60.0
    """How long the endurance benchmark stores."""
    trace: Path | None = None
    """A recorded trace; None: a made-up one."""
    scale: float = 1.0
    rounds: int = 7

    def scaled(self, count: int, *, least: int = 1) -> int:
        """`count`, or less of it when the run is a small one."""
        return max(least, int(count * self.scale))

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """A directory of this name, removed afterwards: for benchmarks that have several, one at a time."""
        place = self.directory / name
        try:
            place.mkdir()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


class Benchmark(NamedTuple):
    """Yields rows whose names begin with `name` and a dot."""

    name: str
    about: str
    run: Callable[[Conditions], Iterator[Row]]


class UnmeasurableError(Exception):
    """This machine, or this installation, lacks what a benchmark needs; says what."""


def benchmarks_of(area: str) -> Sequence[Benchmark]:
    """The area's benchmarks. Raises `ConfigError` for an unknown area."""
    if area not in AREAS:
        raise ConfigError(f"there is no bench area {area!r}; choose one of: {', '.join(AREAS)}")
    found: Sequence[Benchmark] = import_module(AREAS[area]).BENCHMARKS
    return found


def selected(benchmarks: Sequence[Benchmark], only: Sequence[str]) -> Sequence[Benchmark]:
    """Those that `only` names, by themselves or by one of their rows; all when it is empty.

    Raises `ConfigError` for a name that is none.
    """
    known = {benchmark.name for benchmark in benchmarks}
    for name in only:
        if name.split(".")[0] not in known:
            raise ConfigError(f"there is no benchmark {name!r}; choose from: {', '.join(sorted(known))}")
    wanted = {name.split(".")[0] for name in only} or known
    return [benchmark for benchmark in benchmarks if benchmark.name in wanted]


def rows_of(benchmark: Benchmark, parent: Path, conditions: Callable[[Path], Conditions]) -> Iterator[Row]:
    """The rows, as they come. What cannot be measured here ends it with a row that has the reason."""
    with tempfile.TemporaryDirectory(prefix=f"{benchmark.name}-", dir=parent) as directory:
        try:
            yield from benchmark.run(conditions(Path(directory)))
        except UnmeasurableError as reason:
            yield Row(benchmark.name, "", None, reason=str(reason))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            yield Row(benchmark.name, "", None, reason=f"no space is left in {parent}")

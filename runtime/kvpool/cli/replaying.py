"""`kvpool replay`: hit ratios of recorded requests."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvpool.cli.output import console, figure, print_json, table
from kvpool.errors import ConfigError
from kvpool.policy import POLICIES
from kvpool.replay.index_replay import play
from kvpool.replay.outcome import Outcome
from kvpool.replay.reference import exact_lru_hits, offline_bound_hits, timed
from kvpool.replay.trace import Trace, read_traces

ALL = "all"
_CAPACITY = re.compile(r"([1-9][0-9]*)([kM]?)")
_SCALE = {"": 1, "k": 1_000, "M": 1_000_000}


class Played(NamedTuple):
    """One line of the result."""

    capacity_blocks: int
    policy: str
    outcome: Outcome

    def as_json(self) -> dict[str, object]:
        """The object that `--json` prints."""
        outcome = self.outcome
        return {
            "capacity_blocks": self.capacity_blocks,
            "policy": self.policy,
            "requests": outcome.requests,
            "blocks": outcome.blocks,
            "hits": outcome.hits,
            "hit_ratio_percent": round(outcome.hit_percent, 3),
            "requests_per_second": round(outcome.requests_per_second),
        }


def replay(traces: Sequence[Path], *, capacities: str, policy: str, whole_blocks: bool, as_json: bool) -> None:
    """Play the traces at each capacity, and print what comes of it. Raises `ConfigError` and `InputError`."""
    sizes = capacities_of(capacities)
    if policy not in (ALL, *POLICIES):
        raise ConfigError(f"--policy {policy}: there is no such policy; choose from: {', '.join((ALL, *POLICIES))}")
    trace = read_traces(traces, whole_blocks=whole_blocks)
    results = _results(trace, sizes, policy)
    if as_json:
        for played in results:
            print_json(played.as_json())
    else:
        _print_table(trace, results)


def capacities_of(text: str) -> list[int]:
    """`2k,5000,1M` as numbers of blocks, or `ConfigError`."""
    sizes = []
    for part in text.split(","):
        parsed = _CAPACITY.fullmatch(part.strip())
        if parsed is None:
            raise ConfigError(f"--capacity-blocks: {part.strip()!r} is no number of blocks; write 500, 2k or 1M")
        sizes.append(int(parsed[1]) * _SCALE[parsed[2]])
    return sizes


def _results(trace: Trace, sizes: Sequence[int], policy: str) -> Iterator[Played]:
    for capacity in sizes:
        for name in POLICIES if policy == ALL else (policy,):
            yield Played(capacity, name, play(trace, capacity, POLICIES[name]))
        yield Played(capacity, "exact-lru", timed(exact_lru_hits, trace, capacity))
        yield Played(capacity, "offline-bound", timed(offline_bound_hits, trace, capacity))


def _print_table(trace: Trace, results: Iterator[Played]) -> None:
    out = console()
    distinct = len({block for blocks in trace for block in blocks})
    out.print(f"{len(trace):,} requests for {sum(map(len, trace)):,} blocks, {distinct:,} of them distinct\n")
    columns = ("capacity (blocks)", "policy", "hits", "hit ratio %", "requests/s")
    rows = (
        (
            f"{played.capacity_blocks:,}",
            played.policy,
            f"{played.outcome.hits:,}",
            f"{played.outcome.hit_percent:.2f}",
            figure(played.outcome.requests_per_second),
        )
        for played in results
    )
    out.print(table(columns, rows, right=("capacity (blocks)", "hits", "hit ratio %", "requests/s")))

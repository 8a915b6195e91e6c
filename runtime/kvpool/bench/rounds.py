"""Measures in rounds, subject and probe by turns: what disturbs one on a shared machine is to disturb the other too."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

from kvpool.bench.row import Figure

Measure = Callable[[], float]
"""Does some work and returns a figure of it: seconds per call, bytes per second."""


def alone(subject: Measure, rounds: int) -> Figure:
    """The median of so many rounds."""
    return Figure(median(subject() for _ in range(rounds)))


def beside(subject: Measure, probe: Measure, rounds: int) -> Figure:
    """Medians of so many rounds of both, which take turns at going first."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            beneath = probe()
            pairs.append((subject(), beneath))
        else:
            pairs.append((subject(), probe()))
    return of_pairs(pairs)


def of_pairs(pairs: Sequence[tuple[float, float]]) -> Figure:
    """The figure of rounds that were measured elsewhere: (subject, probe) each."""
    values, probes = zip(*pairs, strict=True)
    return Figure(median(values), median(probes), median(value / probe for value, probe in pairs))


def seconds_per_call(work: Callable[[], object], calls: int) -> Measure:
    """Measures `work`, called so many times in a loop; the loop itself takes 20 ns a turn."""

    def measure() -> float:
        began_s = perf_counter()
        for _ in range(calls):
            work()
        return (perf_counter() - began_s) / calls

    return measure


def bytes_per_second(work: Callable[[], object], nbytes: int) -> Measure:
    """Measures `work`, which moves so many bytes."""

    def measure() -> float:
        began_s = perf_counter()
        work()
        return nbytes / (perf_counter() - began_s)

    return measure


def percentile(figures: Sequence[float], percent: float) -> float:
    """The smallest figure that so many percent of them do not exceed."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

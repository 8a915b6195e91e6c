"""One line of a benchmark's result, and what it is to reach."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Self


class Of(StrEnum):
    """What a target is about."""

    VALUE = "value"
    RATIO = "ratio"
    """The value as a share or a multiple of the probe."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a row's value or ratio; made by `at_most` and its siblings."""

    of: Of
    sense: Literal["<=", ">="]
    limit: float

    def __str__(self) -> str:
        return f"{'ratio ' if self.of is Of.RATIO else ''}{self.sense} {self.limit:g}"

    def is_met_by(self, figure: float) -> bool:
        """Whether this figure is within the bound."""
        return figure <= self.limit if self.sense == "<=" else figure >= self.limit


def at_most(limit: float) -> Target:
    """The value is to be no more than this, in the row's unit."""
    return Target(Of.VALUE, "<=", limit)


def at_least(limit: float) -> Target:
    """The value is to be no less than this, in the row's unit."""
    return Target(Of.VALUE, ">=", limit)


def ratio_at_most(limit: float) -> Target:
    """The value is to be no more than so many times the probe."""
    return Target(Of.RATIO, "<=", limit)


def ratio_at_least(limit: float) -> Target:
    """The value is to be no less than this share of the probe."""
    return Target(Of.RATIO, ">=", limit)


class Figure(NamedTuple):
    """What was measured; `probe` and `ratio` where there was something to measure beside it, in the same unit.

    The ratio is the median of the rounds' ratios, not that of the medians: what disturbs a round disturbs both sides.
    """

    value: float
    probe: float | None = None
    ratio: float | None = None

    def in_unit(self, scale: float) -> Self:
        """The same figure in another unit: `scale` of the new one make one of the old."""
        return self._replace(value=self.value * scale, probe=None if self.probe is None else self.probe * scale)


class Row(NamedTuple):
    """A named figure. `figure` is None where it could not be measured here, and `reason` says why."""

    name: str
    unit: str
    figure: Figure | None
    target: Target | None = None
    reason: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is no target, or no figure."""
        if self.target is None or self.figure is None:
            return None
        figure = self.figure.value if self.target.of is Of.VALUE else self.figure.ratio
        return None if figure is None else self.target.is_met_by(figure)

    def as_json(self) -> dict[str, str | float | bool | None]:
        """The object that `kvpool bench --json` prints."""
        value, probe, ratio = self.figure or (None, None, None)
        return {
            "name": self.name,
            "value": _rounded(value),
            "unit": self.unit,
            "probe": _rounded(probe),
            "ratio": _rounded(ratio),
            "target": None if self.target is None else str(self.target),
            "met": self.met,
        }


def _rounded(figure: float | None) -> float | None:
    """To four significant digits: more would be noise."""
    return None if figure is None else float(f"{figure:.4g}")

"""Durations as Go and Kubernetes write them (`2h`, `50ms`, `1h30m`), read and printed exactly.

The grammar and the canonical form are those of Go's time.ParseDuration and Duration.String, which metav1.Duration uses.
One thing differs: a fraction of a nanosecond is refused, not cut off.
"""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_NUMBER_AND_UNIT = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"([+-]?)(?:0|((?:{_NUMBER_AND_UNIT})+))")
_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")
_MOST = (1 << 63) - 1
_MAX_CHARACTERS = 64
_WHAT_IT_IS = "a duration with units, such as 50ms, 30s, 2h or 1h30m"


@dataclass(frozen=True, slots=True, order=True)
class Duration:
    """A whole number of nanoseconds."""

    nanoseconds: int

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read a duration. Raises `ValueError` that says what one looks like."""
        match = _DURATION.fullmatch(text) if len(text) <= _MAX_CHARACTERS else None
        if match is None:
            raise ValueError(f"must be {_WHAT_IT_IS}")
        total = 0
        for whole, fraction, unit in _PART.findall(match[2] or ""):
            part, rest = divmod(int(whole + fraction) * _UNITS[unit], 10 ** len(fraction))
            if rest:
                raise ValueError("must be no finer than 1ns")
            total += part
        if total > _MOST:
            raise ValueError("must be at most 2^63-1 ns, some 292 years")
        return cls(-total if match[1] == "-" else total)

    @classmethod
    def of_seconds(cls, seconds: float) -> "Duration":
        """The nearest whole number of nanoseconds."""
        return cls(round(seconds * 10**9))

    @property
    def seconds(self) -> float:
        """As a number of seconds, for the program's own use."""
        return self.nanoseconds / 10**9

    @property
    def short(self) -> str:
        """As people write it: the canonical form without units that are zero at its end."""
        text = str(self)
        if text.endswith("m0s"):
            text = text.removesuffix("0s")
        return text.removesuffix("0m") if text.endswith("h0m") else text

    def __str__(self) -> str:
        """The canonical form, `2h0m0s`."""
        sign, rest = ("-" if self.nanoseconds < 0 else ""), abs(self.nanoseconds)
        if rest == 0:
            return "0s"
        for unit in ("ns", "µs", "ms"):
            if rest < 1000 * _UNITS[unit]:
                return f"{sign}{_decimal(rest, _UNITS[unit])}{unit}"
        minutes, rest = divmod(rest, _UNITS["m"])
        hours, minutes = divmod(minutes, 60)
        text = f"{_decimal(rest, _UNITS['s'])}s"
        if hours:
            text = f"{hours}h{minutes}m{text}"
        elif minutes:
            text = f"{minutes}m{text}"
        return sign + text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _validated,
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema()),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^[+-]?(0|({_NUMBER_AND_UNIT.replace('(?:', '(')})+)$"}


def _decimal(number: int, unit: int) -> str:
    """`number / unit`, exactly, without trailing zeros; `unit` is a power of ten."""
    whole, fraction = divmod(number, unit)
    digits = str(fraction).rjust(len(str(unit)) - 1, "0").rstrip("0") if fraction else ""
    return f"{whole}.{digits}" if digits else str(whole)


def _validated(value: object) -> Duration:
    if isinstance(value, Duration):
        return value
    if isinstance(value, str):
        return Duration.parse(value)
    raise ValueError(f"must be {_WHAT_IT_IS}")

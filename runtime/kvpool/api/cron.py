"""Cron schedules as Kubernetes' CronJob takes them (robfig/cron's standard parser): checked here, run there.

Five fields (minute, hour, day of month, month, day of week) of lists, ranges, steps and English names, or one of
`@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly`, `@yearly`, `@annually`, `@every 6h`. No time zone prefix, for
Kubernetes refuses it.
"""

import re
from typing import NamedTuple

from kvpool.api.duration import Duration

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_NICKNAMES = {"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}
_EVERY = "@every "
_PART = re.compile(r"(\*|\?|[0-9a-z]+)(?:-([0-9a-z]+))?(?:/([0-9]{1,9}))?", re.IGNORECASE | re.ASCII)


class _Field(NamedTuple):
    """One of the five: its name, its range, and what its names stand for."""

    name: str
    least: int
    most: int
    names: dict[str, int]


_FIELDS = (
    _Field("minute", 0, 59, {}),
    _Field("hour", 0, 23, {}),
    _Field("day of the month", 1, 31, {}),
    _Field("month", 1, 12, {name: index for index, name in enumerate(_MONTHS, 1)}),
    _Field("day of the week", 0, 6, {name: index for index, name in enumerate(_DAYS)}),
)


def checked_schedule(text: str) -> str:
    """Return `text`, or raise `ValueError` that says which of its fields is wrong and why."""
    if text.startswith("@"):
        _check_nickname(text)
        return text
    parts = text.split()
    if len(parts) != len(_FIELDS):
        raise ValueError(f'must have five fields, such as "0 3 * * *" (every day at 03:00); it has {len(parts)}')
    _, _, days, months, weekdays = (_values(field, part) for field, part in zip(_FIELDS, parts, strict=True))
    # Where either day field is a star, a day must match both; otherwise one of them is enough.
    if _is_star(parts[4]) and not any(day <= _LONGEST[month - 1] for month in months for day in days):
        raise ValueError("never happens: no such month has that day")
    assert weekdays
    return text


def _check_nickname(text: str) -> None:
    if text.startswith(_EVERY):
        if Duration.parse(text.removeprefix(_EVERY)).nanoseconds < Duration.parse("1s").nanoseconds:
            raise ValueError("must wait at least 1s between two times")
    elif text not in _NICKNAMES:
        raise ValueError(f"must be one of {', '.join(sorted(_NICKNAMES))}, @every 6h, or five fields")


def _values(field: _Field, text: str) -> set[int]:
    values: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"has the {field.name} {part!r}; it must be *, 5, 1-5, */15 or a list of such")
        first, last = _range(field, match[1], match[2], stepped=match[3] is not None)
        step = int(match[3] or 1)
        if step == 0:
            raise ValueError(f"has the {field.name} {part!r}; a step must be at least 1")
        values.update(range(first, last + 1, step))
    return values


def _range(field: _Field, start: str, end: str | None, *, stepped: bool) -> tuple[int, int]:
    if start in "*?":
        if end is not None:
            raise ValueError(f"has the {field.name} {start}-{end}; a range needs two numbers")
        return field.least, field.most
    first = _number(field, start)
    last = _number(field, end) if end is not None else field.most if stepped else first
    if first > last:
        raise ValueError(f"has the {field.name} {start}-{end}; a range must not run backwards")
    return first, last


def _number(field: _Field, text: str) -> int:
    number = field.names.get(text.lower())
    if number is None and text.isdecimal():
        number = int(text)
    if number is None or not field.least <= number <= field.most:
        raise ValueError(f"has the {field.name} {text!r}; it must be {field.least} to {field.most}")
    return number


def _is_star(text: str) -> bool:
    return text.startswith(("*", "?"))

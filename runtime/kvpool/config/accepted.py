"""What a field accepts, in words, for the reference: its type and its bounds."""

import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvpool.api.duration import Duration
from kvpool.api.model import Bytes, Span
from kvpool.api.quantity import Quantity
from kvpool.config.fields import printed

_BOUNDS = ((Gt, "gt", "more than"), (Ge, "ge", "at least"), (Lt, "lt", "less than"), (Le, "le", "at most"))
_TYPES = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}


def accepted(field: FieldInfo) -> str:
    """Such as `size, at least 64Mi` or `whole number, at least 1, at most 64`."""
    return _words(field.annotation, field.metadata)


def is_list(annotation: Any) -> bool:
    """Whether a field holds a list."""
    return get_origin(annotation) is tuple


def _words(annotation: Any, marks: Sequence[object]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*marks, *_flat(arguments[1:])])
    if origin in (Union, types.UnionType):
        return _words(next(argument for argument in arguments if argument is not type(None)), marks)
    if origin is tuple:
        return f"list of {_words(arguments[0], [])}{_at_most(marks, 'entries')}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"map of {_words(arguments[1], [])}{_at_most(marks, 'entries')}"
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    return _plain(annotation, marks)


def _plain(annotation: type, marks: Sequence[object]) -> str:
    if issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if issubclass(annotation, BaseModel):
        return "section"
    if annotation is Quantity:
        return _quantity(next((mark for mark in marks if isinstance(mark, Bytes)), None))
    if annotation is Duration:
        return _duration(next((mark for mark in marks if isinstance(mark, Span)), None))
    return f"{_TYPES[annotation]}{_bounds(marks)}{_at_most(marks, 'characters')}"


def _bounds(marks: Sequence[object]) -> str:
    found = {kind: getattr(mark, name) for kind, name, _ in _BOUNDS for mark in marks if type(mark) is kind}
    if found.keys() == {Ge, Le}:
        return f", {printed(found[Ge])} to {printed(found[Le])}"
    return "".join(f", {words} {printed(found[kind])}" for kind, _, words in _BOUNDS if kind in found)


def _quantity(mark: Bytes | None) -> str:
    if mark is None:
        return "amount"
    return (
        "size"
        + (f", at least {mark.least}" if mark.least != "0" else "")
        + (f", at most {mark.most}" if mark.most else "")
    )


def _duration(mark: Span | None) -> str:
    return f"duration, {mark.least} to {mark.most}" if mark else "duration"


def _at_most(marks: Sequence[object], things: str) -> str:
    return "".join(f", at most {mark.max_length} {things}" for mark in marks if isinstance(mark, MaxLen))


def _flat(marks: Sequence[object]) -> Iterator[object]:
    """The marks, those inside a `Field(...)` included."""
    for mark in marks:
        if isinstance(mark, FieldInfo):
            yield from mark.metadata
        else:
            yield mark

"""What is wrong with a specification, in a user's words: one line per field, with what would be right."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kvpool.api.model import IN_WORDS, RULE, Model, Path
from kvpool.config.fields import aliases, model_at, printed_path
from kvpool.errors import ConfigError

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text; put it in quotes if it looks like a number",
    "tuple_type": "a list",
    "mapping_type": "a mapping",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "path_type": "a path",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_LENGTHS = {
    "string_too_long": "has {actual_length} characters; at most {max_length} are allowed",
    "string_too_short": "has {actual_length} characters; it must have at least {min_length}",
    "too_long": "has {actual_length} entries; at most {max_length} are allowed",
}
_MAX_SHOWN = 60


class Complaint(NamedTuple):
    """One field, and what is wrong with it."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{printed_path(self.path)} {self.text}" if self.path else f"the file {self.text}"


class InvalidFieldsError(ConfigError):
    """Fields that cannot be used; `complaints` has them one by one."""

    def __init__(self, found: Sequence[Complaint]) -> None:
        super().__init__("\n".join(map(str, found)))
        self.complaints = tuple(found)


def complaints(
    error: ValidationError, root: type[BaseModel], *, below: Path = (), sources: Mapping[str, str] | None = None
) -> list[Complaint]:
    """Put each error of a validation into words.

    `root` is the model that paths start from; `below` comes before the paths of `error`. `sources` says where values
    come from that stand in no file.
    """
    found = []
    for details in error.errors(include_url=False):
        path = (*below, *(part for part in details["loc"] if part != "[key]"))
        found.append(Complaint(path, _words(details, path, root, sources or {})))
    return found


def _words(details: ErrorDetails, path: Path, root: type[BaseModel], sources: Mapping[str, str]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == RULE:
        return str(context["reason"]) + _origins(context, path, sources)
    if kind == "missing":
        return f"is missing{_meaning(path, root)}"
    if kind == "extra_forbidden":
        return _unknown(path, root)
    if kind in _LENGTHS:
        return _LENGTHS[kind].format(**context)
    return f"is {_shown(details['input'])}; it {_wanted(kind, context, details['msg'])}"


def _wanted(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]}"
    if kind in ("enum", "literal_error"):
        return f"must be {context['expected'].replace(chr(39), '')}"
    if kind == "string_pattern_mismatch":
        return f"must be {IN_WORDS.get(context['pattern'], 'like ' + context['pattern'])}"
    if kind == "value_error":
        return str(context["error"])
    return f"is not accepted: {message}"


def _origins(context: Mapping[str, Any], path: Path, sources: Mapping[str, str]) -> str:
    """Where the compared values come from that the user did not write."""
    base = path[: len(path) - context["depth"]]
    paths = [printed_path((*base, *other)) for other in context["compared"]]
    return "".join(f" ({path} comes from {_source(sources[path])})" for path in paths if path in sources)


def _source(source: str) -> str:
    return "the built-in default" if source == "default" else f"the {source}"


def _meaning(path: Path, root: type[BaseModel]) -> str:
    model = model_at(root, path[:-1])
    name = aliases(model).get(str(path[-1])) if model is not None else None
    field = model.model_fields[name] if model is not None and name is not None else None
    return f": {field.description}" if field is not None and field.description else ""


def _unknown(path: Path, root: type[BaseModel]) -> str:
    model, name = model_at(root, path[:-1]), str(path[-1])
    if model is None:
        return "is not known here; remove it"
    if issubclass(model, Model) and name in model.NOT_FIELDS:
        return f"cannot be set: {model.NOT_FIELDS[name]}"
    known = list(aliases(model))
    near = difflib.get_close_matches(name.lower(), [alias.lower() for alias in known], n=1)
    if near:
        return f"is not known; did you mean {next(alias for alias in known if alias.lower() == near[0])}?"
    return f"is not known; {printed_path(path[:-1]) or 'a pool'} has {', '.join(known)}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "empty"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."

"""Walking models by the names of the YAML: which model stands at a path, and how a path and a value are printed."""

import re
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from kvpool.api.duration import Duration
from kvpool.api.model import Path

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def printed_path(path: Path) -> str:
    """`spec.models[1].quotas`; a part that is no plain name stands in quotes: `spec.runtime.nodeSelector["a/b"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def printed(value: object) -> str:
    """A value as the YAML of a pool has it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Duration):
        return value.short
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={printed(item)}" for key, item in value.items())
    if isinstance(value, tuple):
        return ", ".join(printed(item) for item in value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return '""' if value == "" else str(value)


def aliases(model: type[BaseModel]) -> dict[str, str]:
    """The fields of a model: name in the YAML -> name in Python."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's values are, or hold: behind `| None`, in a tuple, in a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, Mapping) or _is_mapping(annotation):
        return next((model for argument in get_args(annotation) if (model := model_in(argument))), None)
    return None


def model_at(root: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model whose field, or whose missing field, the last part of `path` names."""
    model: type[BaseModel] | None = root
    for part in path:
        if model is None or isinstance(part, int):
            continue
        name = aliases(model).get(part)
        if name is not None:
            model = model_in(model.model_fields[name].annotation)
    return model


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)

"""Writes docs/configuration.md, the reference of every field, from the models themselves.

    python -m kvpool.config.reference > docs/configuration.md

A test compares that file with what this prints, so that it cannot fall behind.
"""

import sys
from collections.abc import Iterator
from typing import TypeAlias

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvpool.api.pool import KVCachePool
from kvpool.api.workload import PodSettings
from kvpool.config.accepted import accepted, is_list
from kvpool.config.fields import aliases, model_in, printed
from kvpool.config.profiles import DEFAULTS, PROFILES, Blocks, Value, WithinCapacity
from kvpool.config.runtime import ModelConfig, QuotaConfig, RuntimeConfig, origin_of

_INTRODUCTION = """# Configuration

<!-- Written by `python -m kvpool.config.reference > docs/configuration.md`: change the models, not this file. -->

A pool is one `KVCachePool` object. `kubectl apply -f pool.yaml` and `kvpool run pool.yaml` take the same file:
[examples/laptop.yaml](../examples/laptop.yaml) is a small one, [examples/cluster.yaml](../examples/cluster.yaml) has
everything.

A field's value is what stands in the file; else what the last of `spec.profiles` that knows the field says; else the
built-in default. `kvpool status --config FILE` prints every value in effect, and which of the three it comes from.

Sizes are Kubernetes quantities: `512Mi`, `16Gi`, `1.5G`, `1048576`. Durations are Go's: `50ms`, `30s`, `2h`, `1h30m`.
Capacities and quotas of gpu, ram and ssd are per pod; those of dragonfly and database are per pool. The column *live*
says whether a running pool takes a new value (`yes`) or needs a restart (`no`); it is empty where only the operator
reads the field.
"""
_PODS = "pods"
"""Stands for the path of any section that has the settings of pods."""
_Places: TypeAlias = dict[type[BaseModel], list[str]]


def reference() -> str:
    """The whole page, in Markdown."""
    places: _Places = {}
    _find(KVCachePool, "", places)
    _find(PodSettings, _PODS, places)
    live = dict(_live())
    return "\n".join([_INTRODUCTION, _profiles(), *(_section(*place, live) for place in places.items())])


def _profiles() -> str:
    lines = [
        "## Profiles",
        "",
        "What each profile sets; where a cell is empty, it leaves the field alone. A tier that the pool does not have",
        "gets no values.",
        "",
        f"| field | {' | '.join(PROFILES)} | default |",
        f"|---|{'---|' * len(PROFILES)}---|",
    ]
    for path, default in DEFAULTS.items():
        cells = [_value(values[path]) if path in values else "" for values in PROFILES.values()]
        lines.append(f"| `spec.{path}` | {' | '.join(cells)} | {_value(default)} |")
    return "\n".join([*lines, ""])


def _value(value: Value) -> str:
    if isinstance(value, Blocks):
        return "one block" if value.blocks == 1 else f"{value.blocks} blocks"
    if isinstance(value, WithinCapacity):
        return f"{value.size} or capacity"
    return printed(value)


def _find(model: type[BaseModel], path: str, places: _Places) -> None:
    """Note every path at which each model stands, models in the order of the specification."""
    places.setdefault(model, []).append(path)
    for alias, field in _own_fields(model):
        part = model_in(field.annotation)
        if part is not None:
            below = f"{path}.{alias}" if path else alias
            _find(part, f"{below}[]" if is_list(field.annotation) else below, places)


def _own_fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """A model's fields in order, without those that all pods have."""
    shared = PodSettings.model_fields if _has_pods(model) else {}
    for alias, name in aliases(model).items():
        if name not in shared:
            yield alias, model.model_fields[name]


def _has_pods(model: type[BaseModel]) -> bool:
    return issubclass(model, PodSettings) and model is not PodSettings


def _live() -> Iterator[tuple[str, bool]]:
    """Each field of the specification that the runtime reads, and whether it takes a new value while it runs."""
    yield from _live_in(RuntimeConfig, "spec")
    yield from _live_in(ModelConfig, "spec.models[]")
    for tier in ("gpu", "ram", "dragonfly", "database", "ssd"):
        yield from _live_in(QuotaConfig, f"spec.models[].quotas.{tier}")


def _live_in(model: type[BaseModel], above: str) -> Iterator[tuple[str, bool]]:
    for field in model.model_fields.values():
        origin, part = origin_of(field), model_in(field.annotation)
        if origin is not None and part is not None:
            yield from _live_in(part, above)
        if origin is not None and (part is None or field.default is None):
            yield f"{above}.{origin.path}", origin.live


def _section(model: type[BaseModel], paths: list[str], live: dict[str, bool]) -> str:
    lines = [f"## {_title(model, paths)}", "", *(line.strip() for line in (model.__doc__ or "").split("\n")), ""]
    if _has_pods(model):
        lines += ["Beside these, all [settings of pods](#settings-of-pods).", ""]
    lines += ["| field | takes | default | live | what it is |", "|---|---|---|---|---|"]
    for alias, field in _own_fields(model):
        path = f"{paths[0]}.{alias}" if paths[0] else alias
        mark = {True: "yes", False: "no", None: ""}[live.get(path)]
        lines.append(
            f"| `{alias}` | {accepted(field)} | {_default(path, field)} | {mark} | {field.description or ''} |"
        )
    return "\n".join([*lines, ""])


def _title(model: type[BaseModel], paths: list[str]) -> str:
    if model is PodSettings:
        return "Settings of pods"
    return ", ".join(f"`{path}`" for path in paths if path) or "The object"


def _default(path: str, field: FieldInfo) -> str:
    if (default := DEFAULTS.get(path.removeprefix("spec."))) is not None:
        return f"{_value(default)}, unless a profile says otherwise"
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value in (None, (), {}) or isinstance(value, BaseModel) else f"`{printed(value)}`"


if __name__ == "__main__":
    sys.stdout.write(reference())

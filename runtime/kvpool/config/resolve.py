"""From a `KVCachePool` to what it runs with: the spec, then its profiles (later ones first), then built-in defaults."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel, ValidationError

from kvpool.api.duration import Duration
from kvpool.api.model import Model, Path
from kvpool.api.models import PoolModel, Quota, Quotas, SharedTierQuota
from kvpool.api.pool import KVCachePool, PoolSpec
from kvpool.api.quantity import Quantity
from kvpool.config.fields import aliases, model_in, printed, printed_path
from kvpool.config.messages import InvalidFieldsError, complaints
from kvpool.config.profiles import DEFAULTS, PROFILES, Blocks, Value, WithinCapacity
from kvpool.config.runtime import ModelConfig, QuotaConfig, RuntimeConfig, origin_of

POOL, DEFAULT = "pool", "default"
_Tree: TypeAlias = dict[str, Any]


class Setting(NamedTuple):
    """A field in effect: its path, its value as the YAML has it, and where that comes from.

    `source` is `pool` (it stands there), `profile NAME`, or `default`.
    """

    path: str
    value: str
    source: str


class Resolved(NamedTuple):
    """A spec in which every field that has a value is filled in; and where the values come from that it left open."""

    spec: PoolSpec
    filled: Mapping[str, str]


def runtime_config(pool: KVCachePool) -> RuntimeConfig:
    """What the pool runs with. Raises `ConfigError` that names each field which does not fit the others."""
    spec = resolve(pool).spec
    values = _values(RuntimeConfig, spec)
    values["models"] = tuple(map(_model, spec.models))
    return RuntimeConfig(**{**values, "name": pool.metadata.name})


def effective_settings(pool: KVCachePool) -> list[Setting]:
    """Every field of the spec that has a value, in the order of the specification. Raises as `runtime_config` does."""
    resolved = resolve(pool)
    return list(_settings(resolved.spec, ("spec",), resolved.filled, given=True))


def resolve(pool: KVCachePool) -> Resolved:
    """Fill in what the pool's spec leaves open. Raises `ConfigError` where the whole then does not fit together."""
    spec = pool.spec
    layers = [(DEFAULT, DEFAULTS), *((f"profile {profile}", PROFILES[profile]) for profile in spec.profiles)]
    tree = spec.model_dump(by_alias=True, exclude_unset=True)
    filled: dict[str, str] = {}
    chosen = {path: (source, value) for source, values in layers for path, value in values.items()}
    for path, (source, value) in chosen.items():
        if _is_open(spec, path):
            _put(tree, path, _worked_out(value, spec, tree, path))
            filled[f"spec.{path}"] = source
    try:
        return Resolved(PoolSpec.model_validate(tree), filled)
    except ValidationError as error:
        raise InvalidFieldsError(complaints(error, KVCachePool, below=("spec",), sources=filled)) from error


def _is_open(spec: Model, path: str) -> bool:
    """Whether the field has no value, and the section in which it stands is there."""
    *sections, name = path.split(".")
    section: Any = spec
    for part in sections:
        section = getattr(section, aliases(type(section))[part])
        if section is None:
            return False
    return getattr(section, aliases(type(section))[name]) is None


def _put(tree: _Tree, path: str, value: object) -> None:
    *sections, name = path.split(".")
    for part in sections:
        tree = tree.setdefault(part, {})
    tree[name] = value


def _worked_out(value: Value, spec: PoolSpec, tree: _Tree, path: str) -> object:
    if isinstance(value, Blocks):
        return value.blocks * spec.block_tokens
    if isinstance(value, WithinCapacity):
        return min(Quantity.parse(value.size), Quantity.parse(str(_section(tree, path)["capacity"])))
    return value


def _section(tree: _Tree, path: str) -> _Tree:
    for part in path.split(".")[:-1]:
        tree = tree[part]
    return tree


def _settings(model: Model, path: Path, filled: Mapping[str, str], *, given: bool) -> Iterator[Setting]:
    for alias, name in aliases(type(model)).items():
        here = given and name in model.model_fields_set
        yield from _settings_of(getattr(model, name), (*path, alias), filled, given=here)


def _settings_of(value: object, path: Path, filled: Mapping[str, str], *, given: bool) -> Iterator[Setting]:
    if isinstance(value, Model):
        yield from _settings(value, path, filled, given=given)
    elif isinstance(value, tuple) and value and isinstance(value[0], Model):
        for index, item in enumerate(value):
            yield from _settings_of(item, (*path, index), filled, given=given)
    elif value is not None and value != () and value != {}:
        text = printed_path(path)
        yield Setting(text, printed(value), filled.get(text, POOL if given else DEFAULT))


def _values(model: type[BaseModel], spec: Model) -> _Tree:
    """The fields of a runtime model, each taken from where its `Origin` says."""
    values: _Tree = {}
    for name, field in model.model_fields.items():
        origin = origin_of(field)
        if origin is None:
            continue
        value, part = _at(spec, origin.path), model_in(field.annotation)
        values[name] = _values(part, spec) if part is not None and value is not None else _plain(value)
    return values


def _model(model: PoolModel) -> ModelConfig:
    quotas = {tier: getattr(model.quotas, tier) for tier in aliases(Quotas)}
    return ModelConfig(
        name=model.name,
        quotas={tier: _quota(quota) for tier, quota in quotas.items() if quota is not None},
        prefill_tokens_per_second=model.prefill_tokens_per_second,
    )


def _quota(quota: Quota | SharedTierQuota) -> QuotaConfig:
    return QuotaConfig(
        guaranteed_bytes=quota.guaranteed.value if isinstance(quota, Quota) else 0,
        limit_bytes=None if quota.limit is None else quota.limit.value,
    )


def _at(spec: Model, path: str) -> object:
    """The value at a path; None where a section on the way is not there."""
    value: Any = spec
    for part in path.split("."):
        if value is None:
            return None
        value = getattr(value, aliases(type(value))[part])
    return value


def _plain(value: object) -> object:
    if isinstance(value, Quantity):
        return value.value
    return value.seconds if isinstance(value, Duration) else value

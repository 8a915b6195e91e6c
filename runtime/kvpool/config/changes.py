"""What differs between two configurations of one pool, and what of it a running pool can take."""

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from kvpool.api.duration import Duration
from kvpool.api.quantity import Quantity
from kvpool.config.fields import printed
from kvpool.config.runtime import ModelConfig, QuotaConfig, RuntimeConfig, origin_of

_AnyModel = TypeVar("_AnyModel", bound=BaseModel)


class Change(NamedTuple):
    """A field with another value.

    `path` is the field's in the specification, with a model's name in place of its index:
    `spec.models["llama"].quotas.ram.limit`. Values are printed as in a `KVCachePool`; `absent` stands for none,
    `present` for a tier. `live`: a running pool takes the new value without a restart.
    """

    path: str
    old: str
    new: str
    live: bool


def changes(old: RuntimeConfig, new: RuntimeConfig) -> list[Change]:
    """Every field that differs, in the order of `RuntimeConfig`."""
    identity = (
        ("metadata.name", old.name, new.name),
        ("directory", old.directory, new.directory),
        ("secretFile", old.secret_file, new.secret_file),
        ("services", old.services, new.services),
    )
    found = [Change(path, _printed("", a), _printed("", b), live=False) for path, a, b in identity if a != b]
    return [*found, *_differences(old, new, "spec"), *_model_differences(old, new)]


def with_live_changes(old: RuntimeConfig, new: RuntimeConfig) -> RuntimeConfig:
    """`new`, with every field that a running pool cannot take as it is in `old`: what the pool runs with afterwards."""
    merged = _merged(old, new)
    kept = {name: getattr(old, name) for name in ("name", "directory", "secret_file", "services")}
    return merged.model_copy(update={**kept, "models": new.models})


def _merged(old: _AnyModel, new: _AnyModel) -> _AnyModel:
    kept: dict[str, object] = {}
    for name, field in type(old).model_fields.items():
        origin, before, after = origin_of(field), getattr(old, name), getattr(new, name)
        if origin is None or before == after:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            kept[name] = _merged(before, after)
        elif not origin.live:
            kept[name] = before
    return new.model_copy(update=kept)


def _differences(old: BaseModel, new: BaseModel, above: str) -> Iterator[Change]:
    for name, field in type(old).model_fields.items():
        origin, before, after = origin_of(field), getattr(old, name), getattr(new, name)
        if before == after or origin is None:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _differences(before, after, above)
        else:
            yield Change(f"{above}.{origin.path}", _printed(name, before), _printed(name, after), origin.live)


def _model_differences(old: RuntimeConfig, new: RuntimeConfig) -> Iterator[Change]:
    """A model that is not there is one without quotas, and so is a tier that a model's quotas do not name."""
    before = {model.name: model for model in old.models}
    after = {model.name: model for model in new.models}
    for name in [*before, *(name for name in after if name not in before)]:
        was, becomes = before.get(name, ModelConfig(name=name)), after.get(name, ModelConfig(name=name))
        above = f'spec.models["{name}"]'
        for tier in [*was.quotas, *(tier for tier in becomes.quotas if tier not in was.quotas)]:
            quota, other = was.quotas.get(tier, QuotaConfig()), becomes.quotas.get(tier, QuotaConfig())
            yield from _differences(quota, other, f"{above}.quotas.{tier}")
        yield from _differences(was, becomes, above)


def _printed(name: str, value: object) -> str:
    """The value of the runtime's field `name`, whose unit is in its name, in the notation of the specification."""
    if value is None:
        return "absent"
    if isinstance(value, BaseModel):
        return "present"
    if isinstance(value, int) and name.endswith("_bytes"):
        return str(Quantity.of_bytes(value))
    if isinstance(value, float) and name.endswith("_s"):
        return Duration.of_seconds(value).short
    return printed(value)

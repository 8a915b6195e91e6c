"""`kvpool quota`: shows what models may use of each tier, and edits that in the pool's file."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from kvpool.api.pool import KIND
from kvpool.api.quantity import Notation, Quantity
from kvpool.cli.output import console, print_json, table
from kvpool.cli.pool_file import held
from kvpool.cli.yaml_edit import put, remove
from kvpool.config import ModelConfig, QuotaConfig, RuntimeConfig, changes, load_config, parse_config
from kvpool.config.document import parse_document
from kvpool.config.runtime import QuotaTier
from kvpool.errors import ConfigError

_TIERS: tuple[str, ...] = get_args(QuotaTier)
_FORM = re.compile(rf"({'|'.join(_TIERS)})\.(guaranteed|limit)=(\S+)")
_NONE = "none"
_GUARANTEES = ("gpu", "ram", "ssd")


class Assignment(NamedTuple):
    """One field of a model's quotas and its new value: a quantity as YAML has it, or None to take the field out."""

    tier: str
    field: str
    value: str | int | None


class Share(NamedTuple):
    """What a model may use of one tier. `guaranteed_bytes` None: the tier takes a limit only; `limit_bytes` None: none.

    `capacity_bytes` is None where the tier's size is not ours to know.
    """

    model: str
    tier: str
    guaranteed_bytes: int | None
    limit_bytes: int | None
    capacity_bytes: int | None


def show(file: Path, model: str | None, *, as_json: bool) -> None:
    """Print the quotas of all models, or of one. Raises `ConfigError`."""
    config = load_config(file)
    if model is not None:
        _refuse_unknown(file, [known.name for known in config.models], model)
    _print(config, model, as_json=as_json)


def edit(file: Path, model: str, assigned: Sequence[str], *, add: bool, as_json: bool) -> None:
    """Change quotas of a model in the file, and print them. Raises `ConfigError`; the file is as it was then."""
    assignments = [assignment(text) for text in assigned]
    if len({(one.tier, one.field) for one in assignments}) < len(assignments):
        raise ConfigError("a quota is given twice; give each once")
    with held(file) as opened:
        before = opened.text
        after = edited(file, before, model, assignments, add=add)
        config = _checked(file, after)
        if after != before:
            opened.replace(after)
    if not as_json:
        _print_changes(file, before, config, changed=after != before)
    _print(config, model, as_json=as_json)


def assignment(text: str) -> Assignment:
    """`ram.limit=8Gi`, parsed. Raises `ConfigError` that says what it must look like."""
    parsed = _FORM.fullmatch(text)
    if parsed is None:
        raise ConfigError(
            f"{text!r} is no quota; write TIER.guaranteed=SIZE or TIER.limit=SIZE (or none), "
            f"such as ram.guaranteed=2Gi; tiers are {', '.join(_TIERS)}"
        )
    tier, field, value = parsed.groups()
    return Assignment(tier, field, None if value == _NONE else _quantity(text, value))


def edited(file: Path, text: str, model: str, assignments: Sequence[Assignment], *, add: bool) -> str:
    """The text with these quotas in it; nothing else is changed. Whether the whole is right is not checked.

    Raises `ConfigError` where the model is not there (`add`: it is added), or the file is not one to edit.
    """
    content = _editable(file, text)
    names = _names(content)
    if model not in names:
        if not add:
            _refuse_unknown(file, names, model)
        return _with_model(file, text, content, model, assignments)
    quotas = ("spec", "models", names.index(model), "quotas")
    expected = copy.deepcopy(content)
    for tier, field, value in assignments:
        path = (*quotas, tier, field)
        text = remove(text, path) if value is None else put(text, path, value)
        _assign(expected["spec"]["models"][names.index(model)], tier, field, value)
    return _as_meant(file, text, expected)


def shares(config: RuntimeConfig) -> Iterator[Share]:
    """What each model may use of each tier that the pool has."""
    for model in config.models:
        for tier in _TIERS:
            if getattr(config, tier) is not None:
                yield _share(config, model, tier)


def _quantity(text: str, value: str) -> str | int:
    try:
        quantity = Quantity.parse(value)
    except ValueError as error:
        raise ConfigError(f"{text}: the size {error}, or {_NONE}") from None
    plain = value.isdecimal() or (quantity.notation is Notation.EXPONENT and quantity.is_whole)
    return quantity.value if plain else value


def _editable(file: Path, text: str) -> dict[str, Any]:
    if file.suffix == ".json":
        raise ConfigError(f"{file} is JSON; only YAML is edited here: edit it by hand, kvpool run takes that too")
    content = parse_document(file, text).content
    if content.get("kind") != KIND:
        raise ConfigError(f"{file}: kind is {content.get('kind')!r}; edit the {KIND} that it comes from")
    return content


def _names(content: Mapping[str, Any]) -> list[object]:
    """The models' names, by index; what is no model has none, and is found when the whole is checked."""
    spec = content.get("spec")
    models = spec.get("models") if isinstance(spec, dict) else None
    return [model.get("name") if isinstance(model, dict) else None for model in models or ()]


def _with_model(file: Path, text: str, content: dict[str, Any], model: str, assignments: Sequence[Assignment]) -> str:
    added: dict[str, Any] = {"name": model}
    for tier, field, value in assignments:
        _assign(added, tier, field, value)
    expected = copy.deepcopy(content)
    models = [*(expected["spec"].get("models") or ()), added]
    expected["spec"]["models"] = models
    return _as_meant(file, put(text, ("spec", "models", len(models) - 1), added), expected)


def _assign(model: dict[str, Any], tier: str, field: str, value: str | int | None) -> None:
    quotas = {name: dict(quota or {}) for name, quota in (model.get("quotas") or {}).items()}
    if value is not None:
        quotas.setdefault(tier, {})[field] = value
    elif field in quotas.get(tier, {}):
        del quotas[tier][field]
        if not quotas[tier]:
            del quotas[tier]
    else:
        return
    model["quotas"] = quotas
    if not quotas:
        del model["quotas"]


def _as_meant(file: Path, text: str, expected: Mapping[str, Any]) -> str:
    try:
        content = parse_document(file, text).content
    except ConfigError:  # an anchor that others refer to was in what was replaced
        content = {}
    if content != expected:
        raise ConfigError(f"{file} cannot be changed in place: its quotas share text with something else; edit it")
    return text


def _checked(file: Path, text: str) -> RuntimeConfig:
    try:
        return parse_config(file, text)
    except ConfigError as error:
        raise ConfigError(f"{error}\n{file} is left as it was; the lines are those that it would have had") from error


def _refuse_unknown(file: Path, names: Sequence[object], model: str) -> None:
    if model in names:
        return
    known = ", ".join(str(name) for name in names if name is not None)
    has = f"it has {known}" if known else "it has none"
    raise ConfigError(f"{file} has no model {model!r}; {has}. --add adds one")


def _share(config: RuntimeConfig, model: ModelConfig, tier: str) -> Share:
    quota = model.quotas.get(tier, QuotaConfig())  # type: ignore[call-overload]
    guaranteed = quota.guaranteed_bytes if tier in _GUARANTEES else None
    return Share(model.name, tier, guaranteed, quota.limit_bytes, _capacity(config, tier))


def _capacity(config: RuntimeConfig, tier: str) -> int | None:
    section = getattr(config, tier)
    names = ("capacity_bytes", "memory_bytes", "inline_bytes")
    return next((getattr(section, name) for name in names if hasattr(section, name)), None)


def _print(config: RuntimeConfig, model: str | None, *, as_json: bool) -> None:
    found = [share for share in shares(config) if model in (None, share.model)]
    if as_json:
        for share in found:
            print_json(share._asdict())
        return
    out = console()
    columns = ("model", "tier", "guaranteed", "limit", "the tier's capacity")
    rows = [
        (share.model, share.tier, _size(share.guaranteed_bytes), _size(share.limit_bytes), _size(share.capacity_bytes))
        for share in found
    ]
    out.print(table(columns, rows, right=columns[2:]) if rows else "no models are named: all share every tier")
    for tier in _GUARANTEES:
        if rows and (capacity := _capacity(config, tier)) is not None:
            taken = sum(share.guaranteed_bytes or 0 for share in shares(config) if share.tier == tier)
            out.print(f"{tier}: {_size(taken)} of {_size(capacity)} guaranteed, {_size(capacity - taken)} for all")


def _print_changes(file: Path, before: str, config: RuntimeConfig, *, changed: bool) -> None:
    if not changed:
        print(f"{file} says so already; nothing was written")
        return
    try:
        found = changes(parse_config(file, before), config)
    except ConfigError:  # it was not right before: that is what was mended
        found = []
    for change in found:
        print(f"{change.path}: {change.old} -> {change.new}")
    print(f"{file} was written; a kvpool run on it takes it within two seconds")


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else str(Quantity.of_bytes(nbytes))

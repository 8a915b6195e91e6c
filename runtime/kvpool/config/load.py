"""`load_config`: a file on disk becomes a `RuntimeConfig`, or an error that says which line to change, and to what."""

from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvpool.api.model import Path
from kvpool.api.pool import API_VERSION, KIND, KVCachePool
from kvpool.config.document import Document, parse_document, read_document, yaml_text
from kvpool.config.messages import Complaint, InvalidFieldsError, complaints
from kvpool.config.resolve import runtime_config
from kvpool.config.runtime import RuntimeConfig
from kvpool.errors import ConfigError

_RUNTIME_KIND = "RuntimeConfig"
_M = TypeVar("_M", bound=BaseModel)


def load_config(path: FilePath) -> RuntimeConfig:
    """Read a `KVCachePool` or a `RuntimeConfig`, YAML or (suffix .json) JSON.

    Raises `ConfigError`: one line per thing that is wrong, each with the file, the line, the field's path and what
    would be right.
    """
    return _config(read_document(path))


def parse_config(path: FilePath, text: str) -> RuntimeConfig:
    """`load_config` for the text that the file is to have: whether it may be written."""
    return _config(parse_document(path, text))


def dump_config(config: RuntimeConfig) -> str:
    """The YAML of a file from which `load_config` reads the same configuration."""
    return yaml_text(config.model_dump(mode="json"))


def load_pool(path: FilePath) -> KVCachePool:
    """Read a `KVCachePool` that can be used, without its `status`. Raises `ConfigError` as `load_config` does."""
    document = read_document(path)
    kind = _kind(document)
    if kind != KIND:
        raise ConfigError(f"{document.place(('kind',))}: kind is {kind}; it must be {KIND} here")
    pool = _pool(document)
    _resolved(document, pool)
    return pool


def _config(document: Document) -> RuntimeConfig:
    if _kind(document) == _RUNTIME_KIND:
        return _validated(document, RuntimeConfig)
    return _resolved(document, _pool(document))


def _kind(document: Document) -> str:
    """The document's kind, one of ours. Raises `ConfigError` for others."""
    kind, version = document.content.get("kind"), document.content.get("apiVersion")
    if kind not in (KIND, _RUNTIME_KIND):
        raise ConfigError(_wrong(document, "kind", kind, KIND))
    if version != API_VERSION:
        raise ConfigError(_wrong(document, "apiVersion", version, API_VERSION))
    return str(kind)


def _wrong(document: Document, field: str, value: object, wanted: str) -> str:
    found = "is missing" if value is None else f"is {value!r}"
    return f"{document.place((field,))}: {field} {found}; it must be {wanted}"


def _pool(document: Document) -> KVCachePool:
    empty = [
        Complaint(path, "is empty; give it a value ({} for all defaults), or remove the line")
        for path in _empty(document.content, ())
        if path[0] != "status"
    ]
    if empty:
        raise _located(document, empty)
    return _validated(document, KVCachePool, without="status")


def _resolved(document: Document, pool: KVCachePool) -> RuntimeConfig:
    try:
        return runtime_config(pool)
    except InvalidFieldsError as error:
        raise _located(document, error.complaints) from error


def _empty(value: object, path: Path) -> Iterator[Path]:
    if value is None:
        yield path
    children: Sequence[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for name, child in children:
        yield from _empty(child, (*path, name))


def _validated(document: Document, model: type[_M], *, without: str = "") -> _M:
    content = {name: value for name, value in document.content.items() if name != without}
    try:
        return model.model_validate(content, by_alias=True, by_name=False)
    except ValidationError as error:
        raise _located(document, complaints(error, model)) from error


def _located(document: Document, found: Sequence[Complaint]) -> ConfigError:
    return ConfigError("\n".join(f"{document.place(complaint.path)}: {complaint}" for complaint in found))

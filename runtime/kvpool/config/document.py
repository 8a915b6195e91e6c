"""Reads one YAML or JSON document from a file, and remembers on which line each field stands.

Safe: no tags that make objects, no duplicate keys, one document, at most 1 MiB of text and 100,000 values after aliases
are followed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import yaml

from kvpool.api.model import Path
from kvpool.config.fields import printed_path
from kvpool.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 64
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"
_COLLECTIONS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class Document(NamedTuple):
    """The content of a file: a mapping with text keys, and the line of each field (counted from 1; none for JSON)."""

    file: FilePath
    content: dict[str, Any]
    lines: dict[Path, int]

    def place(self, path: Path) -> str:
        """`pool.yaml:12`: the file, and the line of the field or of the nearest section around it that is there."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.file}:{self.lines[path[:length]]}"
        return str(self.file)


def read_document(file: FilePath) -> Document:
    """Read the one document of a file. Raises `ConfigError`, in one line."""
    return parse_document(file, _text(file))


def parse_document(file: FilePath, text: str) -> Document:
    """`read_document` for the text that the file has, or is to have."""
    lines: dict[Path, int] = {}
    content = _json(file, text) if file.suffix == ".json" else _yaml(file, text, lines)
    if content is None:
        raise ConfigError(f"{file} is empty; it must hold a KVCachePool, see examples/laptop.yaml")
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {_kind(content)}; it must hold the fields apiVersion, kind, metadata and spec")
    return Document(file, content, lines)


def _text(file: FilePath) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than 1 MiB; that is no KVCachePool")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with numbers such as `1e3` as YAML 1.2 and Kubernetes have them."""


class _Dumper(yaml.SafeDumper):
    """The counterpart: puts texts in quotes that the loader would take for such numbers."""


for _kind_of_yaml in (_Loader, _Dumper):
    _kind_of_yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
    )


def yaml_text(content: object) -> str:
    """YAML that `read_document` reads as this content again; keys in their order."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False))


def _yaml(file: FilePath, text: str, lines: dict[Path, int]) -> object:
    try:
        loader = _Loader(text)
        nodes = [node for node in _nodes(loader) if node.tag != _NULL]
        if len(nodes) > 1:
            raise ConfigError(f"{file} holds {len(nodes)} documents; it must hold one, so split it")
        return _Reader(file, loader, lines).value(nodes[0], ()) if nodes else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place} is not valid YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise _too_much(file) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error


def _nodes(loader: _Loader) -> Iterator[yaml.Node]:
    """The root of each document."""
    while loader.check_node():
        node = loader.get_node()
        assert node is not None
        yield node


class _Reader:
    """Turns YAML nodes into values. Aliases are followed, and what they repeat is counted."""

    def __init__(self, file: FilePath, loader: _Loader, lines: dict[Path, int]) -> None:
        self._file = file
        self._loader = loader
        self._lines = lines
        self._values = 0

    def value(self, node: yaml.Node, path: Path) -> object:
        self._values += 1
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise _too_much(self._file)
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
            raise ConfigError(f"{self._place(node, path)} has the tag {node.tag}; write it without one")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        content: dict[str, object] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = self._key(key_node, path), key_node.start_mark.line + 1
            here = (*path, key)
            if key in content:
                raise ConfigError(
                    f"{self._file}:{line}: {printed_path(here)} stands here a second time, after line {first[key]}; "
                    "remove one"
                )
            first[key] = line
            self._lines.setdefault(here, line)
            content[key] = self.value(value_node, here)
        return content

    def _key(self, node: yaml.Node, path: Path) -> str:
        if node.tag == _MERGE:
            raise ConfigError(
                f"{self._place(node, path)} has a merge key (<<), which is not followed; write the fields out"
            )
        key = self._loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise ConfigError(f"{self._place(node, path)} has a key that is not text; put it in quotes")
        return key

    def _place(self, node: yaml.Node, path: Path) -> str:
        return f"{self._file}:{node.start_mark.line + 1}: {printed_path(path) or 'the file'}"


def _json(file: FilePath, text: str) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content: dict[str, object] = {}
        for key, value in pairs:
            if key in content:
                raise ConfigError(f"{file}: the key {key!r} stands twice in one object; remove one")
            content[key] = value
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique) if text.strip() else None
    except RecursionError as error:
        raise _too_much(file) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    _refuse_depth(file, content, 0)
    return content


def _refuse_depth(file: FilePath, value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _too_much(file)
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_depth(file, child, depth + 1)


def _too_much(file: FilePath) -> ConfigError:
    return ConfigError(f"{file} holds more than {MAX_VALUES} values, or more than {MAX_DEPTH} levels")


def _kind(content: object) -> str:
    return "a list" if isinstance(content, list) else "a single value"

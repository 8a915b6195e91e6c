"""Changes single values in the text of a YAML document; every byte that is not about them stays as it is.

Pure. A library that reads the whole and writes it again (ruamel.yaml) moves comments to other entries and lays out anew
what it has no style for: see docs/decisions/0016. New values are written in flow style, which is right everywhere.
What was meant is not checked here: whoever calls reads the new text and compares.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from kvpool.api.model import Path
from kvpool.config.fields import printed_path
from kvpool.errors import ConfigError

_ALIAS = "!alias"
_WIDTH = 1 << 20


class _Loader(yaml.SafeLoader):
    """Composes nodes with their places; an alias stays one, at its own place."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_ALIAS, event.anchor, event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


class _Found(NamedTuple):
    """The deepest node on the way to a path, and what of the path is not there."""

    node: yaml.Node
    missing: Path


def put(text: str, path: Path, value: object) -> str:
    """Give the field at `path` a value; sections on the way that are missing are made.

    An index beyond the end of a list appends to it. Raises `ConfigError` where what is there cannot be changed.
    """
    node, missing = _find(text, path)
    if not missing or _is_empty(node):
        return _replaced(text, node, path, _nested(value, missing))
    if isinstance(node, yaml.MappingNode):
        return _with_entry(text, node, f"{_flow(missing[0])}: {_flow(_nested(value, missing[1:]))}")
    if isinstance(node, yaml.SequenceNode):
        return _with_item(text, node, _nested(value, missing[1:]))
    raise _unchangeable(path[: len(path) - len(missing)])


def remove(text: str, path: Path) -> str:
    """Take the field at `path` out, with the comment behind it, and each section that is empty then.

    Nothing happens when it is not there. Raises `ConfigError` where what is there cannot be changed in place.
    """
    while True:
        parent, missing = _find(text, path[:-1])
        if missing:
            return text
        if not isinstance(parent, yaml.MappingNode):
            raise _unchangeable(path[:-1])
        entries = parent.value
        at = next((at for at, (key, _) in enumerate(entries) if key.value == path[-1]), None)
        if at is None:
            return text
        if len(entries) > 1:
            return _without_entry(text, parent, at)
        path = path[:-1]


def _find(text: str, path: Path) -> _Found:
    node = _Loader(text).get_single_node()
    assert node is not None
    for depth, part in enumerate(path):
        child = _child(node, part)
        if child is None:
            return _Found(node, path[depth:])
        node = child
    return _Found(node, ())


def _child(node: yaml.Node, part: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child: yaml.Node = node.value[part]
        return child
    return None


def _nested(value: object, path: Path) -> object:
    """What stands at the beginning of `path`, so that `value` stands at its end."""
    for part in reversed(path):
        value = [value] if isinstance(part, int) else {part: value}
    return value


def _is_empty(node: yaml.Node) -> bool:
    """Whether nothing is lost by writing something in its place: `{}`, `[]`, null."""
    if isinstance(node, yaml.CollectionNode):
        return not node.value
    return node.tag == "tag:yaml.org,2002:null"


def _replaced(text: str, node: yaml.Node, path: Path, value: object) -> str:
    if node.tag == _ALIAS or (isinstance(node, yaml.CollectionNode) and node.value):
        raise _unchangeable(path)
    begin, end = node.start_mark.index, node.end_mark.index
    before = text[:begin]
    space = "" if before[-1:].isspace() or before[-1:] in ("[", "{") else " "  # nothing stood behind the colon
    return before + space + _flow(value) + text[end:]


def _with_entry(text: str, node: yaml.MappingNode, entry: str) -> str:
    first_key, _ = node.value[0]
    end = _end_of(text, node.value[-1][1])
    if node.flow_style:
        return f"{text[:end]}, {entry}{text[end:]}"
    return _with_line(text, end, " " * first_key.start_mark.column + entry)


def _with_item(text: str, node: yaml.SequenceNode, value: object) -> str:
    end = _end_of(text, node.value[-1])
    if node.flow_style:
        return f"{text[:end]}, {_flow(value)}{text[end:]}"
    dash, content = node.start_mark.column, node.value[0].start_mark.column
    newline = _newline(text)
    lines = list(_item_lines(value))
    indented = [f"{' ' * dash}-{' ' * max(1, content - dash - 1)}{lines[0]}"]
    indented += [" " * max(content, dash + 2) + line for line in lines[1:]]
    return _with_line(text, end, newline.join(indented))


def _item_lines(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (f"{_flow(key)}: {_flow(item)}" for key, item in value.items())
    else:
        yield _flow(value)


def _with_line(text: str, end: int, lines: str) -> str:
    """Put `lines` behind the line in which `end` lies."""
    newline = _newline(text)
    at = text.find("\n", end)
    if at < 0:
        return f"{text}{newline}{lines}{newline}"
    return text[: at + 1] + lines + newline + text[at + 1 :]


def _without_entry(text: str, node: yaml.MappingNode, at: int) -> str:
    key, value = node.value[at]
    begin, end = key.start_mark.index, _end_of(text, value)
    line = text.rfind("\n", 0, begin) + 1
    if node.flow_style and at:
        return text[: _end_of(text, node.value[at - 1][1])] + text[end:]
    if at + 1 < len(node.value) and (node.flow_style or text[line:begin].strip()):  # `- ` stands before it
        return text[:begin] + text[node.value[at + 1][0].start_mark.index :]
    after = text.find("\n", end) + 1 or len(text)
    return text[:line] + text[after:]


def _end_of(text: str, node: yaml.Node) -> int:
    """Where the node's last character has stood: a block's own end lies behind the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    begin, end = node.start_mark.index, node.end_mark.index
    return begin + len(text[begin:end].rstrip())


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _flow(value: object) -> str:
    written = str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=_WIDTH, allow_unicode=True))
    return written.removesuffix("\n").removesuffix("\n...")


def _unchangeable(path: Path) -> ConfigError:
    return ConfigError(f"{printed_path(path)} cannot be changed in place (an alias, or no plain value): edit the file")

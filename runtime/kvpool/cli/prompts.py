"""Reads a file of prompts: one JSON object a line, or plain text. Pure but for the reading.

JSON lines begin with a brace: `{"prompt": "..."}`, or `{"messages": [{"role": "system", "content": "..."}]}` for the
model's chat template; other keys are passed over. In plain text, prompts are separated by blank lines; where there is
no blank line between them, each line is a prompt.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvpool.errors import InputError

STANDARD_INPUT = "-"
MAX_COMPLAINTS = 20
_FORM = '{"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


class Prompt(NamedTuple):
    """One prompt, and where it stands: `prompts.jsonl:3`. Either a text or a chat's messages."""

    place: str
    text: str | None
    messages: tuple[dict[str, str], ...] = ()


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a file, or of standard input for `-`.

    Raises `InputError`, with a line for each line of the file that is wrong.
    """
    try:
        data = sys.stdin.buffer.read() if source == STANDARD_INPUT else Path(source).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start})") from None
    prompts = parse_prompts(source, text)
    if not prompts:
        raise InputError(f"{source} has no prompts; write one JSON object a line, {_FORM}, or plain text")
    return prompts


def parse_prompts(name: str, text: str) -> list[Prompt]:
    """The prompts of this text. Raises as `read_prompts` does."""
    lines = text.splitlines()
    if not text.lstrip().startswith("{"):
        return list(_paragraphs(name, lines))
    prompts, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(_parsed(f"{name}:{number}", line))
            except InputError as error:
                wrong.append(str(error))
    if wrong:
        more = [f"{name}: {len(wrong) - MAX_COMPLAINTS} more lines are wrong"] if len(wrong) > MAX_COMPLAINTS else []
        raise InputError("\n".join([*wrong[:MAX_COMPLAINTS], *more]))
    return prompts


def _paragraphs(name: str, lines: Sequence[str]) -> Iterator[Prompt]:
    begun: list[str] = []
    found: list[Prompt] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            begun.append(line)
        elif begun:
            found.append(Prompt(f"{name}:{number - len(begun)}", "\n".join(begun)))
            begun = []
    if len(found) == 1:
        first = int(found[0].place.rpartition(":")[2])
        found = [Prompt(f"{name}:{number}", line) for number, line in enumerate(str(found[0].text).split("\n"), first)]
    yield from found


def _parsed(place: str, line: str) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({error}); write {_FORM}") from None
    if not isinstance(content, dict):
        raise InputError(f"{place} is no JSON object; write {_FORM}")
    text, messages = content.get("prompt"), content.get("messages")
    if (text is None) == (messages is None):
        raise InputError(f"{place} has {'neither prompt nor' if text is None else 'both prompt and'} messages")
    if messages is not None:
        return Prompt(place, None, _messages(place, messages))
    if not isinstance(text, str) or not text:
        raise InputError(f"{place}: prompt must be a text that is not empty")
    return Prompt(place, text)


def _messages(place: str, messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: messages must be a list with at least one message")
    for number, message in enumerate(messages):
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else []
        if not fields or not all(isinstance(field, str) for field in fields):
            raise InputError(f'{place}: messages[{number}] must be {{"role": "...", "content": "..."}}, both texts')
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)

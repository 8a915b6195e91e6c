"""Request traces: what was asked for, as numbered blocks. Reads the JSON lines of Mooncake's published traces.

One request a line: `{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}`, where each
hash id stands for a block of 512 tokens and all that comes before it; the last block may be a part of one.
"""

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from kvpool.errors import InputError

TRACE_BLOCK_TOKENS = 512

Blocks: TypeAlias = "array[int]"
"""One request's blocks, each a number that stands for its whole path from the prompt's start; int32."""
Trace: TypeAlias = Sequence[Blocks]


class BlockNumbers:
    """Numbers blocks from 0, by id and all ids before it: a trace whose ids say less than that is read rightly too."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, object], int] = {}

    def number(self, hash_ids: Iterable[object]) -> Blocks:
        """The numbers of one request's blocks, first to last."""
        numbers = self._numbers
        blocks = array("i")
        parent = -1
        for hash_id in hash_ids:
            parent = numbers.setdefault((parent, hash_id), len(numbers))
            blocks.append(parent)
        return blocks


def read_traces(paths: Sequence[Path], *, whole_blocks: bool = False) -> Trace:
    """The requests of these files, one file after the other, as one trace; `.gz` files are unpacked.

    `whole_blocks` leaves out a last block that is a part of one. Raises `InputError` naming file and line.
    """
    numbers = BlockNumbers()
    requests = chain.from_iterable(_hash_ids(path, whole_blocks=whole_blocks) for path in paths)
    return [numbers.number(hash_ids) for hash_ids in requests]


def _hash_ids(path: Path, *, whole_blocks: bool) -> Iterator[list[object]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            hash_ids, tokens = _parsed(line, f"{path}:{number}")
            yield hash_ids[: tokens // TRACE_BLOCK_TOKENS] if whole_blocks else hash_ids


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield from lines
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read as a trace of JSON lines: {reason}") from None


def _parsed(line: str, where: str) -> tuple[list[object], int]:
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); a trace has one JSON object a line") from None
    hash_ids = request.get("hash_ids") if isinstance(request, dict) else None
    if not isinstance(hash_ids, list) or not all(type(hash_id) in (int, str) for hash_id in hash_ids):
        raise InputError(f'{where}: no "hash_ids" with a list of block ids (numbers or texts)')
    tokens = request.get("input_length", len(hash_ids) * TRACE_BLOCK_TOKENS)
    if type(tokens) is not int or tokens < 0:
        raise InputError(f'{where}: "input_length" is no number of tokens: {str(tokens)[:40]}')
    return hash_ids, tokens

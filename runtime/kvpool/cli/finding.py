"""`kvpool find`: what is known of blocks, from the catalog, vectors and shared tiers of a pool."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from kvpool.api.duration import Duration
from kvpool.cli.explaining import read_tokens, reading
from kvpool.cli.output import console, instant, print_json, size, table
from kvpool.config import load_config
from kvpool.errors import InputError
from kvpool.pool.finding import FoundEntry
from kvpool.pool.pool import Pool


class Asked(NamedTuple):
    """What is looked for, as it was typed."""

    model: str
    tenant: str | None
    prefix: str | None
    similar_to: str | None
    older_than: str | None
    where: Sequence[str]
    limit: int


def find(pool: Path, asked: Asked, *, directory: Path | None, as_json: bool) -> None:
    """Print what is found. Raises `ConfigError`, `InputError`, `DirectoryInUseError` and `SharedTierOutError`."""
    older_than = None if asked.older_than is None else timedelta(seconds=_seconds(asked.older_than))
    where = parsed_where(asked.where)
    prefix = None if asked.prefix is None else read_tokens(asked.prefix, option="--prefix")
    similar_to = None if asked.similar_to is None else read_tokens(asked.similar_to, option="--similar-to")
    with Pool.open(reading(load_config(pool), directory)) as opened:
        found = opened.find(
            asked.model,
            asked.tenant,
            prefix=prefix,
            similar_to=similar_to,
            older_than=older_than,
            where=where,
            limit=asked.limit,
        )
    if as_json:
        for entry in found:
            print_json(as_object(entry))
    elif found:
        console().print(_table(found))
    else:
        print("nothing is known that matches")


def parsed_where(conditions: Sequence[str]) -> Mapping[str, Any]:
    """`KEY=JSON` conditions as one mapping; what is no JSON is text. Raises `InputError`."""
    found: dict[str, Any] = {}
    for condition in conditions:
        key, is_there, value = condition.partition("=")
        if not is_there or not key:
            raise InputError(f"--where {condition}: give it as KEY=VALUE, the value in JSON or as plain text")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def as_object(entry: FoundEntry) -> dict[str, object]:
    """An entry as the object that `--json` prints; times are in unix seconds."""
    return {**entry._asdict(), "key": entry.key.hex()}


def _seconds(text: str) -> float:
    try:
        return Duration.parse(text).seconds
    except ValueError as error:
        raise InputError(f"--older-than {text}: {error}") from None


def _table(found: Sequence[FoundEntry]) -> Any:
    columns = ("key", "tenant", "tokens", "tiers", "bytes", "last used", "hits", "similarity", "metadata")
    rows = [
        (
            entry.key.hex(),
            entry.tenant[:12],
            f"{entry.tokens:,}",
            ", ".join(entry.tiers) or "-",
            size(entry.nbytes),
            instant(entry.last_used_s),
            f"{entry.hits:,}",
            "" if entry.similarity is None else f"{entry.similarity:.2f}",
            json.dumps(entry.metadata) if entry.metadata else "",
        )
        for entry in found
    ]
    return table(columns, rows, right=("tokens", "bytes", "hits", "similarity"))

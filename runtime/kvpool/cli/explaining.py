"""`kvpool explain`: why a prompt was a hit or a miss, from what a pool left in its directory."""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from kvpool.blocks.tokens import token_bytes
from kvpool.cli.output import console, instant, print_json, table
from kvpool.cli.sharing import as_object as shared_object
from kvpool.cli.sharing import shared_table
from kvpool.config import RamConfig, RuntimeConfig, SsdConfig, default_directory, load_config
from kvpool.errors import ConfigError, InputError
from kvpool.pool.directory import MARKER_NAME
from kvpool.pool.pool import Pool
from kvpool.pool.registry import Registry
from kvpool.pool.results import BlockReport, Verdict

STANDARD_INPUT = "-"
_RAM_BYTES = 1 << 20
_NO_LIMIT_BYTES = 1 << 50


def explain(pool: Path | None, *, directory: Path | None, model: str, tenant: str, tokens: str, as_json: bool) -> None:
    """Print a report for each whole block of the prompt; of like ones in a row, one line where people read it.

    Raises `ConfigError`, `InputError` and `DirectoryInUseError`.
    """
    prompt = read_tokens(tokens)
    with Pool.open(reading_config(pool, directory)) as opened:
        found = opened.model(model)
        reports = found.explain(prompt, tenant=tenant)
        block_tokens = found.layout.block_tokens
    if as_json:
        for report in reports:
            print_json(as_object(report))
    else:
        _print_table(reports, block_tokens, len(prompt) // 4)


def shared(pool: Path | None, *, directory: Path | None, count: int, as_json: bool) -> None:
    """Print the `count` shared prefixes that requests used most. Raises `ConfigError` and `DirectoryInUseError`."""
    with Pool.open(reading_config(pool, directory)) as opened:
        prefixes = opened.shared_prefixes(count)
        names = {identity.fingerprint: identity.name for identity in opened.known_models()}
    if as_json:
        for prefix in prefixes:
            print_json(shared_object(prefix, names))
    elif prefixes:
        console().print(shared_table(prefixes, names))
    else:
        print("no prefix is shared: none was declared, and no two requests parted after one that is held")


def read_tokens(source: str, *, option: str = "--tokens") -> bytes:
    """The token ids in a file, or on standard input: a JSON list, or raw int32. Raises `InputError`."""
    try:
        content = sys.stdin.buffer.read() if source == STANDARD_INPUT else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{option} {source}: {error.strerror or error}") from None
    if not content.lstrip().startswith(b"["):
        return token_bytes(content)
    try:
        return token_bytes(json.loads(content))
    except ValueError as error:
        raise InputError(f"{option} {source}: {error}; give a JSON list of token ids, or raw int32") from None


def as_object(report: BlockReport) -> dict[str, object]:
    """A report as the object that `--json` prints; times are in unix seconds."""
    return {**report._asdict(), "key": report.key.hex()}


def reading_config(pool: Path | None, directory: Path | None) -> RuntimeConfig:
    """A configuration that finds what lies in the directory, and in the pool's shared tiers if it is named by its file.

    It changes nothing: no limit forces anything out.
    """
    if (pool is None) == (directory is None):
        raise ConfigError("name the pool either by --pool POOL.YAML or by --directory DIR")
    return reading(RuntimeConfig(name="explain", directory=directory) if pool is None else load_config(pool))


def reading(config: RuntimeConfig, directory: Path | None = None) -> RuntimeConfig:
    """`reading_config` of a configuration, in `directory` if it is given. Raises `ConfigError`."""
    where = directory or config.directory or default_directory(config.name)
    if not (where / MARKER_NAME).exists():
        raise ConfigError(f"{where}: no pool was opened here yet; name another with --pool or --directory")
    ssd = SsdConfig(capacity_bytes=_NO_LIMIT_BYTES) if (where / "ssd").exists() else None
    largest = max((identity.layout.record_bytes for identity in Registry.load(where).known()), default=0)
    ram = RamConfig(capacity_bytes=max(_RAM_BYTES, 2 * largest), index_bytes=_NO_LIMIT_BYTES)
    return RuntimeConfig(
        name=config.name,
        directory=where,
        secret_file=config.secret_file,
        services=config.services,
        block_tokens=config.block_tokens,
        ram=ram,
        ssd=ssd,
        dragonfly=config.dragonfly,
        database=config.database,
        sharing=config.sharing,
    )


def _print_table(reports: Sequence[BlockReport], block_tokens: int, tokens: int) -> None:
    held = sum(report.verdict is Verdict.HELD for report in reports)
    left = tokens - len(reports) * block_tokens
    out = console()
    out.print(f"{held} of {len(reports)} blocks held: {held * block_tokens:,} of {tokens:,} tokens can be loaded")
    if left:
        out.print(f"the last {left} tokens are no whole block, and are never stored")
    if reports:
        columns = ("blocks", "tokens", "verdict", "tiers", "since", "why")
        out.print(table(columns, _rows(reports, block_tokens)))


def _rows(reports: Sequence[BlockReport], block_tokens: int) -> Iterator[tuple[str, ...]]:
    """One row for all blocks in a row of which the same is to be said."""
    last = -1
    for alike, run in groupby(reports, key=lambda report: (report.verdict, report.tiers, report.at_s, report.detail)):
        verdict, tiers, at_s, detail = alike
        first, last = last + 1, last + sum(1 for _ in run)
        yield (
            str(first) if first == last else f"{first}-{last}",
            f"{first * block_tokens}-{(last + 1) * block_tokens - 1}",
            verdict,
            ", ".join(tiers) or "-",
            "-" if at_s is None else instant(at_s),
            detail,
        )

"""`kvpool warm`: fills a pool from a file of prompts, so that the first request for each finds it there."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvpool.cli.local_model import LocalModel, load_model
from kvpool.cli.output import figure, print_json, size
from kvpool.cli.prompts import Prompt, read_prompts
from kvpool.config import RuntimeConfig, load_config
from kvpool.errors import ConfigError, KvpoolError
from kvpool.pool.pool import Pool
from kvpool.tiers.tier import TierName

FLUSH_S = 60.0
"""How long one prompt's blocks may take to reach ssd before the next prompt is run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be warmed, and how. `model` None: SmolLM2; `name` None: as the model calls itself."""

    pool: Path
    prompts: str
    directory: Path | None
    model: str | None
    name: str | None
    tenant: str
    shared: bool
    max_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one prompt. Tokens are those of whole blocks, but for `tokens`: all that were taken of it."""

    prompt: str
    tokens: int
    cut_tokens: int
    """Tokens that were left out, for the prompt was too long."""
    already_tokens: int
    stored_tokens: int
    shared_tokens: int
    refused_blocks: dict[str, int]
    seconds: float

    def line(self) -> str:
        """For people."""
        parts = [f"{self.tokens:,} tokens", f"{self.already_tokens:,} already there", f"{self.stored_tokens:,} stored"]
        if self.shared_tokens:
            parts.append(f"{self.shared_tokens:,} declared shared")
        if self.cut_tokens:
            parts.append(f"{self.cut_tokens:,} left out at the end")
        parts += [f"{blocks} blocks refused ({reason})" for reason, blocks in self.refused_blocks.items()]
        return f"{self.prompt}: {', '.join(parts)}, {self.seconds:.1f} s"


@dataclass(slots=True, kw_only=True)
class Summary:
    """What became of all prompts so far."""

    prompts: int
    began_s: float = field(default_factory=time.monotonic)
    done: int = 0
    already_tokens: int = 0
    stored_tokens: int = 0
    refused_blocks: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one prompt more."""
        self.done += 1
        self.already_tokens += outcome.already_tokens
        self.stored_tokens += outcome.stored_tokens
        self.refused_blocks.update(outcome.refused_blocks)

    def as_json(self) -> dict[str, object]:
        """The last object that `--json` prints."""
        return {
            "prompts": self.prompts,
            "done": self.done,
            "already_tokens": self.already_tokens,
            "stored_tokens": self.stored_tokens,
            "refused_blocks": dict(self.refused_blocks),
            "seconds": round(time.monotonic() - self.began_s, 3),
        }

    def line(self) -> str:
        """For people."""
        seconds = time.monotonic() - self.began_s
        rate = f", {figure(self.stored_tokens / seconds)} tokens/s" if self.stored_tokens else ""
        return (
            f"{self.done:,} of {self.prompts:,} prompts: {self.already_tokens:,} tokens already there, "
            f"{self.stored_tokens:,} stored, {seconds:.1f} s{rate}"
        )


def warm(asked: Asked, *, as_json: bool) -> None:
    """Store every prompt's blocks, and print what came of each.

    Raises `ConfigError`, `InputError`, `DirectoryInUseError`, and `KvpoolError` where blocks were refused. Ctrl-C ends
    it: what was stored by then is kept, and said.
    """
    prompts = read_prompts(asked.prompts)
    config = load_config(asked.pool)
    if config.ssd is None:
        raise ConfigError(f"{asked.pool} has no tiers.ssd: what is warmed would be gone with this command; add one")
    with Pool.open(config, directory=asked.directory) as pool:
        loaded = load_model(asked.model, asked.name)
        tokens = [loaded.tokens(prompt) for prompt in prompts]
        summary = Summary(prompts=len(prompts))
        try:
            _warm_all(asked, pool, loaded, list(zip(prompts, tokens, strict=True)), summary, as_json=as_json)
        finally:
            if as_json:
                print_json(summary.as_json())
            else:
                print(summary.line(), flush=True)
        _warn(asked, config, pool)
    if summary.refused_blocks:
        reasons = ", ".join(f"{blocks} {reason}" for reason, blocks in summary.refused_blocks.items())
        raise KvpoolError(f"blocks were refused ({reasons}): raise tiers.ram.capacity, or the model's ram quota")


def _warm_all(
    asked: Asked,
    pool: Pool,
    loaded: LocalModel,
    prompts: Sequence[tuple[Prompt, list[int]]],
    summary: Summary,
    *,
    as_json: bool,
) -> None:
    from kvpool.adapters.transformers import TransformersCache
    from kvpool.adapters.transformers.warming import warm as warm_one

    cache = TransformersCache(pool, loaded.model, name=loaded.name)
    (model,) = pool.models()
    most = min(limit for limit in (asked.max_tokens, loaded.most_tokens, sys.maxsize) if limit is not None)
    summary.began_s = time.monotonic()
    for prompt, whole in prompts:
        tokens = whole[:most]
        warmed = warm_one(cache, tokens, tenant=asked.tenant)
        shared = model.declare_shared(tokens, tenant=asked.tenant) if asked.shared else 0
        pool.flush(FLUSH_S)
        outcome = Outcome(
            prompt=prompt.place,
            tokens=warmed.tokens,
            cut_tokens=len(whole) - len(tokens),
            already_tokens=warmed.already,
            stored_tokens=warmed.stored,
            shared_tokens=shared,
            refused_blocks={reason.value: blocks for reason, blocks in warmed.refused.items()},
            seconds=round(warmed.seconds, 3),
        )
        summary.add(outcome)
        _print(outcome, as_json=as_json)


def _print(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        print_json({name: getattr(outcome, name) for name in outcome.__slots__})
    else:
        print(outcome.line(), flush=True)


def _warn(asked: Asked, config: RuntimeConfig, pool: Pool) -> None:
    """Say where a declaration does not do what one would think."""
    if not asked.shared:
        return
    sharing, stats = config.sharing, pool.stats()
    most = max(stats.shared_bytes[tier] for tier in (TierName.RAM, TierName.SSD))
    if not (sharing.enabled and sharing.protect_shared):
        print(
            "kvpool: sharing.enabled and sharing.protectShared are not both true: nothing is protected", file=sys.stderr
        )
    elif most > sharing.max_shared_bytes:
        print(
            f"kvpool: shared prefixes take {size(most)}, above sharing.maxSharedBytes of "
            f"{size(sharing.max_shared_bytes)}: they are not protected there until they are fewer",
            file=sys.stderr,
        )

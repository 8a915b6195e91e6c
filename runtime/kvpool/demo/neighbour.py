"""The demo's second model: another shape, random weights from a seed, and no measure: it stores above its quota.

What matters is what does not happen: its use of each tier stays within its limit, and the other model keeps what is
guaranteed to it. Every block that it loads is compared with what it stored, as the other model's are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpool.adapters.transformers import TransformersCache
from kvpool.demo.audit import AuditedPool, Ledger
from kvpool.pool.pool import Pool
from kvpool.pool.stats import AccountStats
from kvpool.tiers.tier import TierName

NAME = "random-llama"
SEED = 20_261_125
TENANT = "neighbour"
PROMPT_TOKENS = 1024
PROMPTS_A_ROUND = 12
QUICK_PROMPTS = 2
_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourReport:
    """What the second model did in one process, and what it did not."""

    prompts: int
    tokens: int
    loaded_tokens: int
    most_used_bytes: dict[str, int]
    """The most that it held, by tier."""
    limit_bytes: dict[str, int | None]
    guarantees_kept: bool
    """Whether the other model never fell below what it had, or what is guaranteed to it, while this one stored."""

    @property
    def limits_kept(self) -> bool:
        """Whether it never held more than it may."""
        return all(
            limit is None or self.most_used_bytes.get(tier, 0) <= limit for tier, limit in self.limit_bytes.items()
        )


class Neighbour:
    """The model on a pool, with a ledger of its own blocks in `ledger`."""

    def __init__(self, pool: Pool, ledger: Ledger, *, other: str) -> None:
        self._pool = pool
        self._other = other
        torch.manual_seed(SEED)
        model: Any = LlamaForCausalLM(LlamaConfig(**_SHAPE))
        model.eval()
        self._cache = TransformersCache(AuditedPool(pool, ledger), model, name=NAME)
        self._prompts = self._tokens = self._loaded_tokens = 0
        self._most_used: dict[str, int] = {}
        self._guarantees_kept = True

    def run(self, first: int, count: int) -> None:
        """Compute and store the prompts from number `first` on, each after what the pool has of it."""
        for number in range(first, first + count):
            before = self._account(self._other)
            self._answer(number)
            self._look(before)

    def report(self) -> NeighbourReport:
        """What was seen so far."""
        own = self._account(NAME)
        return NeighbourReport(
            prompts=self._prompts,
            tokens=self._tokens,
            loaded_tokens=self._loaded_tokens,
            most_used_bytes=self._most_used,
            limit_bytes={tier.value: share.limit_bytes for tier, share in own.tiers.items()},
            guarantees_kept=self._guarantees_kept,
        )

    def _answer(self, number: int) -> None:
        generator = torch.Generator().manual_seed(SEED + number)
        ids = torch.randint(3, _SHAPE["vocab_size"], (1, PROMPT_TOKENS), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with self._cache.session(**inputs, tenant=TENANT, room_tokens=1) as session:
            self._cache.model.generate(**session.inputs, max_new_tokens=1, do_sample=False)
            session.store(ids)
            self._loaded_tokens += session.loaded_columns
        self._prompts += 1
        self._tokens += PROMPT_TOKENS

    def _look(self, before: AccountStats) -> None:
        own, other = self._account(NAME), self._account(self._other)
        for tier, share in own.tiers.items():
            self._most_used[tier.value] = max(self._most_used.get(tier.value, 0), share.used_bytes)
        ram, was = other.tiers[TierName.RAM], before.tiers[TierName.RAM]
        record_bytes = ram.used_bytes // ram.blocks if ram.blocks else 0
        kept = min(was.used_bytes, ram.guaranteed_bytes)
        self._guarantees_kept = self._guarantees_kept and ram.used_bytes > kept - max(record_bytes, 1)

    def _account(self, name: str) -> AccountStats:
        return next(account for account in self._pool.stats().accounts if account.name == name)

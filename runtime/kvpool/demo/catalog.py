"""What the database tier knows besides blocks: which there are, and which past prompts are like a new one."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvpool.blocks.tokens import Tokens
from kvpool.errors import SharedTierOutError
from kvpool.pool.finding import FoundEntry
from kvpool.pool.pool import Pool

ANSWER_S = 120.0
"""How long to ask again while there is no answer: what was stored is told behind, and servers were stopped before."""
_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogReport:
    """What a pool found of one tenant."""

    tenant: str
    blocks: int
    """Known to PostgreSQL."""
    similar_prompts: int | None
    """Known to Qdrant; None where the pool has none."""
    best_similarity: float
    """Of a question that nobody has asked yet to the past prompt that is most like it, from 0 to 1."""


def ask_catalog(pool: Pool, model: str, tenant: str, prompt: Tokens) -> CatalogReport:
    """Ask what is known of a tenant, and what is like `prompt`; nothing, where there is no answer in time."""
    assert pool.config.database is not None
    known = _answer(lambda: pool.find(model, tenant, limit=10_000))
    if pool.config.database.qdrant is None:
        return CatalogReport(tenant=tenant, blocks=len(known), similar_prompts=None, best_similarity=0.0)
    like = _answer(lambda: pool.find(model, tenant, similar_to=prompt))
    best = max((entry.similarity or 0.0 for entry in like), default=0.0)
    return CatalogReport(tenant=tenant, blocks=len(known), similar_prompts=len(like), best_similarity=best)


def _answer(find: Callable[[], list[FoundEntry]]) -> list[FoundEntry]:
    """The first answer with something in it; an empty one where there is none by the deadline."""
    end = time.monotonic() + ANSWER_S
    while True:
        try:
            found = find()
        except SharedTierOutError:
            found = []
        if found or time.monotonic() >= end:
            return found
        time.sleep(_PAUSE_S)

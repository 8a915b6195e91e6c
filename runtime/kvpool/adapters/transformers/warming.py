"""Fills a pool ahead of requests: runs prompts through a model only to keep their blocks."""

import time
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from kvpool.adapters.transformers.cache import TransformersCache
from kvpool.pool.results import Refusal, StoreResult


class Warmed(NamedTuple):
    """What became of one prompt, in tokens of whole blocks; the rest of a prompt is never stored."""

    tokens: int
    """Of the whole prompt."""
    already: int
    stored: int
    refused: Mapping[Refusal, int]
    """Blocks that were not stored, by reason."""
    seconds: float


def warm(cache: TransformersCache, tokens: Sequence[int], *, tenant: str = "default") -> Warmed:
    """See that the pool holds every whole block of a prompt; only what is missing is computed.

    The prompt counts as asked for twice, so that a second-hit filter lets it pass to ssd. Raises as a session does.
    """
    began_s = time.monotonic()
    blocks, size = cache.blocks, cache.blocks.layout.block_tokens
    packed = array("i", tokens).tobytes()
    whole = len(tokens) // size
    with blocks.match(packed, tenant=tenant) as lease:
        already = lease.blocks
    stored, refused = 0, dict[Refusal, int]()
    if already < whole:
        result = _computed(cache, tokens, tenant)
        stored, refused = result.stored, dict(result.refused)
        already = result.already_there
        with blocks.match(packed, tenant=tenant):
            pass
    return Warmed(len(tokens), already * size, stored * size, refused, time.monotonic() - began_s)


def _computed(cache: TransformersCache, tokens: Sequence[int], tenant: str) -> StoreResult:
    input_ids = torch.tensor([list(tokens)], device=cache.model.device)
    mask = torch.ones_like(input_ids)
    with cache.session(input_ids, mask, tenant=tenant, room_tokens=1) as session:
        cache.model.generate(**session.inputs, max_new_tokens=1, do_sample=False)
        return session.store()

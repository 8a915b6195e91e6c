"""Turns similar prompts into what is worth having: pure."""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

LEAST_SUPPORT = 2
"""What one prompt alone speaks for is its own, and nobody else will ask for it."""

Block = TypeVar("Block", bound=Hashable)


def ranked(voices: Iterable[tuple[float, Iterable[Block]]], *, least_support: int = LEAST_SUPPORT) -> list[Block]:
    """Blocks that at least so many of the (score, blocks) speak for, by the sum of their scores; highest first.

    A voice speaks for a block once. Where blocks are given as whole chains, from the first on, a parent is never after
    its child: whoever speaks for the child speaks for it too, and of equal ones the one named earlier comes first.
    """
    weights: dict[Block, float] = {}
    support: Counter[Block] = Counter()
    for score, blocks in voices:
        spoken = dict.fromkeys(blocks)
        support.update(spoken.keys())
        for block in spoken:
            weights[block] = weights.get(block, 0.0) + score
    likely = [block for block in weights if support[block] >= least_support]
    return sorted(likely, key=lambda block: -weights[block])

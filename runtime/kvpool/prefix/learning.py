"""What a policy may learn from: which blocks are asked for, entered and lost, told to a model's learner.

A learner is optional, and without one nothing here is called. It gives each block a *trait*, a byte that the tree keeps
(`Node.traits`) and the policy gets with each offer; nobody but the learner knows what it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from kvpool.blocks.identity import KEY_BYTES
from kvpool.prefix.node import Node

Use: TypeAlias = tuple[bytes, int, int]
"""Traits of blocks that were used last at one time; that time; and when they are used now."""


class Learner(Protocol):
    """Learns from one model's requests. Guarded by the index's lock. Times are the index's clock; 0 is never."""

    due: int
    """Not 0: there is something to learn."""
    step: bytes
    """For `bytes.translate`: the traits of blocks after one more use."""

    def asked(self, uses: Sequence[Use], blocks: int, now: int) -> bool:
        """A request asks for so many known blocks; `uses` tells them, in any order. True: `learn` is overdue."""
        ...

    def entered(self, keys: bytes, depth: int, now: int) -> bytes:
        """Blocks are stored that had no copy, the first at `depth`: return their traits."""
        ...

    def extended(self, traits: bytes) -> bytes:
        """The last block with these traits is followed by others now: return what they become."""
        ...

    def lost(self, keys: Sequence[bytes], trait: int, last_use: int) -> None:
        """Blocks of one trait, used last at one time, have lost their last copy."""
        ...

    def erased(self, blocks: int, trait: int, last_use: int) -> None:
        """Blocks of one trait, used last at one time, have lost their last copy, and must not be remembered."""
        ...

    def learn(self, lock: AbstractContextManager[object]) -> None:
        """Work out what follows. Called without the index's lock, which is taken to see what has happened."""
        ...

    def adopted(self, blocks: int) -> None:
        """So many blocks came from another model's account, or went there, if negative."""
        ...


def note_request(learner: Learner, node: Node, depth: int, now: int) -> bool:
    """A request has matched up to `depth` in `node`. To be called before these blocks are dated.

    True: `Learner.learn` is overdue.
    """
    uses: list[Use] = []
    step = learner.step
    if depth < node.end:
        inside = depth - node.start
        _add_uses(uses, node, inside, now)
        node.traits = node.traits[:inside].translate(step) + node.traits[inside:]
        assert node.parent is not None
        node = node.parent
    while (parent := node.parent) is not None:
        traits, last_use, heads = node.traits, node.last_use, node.heads
        if heads is None or heads[0][1] <= last_use:
            uses.append((traits, last_use, now))
        else:
            _add_uses(uses, node, node.blocks, now)
        node.traits = traits.translate(step)
        node = parent
    return learner.asked(uses, depth, now)


def note_return(learner: Learner, node: Node, index: int, until: int, now: int) -> None:
    """Blocks of an edge that have no copy are about to be stored again."""
    keys = node.keys[index * KEY_BYTES : until * KEY_BYTES]
    node.traits = node.traits[:index] + learner.entered(keys, node.start + index, now) + node.traits[until:]


def note_lost(learner: Learner, node: Node, lost: Sequence[int], keys: Sequence[bytes]) -> None:
    """These blocks of an edge, first to last, have lost their last copy: told in runs of one trait and one age."""
    erased, until = node.tree.erased, len(lost)
    traits = node.traits[lost[0] : lost[-1] + 1]
    if node.heads is None and not erased and traits.count(traits[0]) == until:
        learner.lost(keys, traits[0], node.last_use)
        return
    while until:
        last = lost[until - 1]
        from_ = max(node.same_age_from(last), node.same_trait_from(last))
        first = until - 1
        while first and lost[first - 1] >= from_:
            first -= 1
        if erased:
            learner.erased(until - first, node.traits[last], node.used_at(last))
        else:
            learner.lost(keys[first:until], node.traits[last], node.used_at(last))
        until = first


def _add_uses(uses: list[Use], node: Node, until: int, now: int) -> None:
    """Add the first blocks of an edge, those that were used at one time together."""
    while until > 0:
        first = node.same_age_from(until - 1)
        uses.append((node.traits[first:until], node.used_at(until - 1), now))
        until = first

"""The contract of what remembers prompts by their vectors, and finds those that are like another."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from uuid import UUID

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding.encoder import Vector

MAX_POINTS = 100_000
"""How many prompts are remembered where nothing else is said."""
MAX_FOLLOWERS = 8
BATCH_POINTS = 256
"""So many points are sent at a time: half a MiB."""


class VectorsUnavailableError(Exception):
    """Vectors cannot be had now (away, too slow, refused): no-qdrant, a degradation, and never a user's error."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"qdrant: {reason}")
        self.reason = reason


class VectorsMismatchError(VectorsUnavailableError):
    """The collection is there, and was made for other vectors: nothing is written until somebody removes it."""


class Hit(NamedTuple):
    """A past prompt that is like the one asked about."""

    score: float
    """The cosine of the angle between both: 1 for the same n-grams, about 0 for prompts that share nothing."""
    leaf: BlockKey
    """The key of its last whole block."""
    blocks: int
    """Whole blocks, from the prompt's start to the leaf."""
    tokens: int
    at_ms: int
    """When it was asked for, in milliseconds since 1970."""
    followers: tuple[BlockKey, ...] = ()
    """The leaves of the prompts that were asked for next, the first one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A prompt to be remembered; one of the same id is replaced."""

    id: UUID
    vector: Vector = field(repr=False)
    tree: TreeId
    leaf: BlockKey
    blocks: int
    tokens: int
    at_ms: int
    followers: tuple[BlockKey, ...] = ()
    """At most `MAX_FOLLOWERS`."""


def point_id(leaf: BlockKey) -> UUID:
    """The id of the prompt that ends in this block: its key depends on all that a prompt depends on."""
    return UUID(bytes=leaf)


class PromptVectors(Protocol):
    """Remembers at most so many prompts, the latest. Safe from any thread; every call may wait, and has a deadline.

    All calls raise `VectorsUnavailableError` when the store is away or the deadline has passed, and
    `VectorsMismatchError` when the collection is of another kind. What a call has done by then stays: all of them may
    be made again. A vector that is none raises `InputError`.
    """

    def upsert(self, points: Sequence[Point]) -> None:
        """Remember these prompts, in batches; the oldest ones go where there would be too many."""
        ...

    def search(self, vector: Vector, tree: TreeId, k: int = 10, *, deadline_s: float) -> list[Hit]:
        """The `k` prompts of this tree, and of no other, that are most like `vector`; best first.

        `deadline_s` is how long the whole call may take.
        """
        ...

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """Forget a tenant's prompts of earlier epochs; how many those were."""
        ...

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """Forget a model's prompts; how many those were."""
        ...

    def count(self) -> int:
        """How many prompts are remembered."""
        ...

    def close(self) -> None:
        """Give back connections and processes; what was remembered is on disk. Not used afterwards."""
        ...

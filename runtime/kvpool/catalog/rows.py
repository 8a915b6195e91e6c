"""What the engine reports to the catalog: frozen values, one for each thing that happened. Pure.

Block keys come joined, 16 bytes each: that is how the index has them, how the journal keeps them and how they travel
to the database, where they are taken apart. Times are seconds since the epoch. A report is about the node that makes
it; what lies in a tier that all nodes share belongs to no node.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import NamedTuple, TypeAlias
from uuid import UUID

from kvpool.blocks.identity import KEY_BYTES, BlockKey, Fingerprint, ModelIdentity, TenantDigest, TreeId
from kvpool.tiers.tier import TierName

NO_NODE = UUID(int=0)
"""Stands in the catalog where a tier is shared by all nodes."""
SHARED_TIERS = frozenset({TierName.DRAGONFLY, TierName.DATABASE})


class ModelSeen(NamedTuple):
    """A model is used by this node. Rows about a model that the catalog does not know are left out of it."""

    fingerprint: Fingerprint
    name: str
    revision: str
    identity: str
    """All that the fingerprint was made from, as a JSON object."""
    at_s: float


class BlocksStored(NamedTuple):
    """Consecutive blocks of a prompt have a copy in a tier now, all of one codec and size."""

    tree: TreeId
    parent: BlockKey
    """Of the first of them."""
    keys: bytes
    depth: int
    """Of the first of them, in blocks from the prompt's start."""
    block_tokens: int
    tier: TierName
    codec: int
    nbytes: int
    """Of each record."""
    at_s: float


class BlocksUsed(NamedTuple):
    """These blocks were read; each counts one hit."""

    keys: bytes
    at_s: float


class BlocksRemoved(NamedTuple):
    """These blocks have no copy in a tier any more, in whatever codec."""

    keys: bytes
    tier: TierName
    reason: str
    at_s: float


class PromptAsked(NamedTuple):
    """A prompt was asked for. `leaf` is the key of its last whole block, or of the tree's root where it has none."""

    tree: TreeId
    leaf: BlockKey
    tokens: int
    embedding: UUID | None
    """The point that stands for it among the vectors."""
    at_s: float


class UsageReport(NamedTuple):
    """What this process has done for one model and tenant since it began: a report replaces the one before."""

    fingerprint: Fingerprint
    tenant: TenantDigest
    asked_blocks: int
    matched_blocks: int
    loaded_blocks: tuple[int, int, int, int, int]
    """By tier, in the order of `TierName`."""
    saved_tokens: int
    saved_prefill_s: float
    at_s: float


class SharedPrefixRow(NamedTuple):
    """A prefix that requests have in common."""

    tree: TreeId
    key: BlockKey
    depth: int
    tokens: int
    hits: int
    nbytes: int


class SharedReport(NamedTuple):
    """The shared prefixes that this node uses most, in place of those that it reported before."""

    prefixes: tuple[SharedPrefixRow, ...]
    at_s: float


class PricesSet(NamedTuple):
    """What resources cost, in whatever currency, as the configuration says it."""

    gpu_hour: float
    ram_gib_month: float
    ssd_gib_month: float
    at_s: float


class TiersCleared(NamedTuple):
    """This node holds nothing in these tiers any more: it began anew, or lost them."""

    tiers: tuple[TierName, ...]
    reason: str
    at_s: float


class TenantErased(NamedTuple):
    """All rows of a tenant's epochs before `epoch` are to go.

    Every node that hears of it reports this after its own reports of those epochs, so that nothing stays of what was
    on its way meanwhile.
    """

    tenant: TenantDigest
    epoch: int


class ModelForgotten(NamedTuple):
    """All rows of a model are to go."""

    fingerprint: Fingerprint


Op: TypeAlias = (
    ModelSeen
    | BlocksStored
    | BlocksUsed
    | BlocksRemoved
    | PromptAsked
    | UsageReport
    | SharedReport
    | PricesSet
    | TiersCleared
    | TenantErased
    | ModelForgotten
)
"""One report."""

Alone: TypeAlias = TiersCleared | TenantErased | ModelForgotten
"""Reports that touch rows without end: each is written by itself, after all that came before it."""


class Batch(NamedTuple):
    """Reports that are written together, once: a session's batches are numbered from 1 on."""

    session: int
    sequence: int
    ops: tuple[Op, ...]


def model_seen(identity: ModelIdentity, at_s: float) -> ModelSeen:
    """The report of a model."""
    fields = {name: getattr(identity, name) for name in identity.__slots__ if name not in ("layout", "fingerprint")}
    fields |= {"layout": asdict(identity.layout), "generation": identity.generation.hex()}
    text = json.dumps(fields, sort_keys=True)
    return ModelSeen(identity.fingerprint, identity.name, identity.revision, text, at_s)


def joined(keys: Iterable[BlockKey]) -> bytes:
    """Keys as reports have them."""
    return b"".join(keys)


def row_count(op: Op) -> int:
    """About how many rows a report writes; at once. A model counts for none: a batch may name it without being told."""
    match op:
        case BlocksStored() | BlocksUsed() | BlocksRemoved():
            return len(op.keys) // KEY_BYTES
        case SharedReport():
            return len(op.prefixes)
        case ModelSeen():
            return 0
        case _:
            return 1


def split(op: Op, most_rows: int) -> tuple[Op, Op | None]:
    """The first so many rows of a report, and the rest of it, if there is one and it can be told apart."""
    at = most_rows * KEY_BYTES
    match op:
        case BlocksStored() if len(op.keys) > at:
            parent = BlockKey(op.keys[at - KEY_BYTES : at])
            rest = op._replace(keys=op.keys[at:], parent=parent, depth=op.depth + most_rows)
            return op._replace(keys=op.keys[:at]), rest
        case BlocksUsed() | BlocksRemoved() if len(op.keys) > at:
            return op._replace(keys=op.keys[:at]), op._replace(keys=op.keys[at:])
        case _:
            return op, None


def held_bytes(op: Op) -> int:
    """About what a report takes in memory; at once."""
    match op:
        case BlocksStored() | BlocksUsed() | BlocksRemoved():
            return _OBJECT_BYTES + len(op.keys)
        case ModelSeen():
            return _OBJECT_BYTES + len(op.identity) + len(op.name)
        case SharedReport():
            return _OBJECT_BYTES * (1 + len(op.prefixes))
        case _:
            return _OBJECT_BYTES


_OBJECT_BYTES = 500
"""Of the tuple, its numbers and the objects that only it refers to."""

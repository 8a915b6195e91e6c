"""What the public calls of a pool take and return: plain frozen values, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from kvpool.api.codec import Codec
from kvpool.blocks.identity import BlockKey, ModelIdentity
from kvpool.config.runtime import QuotaConfig
from kvpool.tiers.tier import TierName


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as it is registered with a pool.

    `prefill_tokens_per_second` is what the engine manages on its hardware, until `Model.observe_prefill` has measured
    it; None: what was measured by an earlier process, or what the pool's configuration says for a model of this name.
    `quotas` count where the configuration has none for the name; all revisions of a name share them. `codecs` stand in
    place of those of the tiers.
    """

    identity: ModelIdentity
    prefill_tokens_per_second: float | None = None
    quotas: Mapping[TierName, QuotaConfig] = field(default_factory=dict)
    codecs: Mapping[TierName, Codec] = field(default_factory=dict)


class LeaseState(StrEnum):
    """How far a lease's fetch from the remote tiers is."""

    PENDING = "pending"
    READY = "ready"
    EXPIRED = "expired"


class Refusal(StrEnum):
    """Why a block was not stored."""

    NO_ROOM = "no-room"
    """Every block that could make room is leased, or the block is larger than the tier."""
    OVER_QUOTA = "over-quota"
    """Its model is at its limit with all that it holds leased, or what others are guaranteed leaves no more to it."""
    INDEX_FULL = "index-full"
    """`ram.indexBytes` is used up by leased blocks."""
    ERASED = "erased"
    """The tenant was erased while the store ran."""


class StoreResult(NamedTuple):
    """Counts of whole blocks. Tokens after the last whole block are never stored and not counted."""

    stored: int
    already_there: int
    refused: Mapping[Refusal, int]


class Verdict(StrEnum):
    """Why a block is a hit or a miss."""

    HELD = "held"
    UNREACHABLE = "unreachable"
    """It has a copy, but a block before it has none: a match stops there."""
    TIER_DOWN = "tier-down"
    """Its only copy lies in a tier that is out, or lay in device memory that was lost."""
    NEVER_STORED = "never-stored"
    EVICTED = "evicted"
    ORPHANED = "orphaned"
    CORRUPT = "corrupt"
    SSD_SEGMENT_FREED = "ssd-segment-freed"
    REFUSED = "refused"
    INDEX_FULL = "index-full"
    ERASED = "erased"
    UNREGISTERED = "unregistered"
    OVER_QUOTA = "over-quota"
    OTHER_FINGERPRINT = "other-fingerprint"
    """The same tokens are held for a model of this name whose weights, revision or layout differ."""
    UNKNOWN = "unknown"
    """Never stored, or lost so long ago that it was forgotten."""


class BlockReport(NamedTuple):
    """What `Model.explain` says of one block. `block` counts from the prompt's start, `at_s` is in unix seconds."""

    block: int
    key: BlockKey
    tiers: tuple[TierName, ...]
    verdict: Verdict
    at_s: float | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EraseReport:
    """What erasing a tenant removed. From `epoch` on nothing stored before can be matched.

    `leased_blocks` are still being read: they go when their leases end, and can be matched by nobody meanwhile. Bytes
    on SSD stay in their segments, unmatchable, until those are freed or written over.

    `blocks` of the shared tiers are those that were removed by now; `pending_tiers` are those where it goes on in the
    background, or that are out now. `unconfirmed_nodes` have not said that they know of it, by name: until they do,
    they may serve what they hold. With a catalog they hear of it within seconds, and before they serve anything where
    they were away. `catalog_told` is False where a catalog is configured and could not be told yet.
    """

    epoch: int
    blocks: Mapping[TierName, int]
    bytes: Mapping[TierName, int]
    leased_blocks: int
    pending_tiers: tuple[TierName, ...] = ()
    unconfirmed_nodes: tuple[str, ...] = ()
    catalog_told: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UnregisterReport:
    """What unregistering a model gave back, per tier.

    `leased_blocks` are still being read: they go when their leases end, and can be matched by nobody meanwhile. What
    lies in shared tiers is other processes' too: it stays, and goes with its time.
    """

    blocks: Mapping[TierName, int]
    bytes: Mapping[TierName, int]
    leased_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadReport:
    """Which fields took effect, and which need the pool to be opened anew; as paths of the configuration."""

    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]

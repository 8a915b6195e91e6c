"""How the cache behaves: compression, sharing, policy, prefetch.

A field that some profile sets has no default here: see `kvpool.config.profiles`.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from kvpool.api.model import Bytes, Flag, Integer, Model, Number
from kvpool.api.quantity import Quantity


class Granularity(StrEnum):
    """How many values share one scale in a lossy codec."""

    AUTO = "auto"
    BLOCK = "block"
    CHANNEL = "channel"


class SharingScope(StrEnum):
    """Who shares prefixes."""

    TENANT = "tenant"
    POOL = "pool"


class Eviction(StrEnum):
    """Which block goes first."""

    LRU = "lru"
    ADAPTIVE = "adaptive"


class Compression(Model):
    """How lossy codecs work; which tier uses one is the tier's `codec`."""

    on_eviction: Flag = Field(True, description="Whether a block may be encoded when it moves down, not before.")
    calibration_samples: Annotated[Integer, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Blocks of a model from which its clip limits are learnt."
    )
    outlier_percentile: Annotated[Number, Field(gt=50, le=100)] | None = Field(
        None,
        description="Share of the values, in percent, that the clip limits of int codecs leave as they are; 100: no "
        "limits, for they were not found to help.",
    )
    granularity: Granularity = Field(
        Granularity.AUTO,
        description="Values that share a scale: the codec's own choice, a whole block's, or a channel's (keys) and a "
        "token's (values).",
    )


class Sharing(Model):
    """Prefixes that several requests have in common. Blocks are never shared between models."""

    enabled: Flag = Field(True, description="Whether shared prefixes are found and protected.")
    scope: SharingScope = Field(
        SharingScope.TENANT,
        description="`tenant`: each tenant for itself. `pool`: all tenants together, who must accept that the time to "
        "the first token tells what others asked before.",
    )
    auto_detect: Flag | None = Field(None, description="Whether a prefix is shared once two requests part after it.")
    min_prefix_tokens: Annotated[Integer, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Tokens that a shared prefix has at least; whole blocks."
    )
    max_shared_bytes: Annotated[Quantity, Bytes()] | None = Field(
        None, description="Bytes of shared blocks that are protected from eviction, at most."
    )
    protect_shared: Flag | None = Field(None, description="Whether shared blocks are evicted after all others.")
    compress_shared: Flag | None = Field(None, description="Whether shared blocks are encoded by a tier's codec too.")


class Promotion(Model):
    """Which faster tiers a block is copied to when a slower one returned it. ram always."""

    dragonfly: Flag = Field(True, description="Whether to dragonfly.")
    gpu_after_hits: Integer = Field(2, ge=1, le=1_000_000, description="To gpu after so many hits.")


class Policy(Model):
    """What goes, what is copied up, what is read ahead."""

    eviction: Eviction = Field(Eviction.ADAPTIVE, description="Which block goes first.")
    promotion: Promotion = Field(Promotion(), description="What is copied to faster tiers.")
    read_ahead: Flag = Field(True, description="Whether the rest of a matched chain is read before it is asked for.")


class Prefetch(Model):
    """Prefixes that are promoted before they are asked for."""

    semantic: Flag = Field(False, description="Whether prompts like earlier ones promote what followed those.")
    max_bytes: Annotated[Quantity, Bytes()] = Field(
        Quantity.parse("1Gi"), description="Bytes of blocks that are promoted and not yet used, at most."
    )

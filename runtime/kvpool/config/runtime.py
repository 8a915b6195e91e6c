"""`RuntimeConfig`: what a pool runs with. Every value is there; bytes, seconds and counts are plain numbers.

Made from a `KVCachePool` by `kvpool.config.runtime_config`; can be written as JSON or YAML and read back unchanged.
Each field names the field of the specification that it comes from, and whether a running pool can take a new value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from kvpool.api.behaviour import Eviction, Granularity, SharingScope
from kvpool.api.codec import Codec
from kvpool.api.model import LABEL, Fault, Flag, Integer, Model, Number, refuse, repeated
from kvpool.api.operation import LogLevel
from kvpool.api.pool import API_VERSION, MAX_BLOCK_TOKENS

GiB, MiB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Origin:
    """Marks a field with its path in the specification, below `spec`."""

    path: str
    live: bool = False
    """Whether a running pool takes a new value without a restart."""


def origin_of(field: FieldInfo) -> Origin | None:
    """Where a field of a runtime model comes from; None for those that a specification does not have."""
    return next((mark for mark in field.metadata if isinstance(mark, Origin)), None)


_Bytes: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
_Size: TypeAlias = Annotated[int, Field(strict=True, ge=1, lt=1 << 63)]
_Seconds: TypeAlias = Annotated[float, Field(strict=True, ge=0)]
_Count: TypeAlias = Annotated[int, Field(strict=True, ge=1)]


class GpuConfig(Model):
    """Tier 1."""

    capacity_bytes: Annotated[_Size, Origin("tiers.gpu.capacity")]
    initial_bytes: Annotated[_Bytes, Origin("tiers.gpu.initialSize")] = 0
    streams: Annotated[_Count, Origin("tiers.gpu.streams")] = 8
    pinned_memory: Annotated[Flag, Origin("tiers.gpu.pinnedMemory")] = True

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GpuConfig":
        if self.initial_bytes > self.capacity_bytes:
            reason = f"is {self.initial_bytes}, above capacityBytes of {self.capacity_bytes}"
            refuse(self, [Fault(("initialBytes",), reason)])
        return self


class RamConfig(Model):
    """Tier 2."""

    capacity_bytes: Annotated[_Size, Origin("tiers.ram.capacity", live=True)] = 8 * GiB
    index_bytes: Annotated[_Size, Origin("tiers.ram.indexBytes", live=True)] = 512 * MiB
    huge_pages: Annotated[Flag, Origin("tiers.ram.hugePages")] = False
    codec: Annotated[Codec, Origin("tiers.ram.codec")] = Codec.NONE


class DragonflyConfig(Model):
    """Tier 3. One of `memory_bytes` (a server of ours) and `secret` (one that runs elsewhere) is None."""

    memory_bytes: Annotated[_Size | None, Origin("tiers.dragonfly.managed.memory")] = None
    secret: Annotated[str | None, Origin("tiers.dragonfly.external.secret")] = None
    codec: Annotated[Codec, Origin("tiers.dragonfly.codec")]
    ttl_s: Annotated[_Seconds, Origin("tiers.dragonfly.ttl", live=True)]
    connections: Annotated[_Count, Origin("tiers.dragonfly.connections")]
    batch_size: Annotated[_Count, Origin("tiers.dragonfly.batchSize", live=True)]
    budget_s: Annotated[_Seconds, Origin("tiers.dragonfly.budget", live=True)]
    tls: Annotated[Flag, Origin("tiers.dragonfly.tls")]


class PostgresConfig(Model):
    """The catalog. `secret` is None for a server of ours."""

    secret: Annotated[str | None, Origin("tiers.database.postgres.external.secret")] = None
    connections: Annotated[_Count, Origin("tiers.database.postgres.connections")]
    tls: Annotated[Flag, Origin("tiers.database.postgres.tls")]


class QdrantConfig(Model):
    """Embeddings. `secret` is None for a server of ours."""

    secret: Annotated[str | None, Origin("tiers.database.qdrant.external.secret")] = None
    tls: Annotated[Flag, Origin("tiers.database.qdrant.tls")]


class DatabaseConfig(Model):
    """Tier 4."""

    postgres: Annotated[PostgresConfig, Origin("tiers.database.postgres")]
    qdrant: Annotated[QdrantConfig | None, Origin("tiers.database.qdrant")] = None
    codec: Annotated[Codec, Origin("tiers.database.codec")]
    inline_max_bytes: Annotated[_Bytes, Origin("tiers.database.inlineMax")]
    inline_bytes: Annotated[_Bytes, Origin("tiers.database.inlineBytes")]
    journal_bytes: Annotated[_Size, Origin("tiers.database.journal")]
    budget_s: Annotated[_Seconds, Origin("tiers.database.budget", live=True)]


class SsdConfig(Model):
    """Tier 5. `daily_write_bytes` None: counted, never refused (a `KVCachePool` cannot say that)."""

    capacity_bytes: Annotated[_Size, Origin("tiers.ssd.capacity", live=True)]
    second_hit: Annotated[Flag, Origin("tiers.ssd.secondHit", live=True)] = True
    daily_write_bytes: Annotated[_Size | None, Origin("tiers.ssd.dailyWrites", live=True)] = 2048 * GiB
    budget_s: Annotated[_Seconds, Origin("tiers.ssd.budget", live=True)] = 0.1
    codec: Annotated[Codec, Origin("tiers.ssd.codec")] = Codec.NONE


class CompressionConfig(Model):
    """How lossy codecs work."""

    on_eviction: Annotated[Flag, Origin("compression.onEviction")] = True
    calibration_samples: Annotated[_Count, Origin("compression.calibrationSamples")] = 1000
    outlier_percentile: Annotated[Number, Field(gt=50, le=100), Origin("compression.outlierPercentile")] = 100
    granularity: Annotated[Granularity, Origin("compression.granularity")] = Granularity.AUTO


class SharingConfig(Model):
    """Prefixes that requests have in common."""

    enabled: Annotated[Flag, Origin("sharing.enabled", live=True)] = True
    scope: Annotated[SharingScope, Origin("sharing.scope")] = SharingScope.TENANT
    auto_detect: Annotated[Flag, Origin("sharing.autoDetect", live=True)] = True
    min_prefix_tokens: Annotated[_Count, Origin("sharing.minPrefixTokens", live=True)] = 64
    max_shared_bytes: Annotated[_Bytes, Origin("sharing.maxSharedBytes", live=True)] = 8 * GiB
    protect_shared: Annotated[Flag, Origin("sharing.protectShared", live=True)] = True
    compress_shared: Annotated[Flag, Origin("sharing.compressShared", live=True)] = False


class PolicyConfig(Model):
    """What goes, what is copied up, what is read ahead."""

    eviction: Annotated[Eviction, Origin("policy.eviction")] = Eviction.ADAPTIVE
    promote_to_dragonfly: Annotated[Flag, Origin("policy.promotion.dragonfly", live=True)] = True
    gpu_after_hits: Annotated[_Count, Origin("policy.promotion.gpuAfterHits", live=True)] = 2
    read_ahead: Annotated[Flag, Origin("policy.readAhead", live=True)] = True


class PrefetchConfig(Model):
    """What is promoted before it is asked for."""

    semantic: Annotated[Flag, Origin("prefetch.semantic")] = False
    max_bytes: Annotated[_Bytes, Origin("prefetch.maxBytes", live=True)] = GiB


class TelemetryConfig(Model):
    """What the runtime reports. `tracing_endpoint` empty: no traces."""

    log_level: Annotated[LogLevel, Origin("telemetry.logLevel", live=True)] = LogLevel.INFO
    tracing_endpoint: Annotated[str, Origin("telemetry.tracing.endpoint")] = ""
    tracing_sample_ratio: Annotated[Number, Field(ge=0, le=1), Origin("telemetry.tracing.sampleRatio")] = 0.01


class PricesConfig(Model):
    """What resources cost, for the metric of money saved."""

    gpu_hour: Annotated[Number, Field(ge=0), Origin("prices.gpuHour", live=True)] = 2.5
    ram_gib_month: Annotated[Number, Field(ge=0), Origin("prices.ramGiBMonth", live=True)] = 3.9
    ssd_gib_month: Annotated[Number, Field(ge=0), Origin("prices.ssdGiBMonth", live=True)] = 0.2


class QuotaConfig(Model):
    """A model's share of one tier, in encoded bytes. `limit_bytes` None: the tier's capacity."""

    guaranteed_bytes: Annotated[_Bytes, Origin("guaranteed", live=True)] = 0
    limit_bytes: Annotated[_Bytes | None, Origin("limit", live=True)] = None

    @model_validator(mode="after")
    def _the_guarantee_is_within_the_limit(self) -> "QuotaConfig":
        if self.limit_bytes is not None and self.limit_bytes < self.guaranteed_bytes:
            reason = f"is {self.limit_bytes}, below guaranteedBytes of {self.guaranteed_bytes}"
            refuse(self, [Fault(("limitBytes",), reason)])
        return self


QuotaTier: TypeAlias = Literal["gpu", "ram", "dragonfly", "database", "ssd"]


class ModelConfig(Model):
    """A model with quotas, or with a known speed. `quotas` by the tier's name; a tier that is absent has none."""

    name: Annotated[str, Field(min_length=1)]
    quotas: Mapping[QuotaTier, QuotaConfig] = {}
    prefill_tokens_per_second: Annotated[
        Annotated[Number, Field(gt=0)] | None, Origin("prefillTokensPerSecond", live=True)
    ] = None


class RuntimeConfig(Model):
    """Everything that a pool needs to know before it opens.

    `directory` None: `default_directory(name)`. `secret_file` holds the 32 bytes that pools which share blocks have in
    common; None: the directory's own. `services` has a folder for each Secret by which a tier is reached (see
    `kvpool.config.service`), named as the Secret is; None: `services` in the pool's directory.
    """

    api_version: Literal["kvpool.dev/v1alpha1"] = API_VERSION
    kind: Literal["RuntimeConfig"] = "RuntimeConfig"
    name: Annotated[str, Field(min_length=1, max_length=30, pattern=LABEL)]
    directory: Path | None = None
    secret_file: Path | None = None
    services: Path | None = None
    block_tokens: Annotated[Integer, Field(ge=1, le=MAX_BLOCK_TOKENS), Origin("blockTokens")] = 64
    gpu: Annotated[GpuConfig | None, Origin("tiers.gpu")] = None
    ram: Annotated[RamConfig, Origin("tiers.ram")] = RamConfig()
    dragonfly: Annotated[DragonflyConfig | None, Origin("tiers.dragonfly")] = None
    database: Annotated[DatabaseConfig | None, Origin("tiers.database")] = None
    ssd: Annotated[SsdConfig | None, Origin("tiers.ssd")] = None
    compression: Annotated[CompressionConfig, Origin("compression")] = CompressionConfig()
    sharing: Annotated[SharingConfig, Origin("sharing")] = SharingConfig()
    policy: Annotated[PolicyConfig, Origin("policy")] = PolicyConfig()
    prefetch: Annotated[PrefetchConfig, Origin("prefetch")] = PrefetchConfig()
    models: tuple[ModelConfig, ...] = ()
    telemetry: Annotated[TelemetryConfig, Origin("telemetry")] = TelemetryConfig()
    prices: Annotated[PricesConfig, Origin("prices")] = PricesConfig()

    @model_validator(mode="after")
    def _quotas_can_be_kept(self) -> "RuntimeConfig":
        refuse(self, [*repeated(("models",), [model.name for model in self.models], "name"), *self._quota_faults()])
        return self

    def _quota_faults(self) -> Iterator[Fault]:
        left = {"gpu": self.gpu, "ram": self.ram, "ssd": self.ssd}
        room = {tier: config.capacity_bytes for tier, config in left.items() if config is not None}
        for index, model in enumerate(self.models):
            for tier, quota in model.quotas.items():
                path = ("models", index, "quotas", tier)
                if getattr(self, tier) is None:
                    yield Fault(path, "is for a tier that this configuration does not have")
                elif tier not in left and quota.guaranteed_bytes:
                    yield Fault((*path, "guaranteedBytes"), "must be 0: this tier takes a limit only")
                elif tier in left:
                    room[tier] -= quota.guaranteed_bytes
                    if room[tier] < 0:
                        reason = f"brings what is guaranteed in {tier} to {-room[tier]} bytes above capacityBytes"
                        yield Fault((*path, "guaranteedBytes"), reason)

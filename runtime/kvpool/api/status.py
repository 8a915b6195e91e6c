"""`status` of a `KVCachePool`: what the operator saw. Nothing in it configures anything."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from kvpool.api.model import Bytes, Integer, Model, Number
from kvpool.api.quantity import Quantity

_Used = Annotated[Quantity, Bytes()]
_Ratio = Annotated[Number, Field(ge=0, le=1)]
_Count = Annotated[Integer, Field(ge=0)]


class ConditionType(StrEnum):
    """What a condition is about."""

    READY = "Ready"
    PROGRESSING = "Progressing"
    DEGRADED = "Degraded"
    RECONCILED = "Reconciled"


class ConditionStatus(StrEnum):
    """Whether it is so."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class ConditionReason(StrEnum):
    """Why a condition is as it is. Names stay; new ones may be added."""

    # Ready
    ALL_TIERS_READY = "AllTiersReady"
    TIERS_NOT_READY = "TiersNotReady"
    # Progressing
    UP_TO_DATE = "UpToDate"
    ROLLING_OUT = "RollingOut"
    WAITING_FOR_CONFIGURATION = "WaitingForConfiguration"
    GROWING_VOLUMES = "GrowingVolumes"
    PROMOTING_REPLICA = "PromotingReplica"
    REPLACING_LOST_VOLUME = "ReplacingLostVolume"
    # Degraded
    NORMAL = "Normal"
    GPU_UNAVAILABLE = "GpuUnavailable"
    DRAGONFLY_UNAVAILABLE = "DragonflyUnavailable"
    POSTGRES_UNAVAILABLE = "PostgresUnavailable"
    QDRANT_UNAVAILABLE = "QdrantUnavailable"
    SSD_UNAVAILABLE = "SsdUnavailable"
    SEVERAL_TIERS_UNAVAILABLE = "SeveralTiersUnavailable"
    MEMORY_ONLY = "MemoryOnly"
    # Reconciled
    APPLIED = "Applied"
    INVALID_SPEC = "InvalidSpec"
    APPLY_FAILED = "ApplyFailed"
    FIELD_CONTESTED = "FieldContested"
    NO_STORAGE_CLASS = "NoStorageClass"
    SECRET_MISSING = "SecretMissing"  # noqa: S105 - no secret, a reason
    SECRET_NOT_LABELLED = "SecretNotLabelled"  # noqa: S105 - no secret, a reason
    UPGRADE_REFUSED = "UpgradeRefused"


class Degradation(StrEnum):
    """A tier, or a part of one, that is out."""

    NO_GPU = "no-gpu"
    NO_DRAGONFLY = "no-dragonfly"
    NO_POSTGRES = "no-postgres"
    NO_QDRANT = "no-qdrant"
    NO_SSD = "no-ssd"


class TierMode(StrEnum):
    """How a tier is doing."""

    NORMAL = "normal"
    DEGRADED = "degraded"
    OUT = "out"


class Condition(Model):
    """A condition as Kubernetes has them."""

    type: ConditionType = Field(description="What it is about.")
    status: ConditionStatus = Field(description="Whether it is so.")
    reason: ConditionReason = Field(description="Why, for programs.")
    message: str = Field("", max_length=32768, description="Why, for people.")
    last_transition_time: str | None = Field(None, max_length=64, description="When `status` last changed (RFC 3339).")
    observed_generation: _Count | None = Field(None, description="The generation that it was seen in.")


class TierStatus(Model):
    """One tier, over all pods."""

    ready: _Count = Field(0, description="Pods or servers that work.")
    desired: _Count = Field(0, description="Pods or servers that there should be.")
    capacity: _Used | None = Field(None, description="Bytes that it may use.")
    used: _Used | None = Field(None, description="Bytes that it uses.")
    hit_ratio: _Ratio | None = Field(None, description="Share of the blocks asked of it that it had.")
    mode: TierMode = Field(TierMode.NORMAL, description="Whether all of it, some or none works.")
    last_error: str | None = Field(None, max_length=1024, description="The last thing that went wrong.")


class TierStatuses(Model):
    """The tiers that the pool has."""

    gpu: TierStatus | None = Field(None, description="Device memory.")
    ram: TierStatus | None = Field(None, description="Host memory.")
    dragonfly: TierStatus | None = Field(None, description="The shared server of the Redis protocol.")
    database: TierStatus | None = Field(None, description="PostgreSQL and Qdrant.")
    ssd: TierStatus | None = Field(None, description="Segment files on disk.")


class QuotaStatus(Model):
    """What a model uses of a tier, against its quota."""

    used: _Used = Field(Quantity.parse("0"), description="Encoded bytes that it uses.")
    guaranteed: _Used | None = Field(None, description="Bytes that no other model can take.")
    limit: _Used | None = Field(None, description="Bytes that it may use at most.")


class QuotaStatuses(Model):
    """What a model uses of each tier."""

    gpu: QuotaStatus | None = Field(None, description="Of device memory.")
    ram: QuotaStatus | None = Field(None, description="Of host memory.")
    dragonfly: QuotaStatus | None = Field(None, description="Of the shared server.")
    database: QuotaStatus | None = Field(None, description="Of the records in PostgreSQL.")
    ssd: QuotaStatus | None = Field(None, description="Of the disk.")


class ModelStatus(Model):
    """One model."""

    name: str = Field(min_length=1, max_length=253, description="Its name in the spec.")
    quotas: QuotaStatuses = Field(QuotaStatuses(), description="Used bytes against its quotas.")
    hit_ratio: _Ratio | None = Field(None, description="Share of its blocks asked for that were served.")
    ready: _Count | None = Field(None, description="Serving pods that work.")
    desired: _Count | None = Field(None, description="Serving pods that there should be.")


class EffectiveValue(Model):
    """A setting as it is in effect."""

    path: str = Field(max_length=512, description="The field, `spec.tiers.ram.capacity`.")
    value: str = Field(max_length=4096, description="Its value.")
    source: str = Field(max_length=64, description="Where that comes from: pool, profile NAME, or default.")


class PoolStatus(Model):
    """What the operator saw, last time something worth reading changed."""

    observed_generation: _Count | None = Field(None, description="The generation of the spec that this is about.")
    conditions: tuple[Condition, ...] = Field(
        (), max_length=16, description="Ready, Progressing, Degraded, Reconciled."
    )
    degradations: tuple[Degradation, ...] = Field((), max_length=8, description="What is out; none means normal.")
    tiers: TierStatuses = Field(TierStatuses(), description="Per tier.")
    models: tuple[ModelStatus, ...] = Field((), max_length=64, description="Per model.")
    effective: tuple[EffectiveValue, ...] = Field(
        (), max_length=4096, description="Settings in effect, each with where its value comes from."
    )
    replicas: _Count | None = Field(None, description="Cache nodes that there are, for the scale subresource.")
    selector: str | None = Field(None, max_length=512, description="Labels of the cache nodes, for the same.")

"""The five tiers of `spec.tiers`. One that is absent does not exist, except ram, which every pool has.

A field that some profile sets has no default here: absent means the profile's value, then the built-in default, both
of which are in `kvpool.config.profiles`.
"""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from kvpool.api.codec import Codec
from kvpool.api.cron import checked_schedule
from kvpool.api.duration import Duration
from kvpool.api.model import Bytes, Fault, Flag, Integer, Model, Name, Span, exactly_one, refuse
from kvpool.api.quantity import Quantity
from kvpool.api.workload import PodSettings

_BUDGET = Span("1ms", "1m")
_SAME_CODEC = "How blocks are encoded in this tier."
_CONNECTIONS = "Connections that each runtime process keeps, at most."


class SecretReference(Model):
    """Something that runs elsewhere."""

    secret: Name = Field(
        description="Secret with address and credentials, in the pool's namespace, labelled kvpool.dev/pool: NAME."
    )


class GpuTier(Model):
    """Tier 1: device memory, ready for attention. In a vLLM pod it is vLLM's own cache, sized by `capacity`."""

    capacity: Annotated[Quantity, Bytes("64Mi")] | None = Field(None, description="Device memory per pod, at most.")
    initial_size: Annotated[Quantity, Bytes("0")] | None = Field(
        None, description="What is taken at start; the rest when it is needed. At most the capacity."
    )
    streams: Annotated[Integer, Field(ge=1, le=64)] | None = Field(
        None, description="CUDA streams that copy beside the engine's compute."
    )
    pinned_memory: Flag | None = Field(None, description="Whether copies go through page-locked host memory.")
    unified_memory: Flag = Field(False, description="Refused when true; see the message.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GpuTier":
        faults = []
        if self.capacity is not None and self.initial_size is not None and self.initial_size > self.capacity:
            reason = f"is {self.initial_size}, above the tier's capacity of {self.capacity}"
            faults.append(Fault(("initialSize",), reason, (("capacity",),)))
        if self.unified_memory:
            faults.append(
                Fault(
                    ("unifiedMemory",),
                    "cannot be true: with unified memory the driver moves pages between device and host as it likes, "
                    "so that neither capacities nor quotas of gpu and ram could be kept; leave it false",
                )
            )
        refuse(self, faults)
        return self


class RamTier(Model):
    """Tier 2: host memory of each pod. Pinned when there is a GPU."""

    capacity: Annotated[Quantity, Bytes("16Mi")] = Field(
        Quantity.parse("8Gi"), description="Host memory per pod for blocks, at most."
    )
    codec: Codec | None = Field(None, description=_SAME_CODEC)
    huge_pages: Flag = Field(False, description="Whether to ask the kernel for 2 MiB pages.")
    index_bytes: Annotated[Quantity, Bytes("1Mi")] = Field(
        Quantity.parse("512Mi"),
        description="Host memory for the prefix index, beside the capacity, at most. "
        "What the adaptive policy remembers comes on top: up to about 32Mi per model.",
    )


class ManagedDragonfly(PodSettings):
    """Dragonfly as a StatefulSet of ours; on one machine, a Redis-protocol server that `kvpool run` starts."""

    replicas: Integer = Field(2, ge=1, le=16, description="Pods: one master, the others its replicas.")
    memory: Annotated[Quantity, Bytes("256Mi")] = Field(
        Quantity.parse("8Gi"), description="Memory for values, per pod. Dragonfly needs 256Mi per thread."
    )


class DragonflyTier(Model):
    """Tier 3: a server of the Redis protocol that all pods share."""

    managed: ManagedDragonfly | None = Field(None, description="Run by us. Exactly one of managed and external.")
    external: SecretReference | None = Field(None, description="A Dragonfly, Valkey or Redis that runs elsewhere.")
    codec: Codec | None = Field(None, description=_SAME_CODEC)
    ttl: Annotated[Duration, Span("1s", "8760h")] | None = Field(
        None, description="How long a block is kept after it was last written."
    )
    connections: Annotated[Integer, Field(ge=1, le=1000)] | None = Field(None, description=_CONNECTIONS)
    batch_size: Annotated[Integer, Field(ge=1, le=10_000)] | None = Field(
        None, description="Blocks per pipelined request, at most."
    )
    budget: Annotated[Duration, _BUDGET] = Field(
        Duration.parse("50ms"), description="Time without progress after which a request is given up."
    )
    tls: Flag = Field(False, description="Whether connections are encrypted.")

    @model_validator(mode="after")
    def _runs_in_one_place(self) -> "DragonflyTier":
        refuse(self, exactly_one(self, ("managed", "external")))
        return self


class Backup(Model):
    """Regular dumps of the catalog, to a volume of their own."""

    schedule: Annotated[str, AfterValidator(checked_schedule)] = Field(
        "0 3 * * *", max_length=100, description="When: a cron schedule as Kubernetes' CronJob takes it."
    )
    keep: Integer = Field(7, ge=1, le=365, description="Dumps that are kept.")
    storage: Annotated[Quantity, Bytes("64Mi")] | None = Field(
        None, description="Volume for the dumps; absent means as large as the database's own."
    )
    storage_class_name: Name | None = Field(None, description="StorageClass; absent means the database's own.")


class ManagedPostgres(PodSettings):
    """PostgreSQL as a StatefulSet of one pod; on one machine, an embedded server."""

    storage: Annotated[Quantity, Bytes("256Mi")] = Field(Quantity.parse("20Gi"), description="Size of its volume.")
    storage_class_name: Name | None = Field(None, description="StorageClass; absent means the cluster's default.")
    backup: Backup | None = Field(None, description="Regular dumps; absent means none.")


class Postgres(Model):
    """The catalog, and small records."""

    managed: ManagedPostgres | None = Field(None, description="Run by us. Exactly one of managed and external.")
    external: SecretReference | None = Field(None, description="A PostgreSQL that runs elsewhere.")
    connections: Annotated[Integer, Field(ge=1, le=1000)] | None = Field(None, description=_CONNECTIONS)
    tls: Flag = Field(False, description="Whether connections are encrypted.")

    @model_validator(mode="after")
    def _runs_in_one_place(self) -> "Postgres":
        refuse(self, exactly_one(self, ("managed", "external")))
        return self


class ManagedQdrant(PodSettings):
    """Qdrant as a StatefulSet; on one machine, embedded in the process."""

    storage: Annotated[Quantity, Bytes("256Mi")] = Field(Quantity.parse("20Gi"), description="Size of each volume.")
    storage_class_name: Name | None = Field(None, description="StorageClass; absent means the cluster's default.")
    replicas: Integer = Field(1, ge=1, le=16, description="Pods, and copies of each collection.")


class Qdrant(Model):
    """Embeddings of prompts, for semantic prefetch."""

    managed: ManagedQdrant | None = Field(None, description="Run by us. Exactly one of managed and external.")
    external: SecretReference | None = Field(None, description="A Qdrant that runs elsewhere.")
    tls: Flag = Field(False, description="Whether connections are encrypted.")

    @model_validator(mode="after")
    def _runs_in_one_place(self) -> "Qdrant":
        refuse(self, exactly_one(self, ("managed", "external")))
        return self


class DatabaseTier(Model):
    """Tier 4: PostgreSQL for the catalog and small records, Qdrant for embeddings."""

    postgres: Postgres = Field(description="The catalog, and small records.")
    qdrant: Qdrant | None = Field(None, description="Embeddings of prompts; needed for semantic prefetch only.")
    codec: Codec | None = Field(None, description=_SAME_CODEC)
    inline_max: Annotated[Quantity, Bytes("0", "64Mi")] = Field(
        Quantity.parse("2Mi"), description="The largest encoded record that is kept in PostgreSQL."
    )
    inline_bytes: Annotated[Quantity, Bytes("0")] = Field(
        Quantity.parse("4Gi"), description="Encoded records in PostgreSQL, all together, at most."
    )
    journal: Annotated[Quantity, Bytes("1Mi")] = Field(
        Quantity.parse("1Gi"), description="Rows kept on disk per pod while PostgreSQL is away, at most."
    )
    budget: Annotated[Duration, _BUDGET] = Field(
        Duration.parse("100ms"), description="Time without progress after which a request is given up."
    )

    @model_validator(mode="after")
    def _one_record_fits(self) -> "DatabaseTier":
        if self.inline_max > self.inline_bytes:
            reason = f"is {self.inline_max}, above inlineBytes of {self.inline_bytes}: not one such record would fit"
            refuse(self, [Fault(("inlineMax",), reason, (("inlineBytes",),))])
        return self


class SsdTier(Model):
    """Tier 5: segment files on a disk of each pod."""

    NOT_FIELDS: ClassVar[dict[str, str]] = {
        "directory": "kvpool run and Pool.open are told the directory; on Kubernetes it is the pod's volume"
    }

    capacity: Annotated[Quantity, Bytes("64Mi")] = Field(
        description="Disk space per pod, at most: padding, dead records and one spare segment included."
    )
    storage_class_name: Name | None = Field(None, description="StorageClass; absent means the cluster's default.")
    codec: Codec | None = Field(None, description=_SAME_CODEC)
    second_hit: Flag = Field(True, description="Whether a block is written only once it was asked for a second time.")
    daily_writes: Annotated[Quantity, Bytes("64Mi")] = Field(
        Quantity.parse("2Ti"), description="Bytes written per pod and UTC day, at most, so that the disk lasts."
    )
    budget: Annotated[Duration, _BUDGET] = Field(
        Duration.parse("100ms"), description="Time without progress after which a read is given up."
    )
    node_loss_timeout: Annotated[Duration, Span("0s", "168h")] = Field(
        Duration.parse("10m"), description="How long a volume's node may be away until its pod starts afresh elsewhere."
    )


class Tiers(Model):
    """The tiers that the pool has."""

    gpu: GpuTier | None = Field(None, description="Device memory.")
    ram: RamTier = Field(RamTier(), description="Host memory; every pool has it.")
    dragonfly: DragonflyTier | None = Field(None, description="A shared server of the Redis protocol.")
    database: DatabaseTier | None = Field(None, description="PostgreSQL and Qdrant.")
    ssd: SsdTier | None = Field(None, description="Segment files on disk.")

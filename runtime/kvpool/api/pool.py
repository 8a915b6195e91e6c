"""`KVCachePool` v1alpha1: the one specification, for the CRD, the operator and the runtime.

Rules between fields are checked here as far as the fields are given; `kvpool.config` checks them again once profiles
and defaults are filled in.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Final, Literal

from pydantic import ConfigDict, Field, model_validator

from kvpool.api.behaviour import Compression, Policy, Prefetch, Sharing
from kvpool.api.model import LABEL, Fault, Integer, Model, refuse, repeated
from kvpool.api.models import PoolModel, Quota
from kvpool.api.operation import Monitoring, Network, OnDelete, Prices, Telemetry, Tenants
from kvpool.api.quantity import Quantity
from kvpool.api.status import PoolStatus
from kvpool.api.tiers import Tiers
from kvpool.api.workload import Runtime

API_VERSION: Final = "kvpool.dev/v1alpha1"
KIND: Final = "KVCachePool"
MAX_BLOCK_TOKENS = 512
"""A block's token ids must fit the record's header page."""


class Profile(StrEnum):
    """Sets of defaults from the tuning guide."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    MEMORY_SAVER = "memory-saver"
    CHAT = "chat"
    VARIED = "varied"


class PoolSpec(Model):
    """What the pool should be."""

    profiles: tuple[Profile, ...] = Field(
        (),
        max_length=8,
        description="Sets of defaults, in order; later ones win, and any field that is set wins over all.",
    )
    block_tokens: Integer = Field(64, ge=1, le=MAX_BLOCK_TOKENS, description="Tokens per block, the unit that moves.")
    runtime: Runtime = Field(Runtime(), description="Cache nodes.")
    tiers: Tiers = Field(Tiers(), description="The tiers that the pool has.")
    compression: Compression = Field(Compression(), description="How lossy codecs work.")
    sharing: Sharing = Field(Sharing(), description="Prefixes that requests have in common.")
    policy: Policy = Field(Policy(), description="What goes, what is copied up, what is read ahead.")
    prefetch: Prefetch = Field(Prefetch(), description="Prefixes promoted before they are asked for.")
    models: tuple[PoolModel, ...] = Field((), max_length=64, description="Models with quotas or pods of their own.")
    tenants: Tenants = Field(Tenants(), description="Who may use the pool.")
    telemetry: Telemetry = Field(Telemetry(), description="What the runtime says of itself.")
    monitoring: Monitoring = Field(Monitoring(), description="What is made for Prometheus and Grafana.")
    network: Network = Field(Network(), description="Network policies.")
    prices: Prices = Field(Prices(), description="What resources cost.")
    on_delete: OnDelete = Field(OnDelete(), description="What stays when the pool is deleted.")

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "PoolSpec":
        faults = [
            *repeated(("profiles",), self.profiles),
            *repeated(("models",), [model.name for model in self.models], "name"),
            *self._prefix_faults(),
            *self._prefetch_faults(),
            *self._quota_faults(),
        ]
        refuse(self, faults)
        return self

    def _prefix_faults(self) -> Iterator[Fault]:
        tokens = self.sharing.min_prefix_tokens
        if tokens is not None and tokens % self.block_tokens:
            least = max(tokens // self.block_tokens, 1) * self.block_tokens
            reason = f"is {tokens}; prefixes are shared in whole blocks of {self.block_tokens} tokens, so {least} or "
            yield Fault(("sharing", "minPrefixTokens"), f"{reason}{least + self.block_tokens}", (("blockTokens",),))

    def _prefetch_faults(self) -> Iterator[Fault]:
        if self.prefetch.semantic and (self.tiers.database is None or self.tiers.database.qdrant is None):
            yield Fault(
                ("prefetch", "semantic"), "needs spec.tiers.database.qdrant, which finds similar prompts; add it"
            )

    def _quota_faults(self) -> Iterator[Fault]:
        for tier in ("gpu", "ram", "dragonfly", "database", "ssd"):
            quotas = {i: getattr(m.quotas, tier) for i, m in enumerate(self.models) if getattr(m.quotas, tier)}
            if getattr(self.tiers, tier) is None:
                for index in quotas:
                    reason = f"is for a tier that the pool does not have; add spec.tiers.{tier}, or remove the quota"
                    yield Fault(("models", index, "quotas", tier), reason)
            elif tier in ("gpu", "ram", "ssd"):
                yield from self._guarantee_faults(tier, quotas)

    def _guarantee_faults(self, tier: str, quotas: Mapping[int, Quota]) -> Iterator[Fault]:
        capacity: Quantity | None = getattr(self.tiers, tier).capacity
        total = Quantity.of_bytes(0)
        for index, quota in quotas.items():
            total = Quantity.of_bytes(total.value + quota.guaranteed.value)
            if capacity is not None and total > capacity:
                reason = f"brings what is guaranteed in {tier} to {total}, above the tier's capacity of {capacity}"
                path = ("models", index, "quotas", tier, "guaranteed")
                yield Fault(
                    path, f"{reason}; lower it, or raise spec.tiers.{tier}.capacity", (("tiers", tier, "capacity"),)
                )
                return


class Metadata(Model):
    """The object's name. All else that the API server keeps here is not read."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1, max_length=30, pattern=LABEL, description="The pool's name, at most 30 characters.")
    namespace: str | None = Field(None, max_length=63, pattern=LABEL, description="Its namespace on Kubernetes.")
    labels: Mapping[str, str] = Field({}, description="Labels.")
    annotations: Mapping[str, str] = Field({}, description="Annotations.")
    uid: str | None = Field(None, description="Set by the API server.")
    generation: Integer | None = Field(None, description="Set by the API server: counts changes of the spec.")


class KVCachePool(Model):
    """A pool: what `kubectl apply -f pool.yaml` and `kvpool run pool.yaml` take."""

    api_version: Literal["kvpool.dev/v1alpha1"] = Field(description="The version of this specification.")
    kind: Literal["KVCachePool"] = Field(description="What this object is.")
    metadata: Metadata = Field(description="The object's name.")
    spec: PoolSpec = Field(PoolSpec(), description="What the pool should be.")
    status: PoolStatus | None = Field(None, description="What the operator saw; not read from files.")

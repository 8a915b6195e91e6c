"""`spec.models[].serving`: inference pods that the operator runs, with the cache in them."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from kvpool.api.duration import Duration
from kvpool.api.model import NO_BLANKS, Bytes, Fault, Integer, Model, Name, Span, exactly_one, refuse
from kvpool.api.quantity import Quantity
from kvpool.api.workload import GpuRequest, Image, PodSettings

_OURS = {"--kv-transfer-config": "it joins the engine to this pool", "--port": "use the field port"}
"""Engine arguments that the operator sets, each with what to say when a user sets it."""


class Engine(StrEnum):
    """The inference engines that the operator can run."""

    VLLM = "vllm"


class CachePlace(StrEnum):
    """Where the cache of a serving pod runs."""

    EMBEDDED = "embedded"
    SIDECAR = "sidecar"


class Hub(Model):
    """Weights of a Hugging Face repository."""

    repo: str = Field(min_length=1, max_length=253, pattern=NO_BLANKS, description="Repository, `owner/name`.")
    revision: str | None = Field(
        None, min_length=1, max_length=253, pattern=NO_BLANKS, description="Branch, tag or commit; absent means main."
    )
    token_secret: Name | None = Field(
        None, description="Secret with the hub's token under the key `token`, labelled kvpool.dev/pool: NAME."
    )


class Volume(Model):
    """Weights on a volume that exists."""

    claim_name: Name = Field(description="PersistentVolumeClaim, in the pool's namespace.")
    path: str = Field("", max_length=1024, description="Directory of the weights on it; absent means its root.")


class WeightsImage(Model):
    """Weights in a container image; an init container copies them."""

    reference: Image = Field(description="The image.")
    path: str = Field("/models", max_length=1024, description="Directory of the weights in it.")


class Weights(Model):
    """Where a serving pod gets the model's weights. Exactly one of hub, pvc and image."""

    hub: Hub | None = Field(None, description="A Hugging Face repository.")
    pvc: Volume | None = Field(None, description="A volume that exists.")
    image: WeightsImage | None = Field(None, description="A container image.")
    cache_size: Annotated[Quantity, Bytes("64Mi")] | None = Field(
        None, description="Volume per pod that keeps the weights of hub or image; larger than the weights."
    )
    storage_class_name: Name | None = Field(None, description="StorageClass of it; absent means the cluster's default.")

    @model_validator(mode="after")
    def _there_is_one_source_and_room_for_it(self) -> "Weights":
        faults = exactly_one(self, ("hub", "pvc", "image"))
        if not faults and self.pvc is None and self.cache_size is None:
            faults.append(Fault(("cacheSize",), "is missing: the size of the volume that keeps the weights"))
        if self.pvc is not None and self.cache_size is not None:
            faults.append(Fault(("cacheSize",), "must be absent with pvc: the weights stay on that volume"))
        refuse(self, faults)
        return self


class ServingGpu(GpuRequest):
    """GPUs of one serving pod."""

    count: Integer = Field(1, ge=0, le=64, description="GPUs per pod; the engine is tensor parallel over them.")


class Serving(PodSettings):
    """A StatefulSet of inference pods."""

    engine: Engine = Field(Engine.VLLM, description="The inference engine.")
    replicas: Integer = Field(1, ge=0, le=1000, description="Pods.")
    gpu: ServingGpu = Field(ServingGpu(), description="GPUs of a pod; one by default.")
    model: Weights = Field(description="Where the weights are.")
    cache: CachePlace = Field(
        CachePlace.EMBEDDED, description="In the engine's process, or beside it in the pod (several GPUs need that)."
    )
    args: tuple[str, ...] = Field((), max_length=128, description="More arguments of the engine.")
    port: Integer = Field(8000, ge=1024, le=65535, description="Port of the engine's API.")
    startup_timeout: Annotated[Duration, Span("10s", "24h")] = Field(
        Duration.parse("20m"), description="How long a pod may take to fetch and load the weights."
    )
    shared_memory: Annotated[Quantity, Bytes("64Mi")] = Field(
        Quantity.parse("2Gi"), description="Size of /dev/shm where the engine runs on several GPUs."
    )

    @model_validator(mode="after")
    def _our_arguments_are_ours(self) -> "Serving":
        faults = []
        for index, argument in enumerate(self.args):
            name = argument.partition("=")[0].replace("_", "-")
            if name in _OURS:
                faults.append(Fault(("args", index), f"must not set {name}: {_OURS[name]}"))
        if self.gpu.count > 1 and self.cache is CachePlace.EMBEDDED:
            reason = f"must be sidecar with gpu.count {self.gpu.count}: one process per GPU, and one cache for all"
            faults.append(Fault(("cache",), reason, (("gpu", "count"),)))
        refuse(self, faults)
        return self

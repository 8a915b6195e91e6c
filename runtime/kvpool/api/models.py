"""`spec.models`: what each model may use of each tier, and the inference pods that the operator runs for it."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from kvpool.api.model import NO_BLANKS, Bytes, Fault, Model, Number, refuse
from kvpool.api.quantity import Quantity
from kvpool.api.serving import Serving

_ONLY_A_LIMIT = "this tier takes a limit only, for all pods share it and it evicts by its own rules"


class Quota(Model):
    """A model's share of a tier that each pod has for itself, in encoded bytes."""

    guaranteed: Annotated[Quantity, Bytes()] = Field(
        Quantity.parse("0"), description="Bytes that no other model can take."
    )
    limit: Annotated[Quantity, Bytes()] | None = Field(
        None, description="Bytes that it may use at most; absent means the tier's capacity."
    )

    @model_validator(mode="after")
    def _the_guarantee_is_within_the_limit(self) -> "Quota":
        if self.limit is not None and self.limit < self.guaranteed:
            reason = f"is {self.limit}, below guaranteed of {self.guaranteed}; it must be at least that"
            refuse(self, [Fault(("limit",), reason, (("guaranteed",),))])
        return self


class SharedTierQuota(Model):
    """A model's share of a tier that all pods have in common, in encoded bytes."""

    NOT_FIELDS: ClassVar[dict[str, str]] = {"guaranteed": _ONLY_A_LIMIT}

    limit: Annotated[Quantity, Bytes()] | None = Field(
        None, description="Bytes that it may use at most, over all pods; absent means the tier's capacity."
    )


class Quotas(Model):
    """A model's share of each tier; a tier that is absent is shared without rules."""

    gpu: Quota | None = Field(None, description="Of device memory, per pod.")
    ram: Quota | None = Field(None, description="Of host memory, per pod.")
    dragonfly: SharedTierQuota | None = Field(None, description="Of the shared server.")
    database: SharedTierQuota | None = Field(None, description="Of the records in PostgreSQL.")
    ssd: Quota | None = Field(None, description="Of the disk, per pod; live records are counted.")


class PoolModel(Model):
    """A model whose blocks the pool keeps."""

    name: str = Field(
        min_length=1, max_length=253, pattern=NO_BLANKS, description="The model's name, as the engine gives it."
    )
    quotas: Quotas = Field(Quotas(), description="Its share of each tier.")
    prefill_tokens_per_second: Annotated[Number, Field(gt=0, le=1e9)] | None = Field(
        None, description="How fast it computes a prompt, until that is measured; absent means unknown: always ask."
    )
    serving: Serving | None = Field(None, description="Inference pods with the cache in them; absent means none.")

    @model_validator(mode="after")
    def _a_gpu_quota_can_be_kept(self) -> "PoolModel":
        if self.serving is not None and self.quotas.gpu is not None:
            reason = "cannot be kept: a serving pod's gpu tier is its engine's own cache, and all of it is this model's"
            refuse(self, [Fault(("quotas", "gpu"), f"{reason}; remove it")])
        return self

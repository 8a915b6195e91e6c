"""What a user may say of the pods that the operator makes: image, resources, placement, environment."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from kvpool.api.model import ENV_NAME, NO_BLANKS, Amount, Fault, Integer, Model, Name, refuse, repeated

Image = Annotated[str, Field(min_length=1, max_length=512, pattern=NO_BLANKS)]


class TolerationOperator(StrEnum):
    """How a toleration's value is compared with a taint's."""

    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(StrEnum):
    """What a taint does to pods that do not tolerate it."""

    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class Toleration(Model):
    """Lets pods run on nodes with a matching taint, as in a pod's own `tolerations`."""

    key: str | None = Field(None, max_length=316, description="The taint's key; absent means every key.")
    operator: TolerationOperator = Field(TolerationOperator.EQUAL, description="How values are compared.")
    value: str | None = Field(None, max_length=63, description="The taint's value, for the operator Equal.")
    effect: TaintEffect | None = Field(None, description="The taint's effect; absent means every effect.")
    toleration_seconds: Integer | None = Field(
        None, description="How long a pod stays on a node after a NoExecute taint appeared; absent means for ever."
    )

    @model_validator(mode="after")
    def _as_kubernetes_wants_it(self) -> "Toleration":
        exists = self.operator is TolerationOperator.EXISTS
        faults = []
        if exists and self.value:
            faults.append(Fault(("value",), "must be absent when operator is Exists"))
        if not exists and not self.key:
            faults.append(Fault(("operator",), "must be Exists when there is no key"))
        if self.toleration_seconds is not None and self.effect is not TaintEffect.NO_EXECUTE:
            faults.append(Fault(("tolerationSeconds",), "needs the effect NoExecute"))
        refuse(self, faults)
        return self


class Resources(Model):
    """What a container asks of its node, as in a container's own `resources`."""

    requests: Mapping[str, Amount] = Field({}, max_length=16, description="What is set aside: cpu, memory, and others.")
    limits: Mapping[str, Amount] = Field({}, max_length=16, description="What it may use at most.")

    @model_validator(mode="after")
    def _requests_fit_their_limits(self) -> "Resources":
        refuse(
            self,
            [
                Fault(("requests", name), f"is {wanted}, above its limit of {self.limits[name]}", (("limits", name),))
                for name, wanted in self.requests.items()
                if name in self.limits and wanted > self.limits[name]
            ],
        )
        return self


class EnvVar(Model):
    """An environment variable with a literal value: a reference would let a pool's author read any Secret here."""

    NOT_FIELDS: ClassVar[dict[str, str]] = {
        "valueFrom": "values are literal, for a reference would let a pool's author read any Secret here"
    }

    name: str = Field(max_length=253, pattern=ENV_NAME, description="The variable's name.")
    value: str = Field("", max_length=4096, description="Its value.")


class PodSettings(Model):
    """What all pods of the pool have in common."""

    image: Image | None = Field(None, description="Container image; absent means the one that the operator ships with.")
    image_pull_secrets: tuple[Name, ...] = Field(
        (), max_length=8, description="Secrets with the credentials of image registries."
    )
    resources: Resources = Field(
        Resources(), description="Requests and limits; absent means what the tiers' capacities need."
    )
    node_selector: Mapping[str, str] = Field({}, max_length=32, description="Labels that a node must have.")
    tolerations: tuple[Toleration, ...] = Field(
        (), max_length=32, description="Taints that are tolerated, beside those of GPU nodes where a GPU is asked for."
    )
    priority_class_name: Name | None = Field(None, description="PriorityClass of the pods.")
    runtime_class_name: Name | None = Field(None, description="RuntimeClass of the pods, such as `nvidia`.")
    env: tuple[EnvVar, ...] = Field((), max_length=64, description="Environment variables, with literal values.")

    @model_validator(mode="after")
    def _variables_have_one_value(self) -> "PodSettings":
        refuse(self, repeated(("env",), [variable.name for variable in self.env], "name"))
        return self


class GpuRequest(Model):
    """GPUs of one pod."""

    count: Integer = Field(0, ge=0, le=64, description="GPUs per pod. A device plugin lends a GPU to one pod alone.")
    resource: str = Field(
        "nvidia.com/gpu", max_length=316, pattern=NO_BLANKS, description="Name under which nodes offer their GPUs."
    )


class Runtime(PodSettings):
    """Cache nodes: pods of the runtime in the role server."""

    replicas: Integer = Field(2, ge=0, le=1000, description="Cache nodes; 0 when every engine embeds the cache.")
    gpu: GpuRequest = Field(GpuRequest(), description="GPUs of a cache node; none by default.")

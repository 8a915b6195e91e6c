"""How the pool is run: who may use it, what it reports, what it may reach, what it costs, what it leaves behind."""

import ipaddress
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from kvpool.api.model import URL_OR_EMPTY, Fault, Flag, Model, Name, Number, refuse


class LogLevel(StrEnum):
    """The least important lines that are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TokenSource(StrEnum):
    """Where the tokens that clients show come from."""

    PER_POOL = "per-pool"
    SECRET = "secret"  # noqa: S105 - no secret, a name


class VolumePolicy(StrEnum):
    """What becomes of volumes when the pool is deleted."""

    RETAIN = "Retain"
    DELETE = "Delete"


class Tenants(Model):
    """Who may use the pool."""

    tokens: TokenSource = Field(
        TokenSource.PER_POOL, description="One token for the pool, made by the operator, or those of a Secret."
    )
    secret: Name | None = Field(
        None, description="For tokens: secret. It maps tokens to tenants, models and rights; labelled kvpool.dev/pool."
    )

    @model_validator(mode="after")
    def _the_secret_is_named_when_it_is_used(self) -> "Tenants":
        used = self.tokens is TokenSource.SECRET
        if used and self.secret is None:
            refuse(self, [Fault(("secret",), "is missing: name the Secret that maps tokens to tenants")])
        if not used and self.secret is not None:
            refuse(self, [Fault(("secret",), "has no effect with tokens: per-pool; write tokens: secret")])
        return self


class Tracing(Model):
    """OpenTelemetry traces."""

    endpoint: str = Field("", max_length=512, pattern=URL_OR_EMPTY, description="OTLP collector; empty means none.")
    sample_ratio: Number = Field(0.01, ge=0, le=1, description="Share of the requests that are traced.")


class Telemetry(Model):
    """What the runtime says of itself."""

    log_level: LogLevel = Field(LogLevel.INFO, description="The least important lines that are logged.")
    tracing: Tracing = Field(Tracing(), description="OpenTelemetry traces.")


class Monitoring(Model):
    """What the operator makes for Prometheus and Grafana, where the cluster has those kinds."""

    pod_monitor: Flag = Field(True, description="A PodMonitor for the pool's pods.")
    alerts: Flag = Field(True, description="Alerting rules.")
    dashboards: Flag = Field(True, description="Grafana dashboards.")


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"must be a network such as 10.0.0.0/8: {error}") from error
    return text


class Network(Model):
    """Network policies of the pool's pods."""

    policies: Flag = Field(True, description="Whether the operator makes network policies.")
    egress: tuple[Annotated[str, Field(max_length=64), AfterValidator(_network)], ...] = Field(
        (), max_length=64, description="Networks (CIDR) where external tiers, weights and traces are; none means any."
    )
    cloud_metadata: Flag = Field(False, description="Whether pods may reach the cloud's metadata service.")


class Prices(Model):
    """What resources cost, for the metric of money saved. Any currency."""

    gpu_hour: Number = Field(2.5, ge=0, le=1e9, description="One GPU for an hour.")
    ram_gib_month: Number = Field(
        3.9, alias="ramGiBMonth", ge=0, le=1e9, description="One GiB of host memory for a month."
    )
    ssd_gib_month: Number = Field(0.2, alias="ssdGiBMonth", ge=0, le=1e9, description="One GiB of disk for a month.")


class OnDelete(Model):
    """What becomes of things when the pool is deleted."""

    volumes: VolumePolicy = Field(VolumePolicy.RETAIN, description="Of the tiers' volumes.")

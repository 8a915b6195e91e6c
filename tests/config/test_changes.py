"""What a running pool can take, and what needs a restart."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from kvpool.config import Change, RuntimeConfig, changes, runtime_config, with_live_changes
from kvpool.config.fields import model_in
from kvpool.config.runtime import origin_of

from .pools import pool

TIERS: dict[str, Any] = {
    "gpu": {"capacity": "8Gi"},
    "ram": {"capacity": "8Gi"},
    "dragonfly": {"managed": {}},
    "database": {"postgres": {"managed": {}}},
    "ssd": {"capacity": "64Gi"},
}
LIVE: dict[str, tuple[object, str]] = {
    "tiers.ram.capacity": ("4Gi", "4Gi"),
    "tiers.ram.indexBytes": ("64Mi", "64Mi"),
    "tiers.ssd.capacity": ("1Ti", "1Ti"),
    "tiers.ssd.dailyWrites": ("100Gi", "100Gi"),
    "tiers.ssd.secondHit": (False, "false"),
    "tiers.ssd.budget": ("1.5s", "1.5s"),
    "tiers.dragonfly.budget": ("10ms", "10ms"),
    "tiers.dragonfly.ttl": ("3h", "3h"),
    "tiers.dragonfly.batchSize": (10, "10"),
    "tiers.database.budget": ("10ms", "10ms"),
    "sharing.enabled": (False, "false"),
    "sharing.autoDetect": (False, "false"),
    "sharing.minPrefixTokens": (128, "128"),
    "sharing.maxSharedBytes": ("1Gi", "1Gi"),
    "sharing.protectShared": (False, "false"),
    "sharing.compressShared": (True, "true"),
    "policy.readAhead": (False, "false"),
    "policy.promotion.dragonfly": (False, "false"),
    "policy.promotion.gpuAfterHits": (3, "3"),
    "prefetch.maxBytes": ("2Gi", "2Gi"),
    "telemetry.logLevel": ("debug", "debug"),
    "prices.gpuHour": (3, "3"),
    "prices.ramGiBMonth": (1.5, "1.5"),
    "prices.ssdGiBMonth": (0.1, "0.1"),
}
RESTART: dict[str, tuple[object, str]] = {
    "blockTokens": (32, "32"),
    "tiers.gpu.capacity": ("9Gi", "9Gi"),
    "tiers.gpu.streams": (3, "3"),
    "tiers.ram.codec": ("fp16", "fp16"),
    "tiers.ram.hugePages": (True, "true"),
    "tiers.ssd.codec": ("int8-asymmetric", "int8-asymmetric"),
    "tiers.dragonfly.codec": ("fp16", "fp16"),
    "tiers.dragonfly.connections": (3, "3"),
    "tiers.database.codec": ("fp16", "fp16"),
    "tiers.database.inlineMax": ("1Mi", "1Mi"),
    "compression.granularity": ("block", "block"),
    "sharing.scope": ("pool", "pool"),
    "telemetry.tracing.endpoint": ("http://otel:4318", "http://otel:4318"),
}


def config(**fields: object) -> RuntimeConfig:
    """All tiers, and these fields: `tiers.ram.capacity` and so on."""
    spec: dict[str, Any] = {"tiers": {tier: dict(values) for tier, values in TIERS.items()}}
    spec["sharing"] = {"minPrefixTokens": 64}
    for path, value in fields.items():
        *sections, last = path.split(".")
        section = spec
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return runtime_config(pool(spec))


@pytest.mark.parametrize(("path", "value"), LIVE.items())
def test_a_live_field_is_taken_while_the_pool_runs(path: str, value: tuple[object, str]) -> None:
    (change,) = changes(config(), config(**{path: value[0]}))
    assert (change.path, change.new, change.live) == (f"spec.{path}", value[1], True)


@pytest.mark.parametrize(("path", "value"), RESTART.items())
def test_what_shapes_blocks_or_resources_needs_a_restart(path: str, value: tuple[object, str]) -> None:
    extra = {"sharing.minPrefixTokens": 64}
    (change,) = changes(config(**extra), config(**extra, **{path: value[0]}))
    assert (change.path, change.new, change.live) == (f"spec.{path}", value[1], False)


@pytest.mark.parametrize("tier", ["gpu", "dragonfly", "database", "ssd"])
def test_a_tier_comes_and_goes_with_a_restart_and_as_one_change(tier: str) -> None:
    with_it = config()
    without = with_it.model_copy(update={tier: None})
    assert changes(without, with_it) == [Change(f"spec.tiers.{tier}", "absent", "present", live=False)]
    assert changes(with_it, without) == [Change(f"spec.tiers.{tier}", "present", "absent", live=False)]


def test_name_and_directory_need_a_restart() -> None:
    old = RuntimeConfig(name="a")
    new = RuntimeConfig.model_validate({"name": "b", "directory": "/data"})
    assert changes(old, new) == [
        Change("metadata.name", "a", "b", live=False),
        Change("directory", "absent", "/data", live=False),
    ]


def test_quotas_and_rates_of_models_are_live_whatever_their_order() -> None:
    old = config(models=[{"name": "a", "quotas": {"ram": {"guaranteed": "1Gi", "limit": "2Gi"}}}, {"name": "b"}])
    new = config(
        models=[
            {"name": "b", "quotas": {"ssd": {"limit": "1Gi"}}, "prefillTokensPerSecond": 100},
            {"name": "a", "quotas": {"ram": {"guaranteed": "1Gi", "limit": "3Gi"}}},
            {"name": "c/d", "quotas": {"dragonfly": {"limit": "1Mi"}}},
        ]
    )
    assert changes(old, new) == [
        Change('spec.models["a"].quotas.ram.limit', "2Gi", "3Gi", live=True),
        Change('spec.models["b"].quotas.ssd.limit', "absent", "1Gi", live=True),
        Change('spec.models["b"].prefillTokensPerSecond', "absent", "100", live=True),
        Change('spec.models["c/d"].quotas.dragonfly.limit', "absent", "1Mi", live=True),
    ]
    assert {change.path for change in changes(new, old)} == {change.path for change in changes(old, new)}


pairs = st.dictionaries(st.sampled_from(sorted({**LIVE, **RESTART})), st.just(None), max_size=5)


@given(pairs, pairs)
def test_changes_are_exactly_the_fields_that_differ_and_turn_round(
    one: dict[str, None], other: dict[str, None]
) -> None:
    values = {**LIVE, **RESTART}
    if "blockTokens" in one or "blockTokens" in other:
        values["sharing.minPrefixTokens"] = (128, "128")
    a = config(**{path: values[path][0] for path in one})
    b = config(**{path: values[path][0] for path in other})
    found = changes(a, b)
    assert {change.path.removeprefix("spec.") for change in found} == set(one) ^ set(other)
    assert changes(a, a) == changes(b, b) == []
    assert changes(b, a) == [Change(path, new, old, live) for path, old, new, live in found]
    running = with_live_changes(a, b)
    assert changes(a, running) == [change for change in found if change.live]
    assert changes(running, b) == [change for change in found if not change.live]


def test_every_field_of_a_configuration_is_compared() -> None:
    def without_origin(model: type[BaseModel]) -> set[str]:
        parts = [model_in(field.annotation) for field in model.model_fields.values()]
        own = {name for name, field in model.model_fields.items() if origin_of(field) is None}
        return own.union(*(without_origin(part) for part in parts if part is not None))

    # `changes` compares these by hand, or they cannot differ; any other would be passed over in silence.
    assert without_origin(RuntimeConfig) == {
        "api_version", "kind", "name", "directory", "secret_file", "services", "models", "quotas",
    }  # fmt: skip

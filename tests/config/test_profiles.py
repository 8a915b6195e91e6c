"""Which value counts (the spec's, else the last profile's, else the default), and where it says that it comes from."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.api import KVCachePool, Profile
from kvpool.api.model import Model
from kvpool.config import RuntimeConfig, Setting, effective_settings, runtime_config
from kvpool.config.fields import aliases, model_in
from kvpool.config.profiles import DEFAULTS, PROFILES
from kvpool.errors import ConfigError

from .pools import pool

EVERY_TIER: dict[str, Any] = {
    "gpu": {},
    "dragonfly": {"managed": {}},
    "database": {"postgres": {"managed": {}}},
    "ssd": {"capacity": "64Gi"},
}
THROUGHPUT = {
    "tiers.gpu.streams": "8", "tiers.gpu.pinnedMemory": "true", "tiers.gpu.capacity": "16Gi",
    "tiers.gpu.initialSize": "4Gi", "tiers.ram.codec": "fp16", "tiers.dragonfly.codec": "fp16",
    "tiers.database.codec": "fp16", "tiers.ssd.codec": "fp16", "compression.calibrationSamples": "100",
    "compression.outlierPercentile": "100", "tiers.dragonfly.connections": "20",
    "tiers.database.postgres.connections": "10", "tiers.dragonfly.batchSize": "200", "tiers.dragonfly.ttl": "2h",
}  # fmt: skip
LATENCY = {
    "tiers.gpu.streams": "8", "tiers.gpu.pinnedMemory": "true", "tiers.gpu.capacity": "16Gi",
    "tiers.gpu.initialSize": "4Gi", "tiers.dragonfly.connections": "50", "tiers.database.postgres.connections": "20",
    "tiers.dragonfly.batchSize": "50", "tiers.dragonfly.ttl": "30m",
}  # fmt: skip
MEMORY_SAVER = {
    "tiers.gpu.streams": "2", "tiers.gpu.pinnedMemory": "false", "tiers.gpu.capacity": "4Gi",
    "tiers.gpu.initialSize": "1Gi", "tiers.ram.codec": "int8-asymmetric", "tiers.dragonfly.codec": "int8-asymmetric",
    "tiers.database.codec": "int8-asymmetric", "tiers.ssd.codec": "int8-asymmetric",
    "compression.calibrationSamples": "1000", "compression.outlierPercentile": "100",
}  # fmt: skip
CHAT = {
    "sharing.minPrefixTokens": "64", "sharing.maxSharedBytes": "8Gi", "sharing.protectShared": "true",
    "sharing.compressShared": "true",
}  # fmt: skip
VARIED = {"sharing.minPrefixTokens": "128", "sharing.maxSharedBytes": "4Gi", "sharing.autoDetect": "true"}
TUNING_GUIDE = {
    Profile.THROUGHPUT: THROUGHPUT,
    Profile.LATENCY: LATENCY,
    Profile.MEMORY_SAVER: MEMORY_SAVER,
    Profile.CHAT: CHAT,
    Profile.VARIED: VARIED,
}


def settings_of(spec: dict[str, Any]) -> dict[str, Setting]:
    return {setting.path.removeprefix("spec."): setting for setting in effective_settings(pool(spec))}


@pytest.mark.parametrize("profile", Profile)
def test_a_profile_sets_what_the_tuning_guide_says_and_nothing_else(profile: Profile) -> None:
    found = settings_of({"profiles": [profile.value], "tiers": EVERY_TIER})
    from_profile = {path: item.value for path, item in found.items() if item.source == f"profile {profile}"}
    assert from_profile == TUNING_GUIDE[profile]


def test_no_field_that_a_profile_sets_has_a_default_in_the_schema() -> None:
    for path in {path for values in PROFILES.values() for path in values}:
        assert field_default(path) is None, f"spec.{path} would be written into objects by the API server"


def field_default(path: str) -> object:
    model: Any = model_in(KVCachePool.model_fields["spec"].annotation)
    *sections, last = path.split(".")
    for part in sections:
        model = model_in(model.model_fields[aliases(model)[part]].annotation)
    return model.model_fields[aliases(model)[last]].default


def test_every_field_that_a_profile_sets_has_a_built_in_default() -> None:
    assert {path for values in PROFILES.values() for path in values} == set(DEFAULTS)


profiles = st.lists(st.sampled_from(Profile), unique=True, max_size=5)
overrides: dict[str, Any] = {
    "tiers.ram.codec": ("none", "int4-asymmetric"),
    "tiers.gpu.streams": ("1", "64"),
    "tiers.dragonfly.ttl": ("5s", "1h0m5s"),
    "tiers.dragonfly.connections": ("7",),
    "compression.outlierPercentile": ("97.5",),
    "sharing.protectShared": ("false", "true"),
    "sharing.maxSharedBytes": ("1536Mi", "0"),
    "sharing.minPrefixTokens": ("192",),
}
chosen = st.fixed_dictionaries({}, optional={path: st.sampled_from(values) for path, values in overrides.items()})


@given(profiles, chosen)
def test_the_spec_beats_the_last_profile_and_that_beats_those_before(names: list[Profile], own: dict[str, str]) -> None:
    found = settings_of(spec_with(names, own))
    for path in DEFAULTS:
        said = [(f"profile {name}", TUNING_GUIDE[name][path]) for name in names if path in TUNING_GUIDE[name]]
        source, value = ("pool", own[path]) if path in own else (said or [("default", found[path].value)])[-1]
        assert found[path] == Setting(f"spec.{path}", value, source)


def spec_with(names: list[Profile], own: dict[str, str]) -> dict[str, Any]:
    spec: dict[str, Any] = {"profiles": [name.value for name in names]}
    spec["tiers"] = {tier: dict(fields) for tier, fields in EVERY_TIER.items()}
    for path, text in own.items():
        *sections, last = path.split(".")
        section = spec
        for part in sections:
            section = section.setdefault(part, {})
        literal: dict[str, object] = {"true": True, "false": False, "7": 7, "1": 1, "64": 64, "97.5": 97.5, "192": 192}
        section[last] = literal.get(text, text)
    return spec


@given(st.integers(1, 512), st.sampled_from([(Profile.CHAT, 1), (Profile.VARIED, 2), (None, 1)]))
def test_profiles_count_prefixes_in_blocks(block: int, profile: tuple[Profile | None, int]) -> None:
    name, blocks = profile
    config = runtime_config(pool({"blockTokens": block, "profiles": [name] if name else []}))
    assert config.sharing.min_prefix_tokens == blocks * block


def test_a_profile_adds_no_tier() -> None:
    config = runtime_config(pool({"profiles": ["throughput", "latency", "memory-saver"]}))
    assert (config.gpu, config.dragonfly, config.database, config.ssd) == (None, None, None, None)


def test_an_initial_size_that_nobody_chose_is_cut_to_the_capacity() -> None:
    for names in ([], ["throughput"], ["memory-saver"]):
        config = runtime_config(pool({"profiles": names, "tiers": {"gpu": {"capacity": "512Mi"}}}))
        assert config.gpu is not None
        assert config.gpu.initial_bytes == config.gpu.capacity_bytes == 512 << 20


def test_an_initial_size_that_was_chosen_is_not_cut_but_refused() -> None:
    spec = {"profiles": ["memory-saver"], "tiers": {"gpu": {"initialSize": "5Gi"}}}
    assert runtime_config(pool({**spec, "profiles": ["memory-saver", "throughput"]})).gpu is not None
    with pytest.raises(ConfigError, match=r"spec.tiers.gpu.initialSize is 5Gi.* comes from the profile memory-saver"):
        runtime_config(pool(spec))
    with pytest.raises(ConfigError, match=r"comes from the profile memory-saver"):
        effective_settings(pool(spec))


def leaves(model: Model, path: str) -> Iterator[str]:
    for alias, name in aliases(type(model)).items():
        value = getattr(model, name)
        if isinstance(value, Model):
            yield from leaves(value, f"{path}.{alias}")
        elif isinstance(value, tuple) and value and isinstance(value[0], Model):
            for index, item in enumerate(value):
                yield from leaves(item, f"{path}.{alias}[{index}]")
        elif value not in (None, (), {}):
            yield f"{path}.{alias}"


def test_every_field_with_a_value_has_one_row() -> None:
    spec = {
        "tiers": EVERY_TIER,
        "models": [{"name": "a", "quotas": {"ram": {"limit": "1Gi"}}}, {"name": "b"}],
        "runtime": {"nodeSelector": {"disk": "nvme", "arch": "arm64"}, "env": [{"name": "A", "value": "1"}]},
    }
    rows = effective_settings(pool(spec))
    assert len({row.path for row in rows}) == len(rows)
    assert {row.path for row in rows} == {*leaves(pool(spec).spec, "spec"), *(f"spec.{path}" for path in DEFAULTS)}
    by_path = {row.path: row for row in rows}
    assert by_path["spec.runtime.nodeSelector"] == ("spec.runtime.nodeSelector", "disk=nvme, arch=arm64", "pool")
    assert by_path["spec.models[0].quotas.ram.limit"].value == "1Gi"
    assert by_path["spec.models[0].quotas.ram.guaranteed"].source == "default"
    assert by_path["spec.tiers.ssd.budget"] == ("spec.tiers.ssd.budget", "100ms", "default")


def test_what_a_runtime_config_says_by_default_is_what_a_pool_without_fields_has() -> None:
    assert runtime_config(pool({})) == RuntimeConfig(name="chat")
    config = runtime_config(pool({"tiers": {"ssd": {"capacity": "1Gi"}, "gpu": {}}}))
    assert config.ssd is not None
    assert config.ssd == type(config.ssd)(capacity_bytes=1 << 30)
    assert config.gpu is not None
    assert config.gpu == type(config.gpu)(capacity_bytes=16 << 30, initial_bytes=4 << 30)

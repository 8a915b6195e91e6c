"""`RuntimeConfig`: plain numbers from the spec, written and read back, and nothing that cannot be kept."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvpool.api import Codec, Profile, SharingScope
from kvpool.config import (
    ModelConfig,
    QuotaConfig,
    RamConfig,
    RuntimeConfig,
    SsdConfig,
    default_directory,
    dump_config,
    load_config,
    runtime_config,
)
from kvpool.tiers.tier import TierName

from .pools import pool, written

GiB = 1 << 30


def test_sizes_become_bytes_and_durations_seconds() -> None:
    config = runtime_config(
        pool(
            {
                "blockTokens": 32,
                "tiers": {
                    "ram": {"capacity": "1.5Gi", "indexBytes": "64Mi", "codec": "int8-symmetric"},
                    "ssd": {"capacity": "2G", "dailyWrites": "1Ti", "budget": "250ms", "secondHit": False},
                    "dragonfly": {"external": {"secret": "cache"}, "ttl": "1h30m"},
                },
                "models": [{"name": "m", "quotas": {"ram": {"guaranteed": "1Gi"}, "dragonfly": {"limit": "1k"}}}],
                "sharing": {"scope": "pool"},
            }
        )
    )
    assert config.block_tokens == 32
    assert config.ram == RamConfig(capacity_bytes=3 * GiB // 2, index_bytes=64 << 20, codec=Codec.INT8_SYMMETRIC)
    assert config.ssd == SsdConfig(capacity_bytes=2 * 10**9, daily_write_bytes=1 << 40, budget_s=0.25, second_hit=False)
    assert config.dragonfly is not None
    assert (config.dragonfly.secret, config.dragonfly.memory_bytes, config.dragonfly.ttl_s) == ("cache", None, 5400.0)
    assert config.models[0].quotas == {
        "ram": QuotaConfig(guaranteed_bytes=GiB),
        "dragonfly": QuotaConfig(limit_bytes=1000),
    }
    assert config.sharing.scope is SharingScope.POOL


def test_quotas_are_found_by_the_name_of_the_tier() -> None:
    model = ModelConfig(name="m", quotas={TierName.SSD.value: QuotaConfig(limit_bytes=1)})
    assert model.quotas[TierName.SSD.value].limit_bytes == 1
    assert {name.value for name in TierName} == {"gpu", "ram", "dragonfly", "database", "ssd"}
    for name in TierName:
        assert ModelConfig.model_validate({"name": "m", "quotas": {name: {"limitBytes": 1}}}).quotas.keys() == {
            name.value
        }


specs = st.fixed_dictionaries(
    {"blockTokens": st.integers(1, 512)},
    optional={
        "profiles": st.lists(st.sampled_from([profile.value for profile in Profile]), unique=True),
        "tiers": st.fixed_dictionaries(
            {},
            optional={
                "gpu": st.just({}),
                "ram": st.fixed_dictionaries({}, optional={"capacity": st.integers(16 << 20, 1 << 50)}),
                "dragonfly": st.just({"managed": {}}),
                "database": st.sampled_from(
                    [
                        {"postgres": {"managed": {}}},
                        {"postgres": {"external": {"secret": "db"}}, "qdrant": {"managed": {}}, "budget": "1.5s"},
                    ]
                ),
                "ssd": st.fixed_dictionaries(
                    {"capacity": st.integers(64 << 20, 1 << 50)}, optional={"secondHit": st.booleans()}
                ),
            },
        ),
        "telemetry": st.builds(
            lambda ratio: {"tracing": {"sampleRatio": ratio}}, st.floats(0, 1) | st.just(1e-7) | st.just(1)
        ),
        "models": st.lists(st.text("ab1e-", min_size=1, max_size=4), unique=True, max_size=3).map(
            lambda names: [{"name": name, "quotas": {"ram": {"limit": 1 << 20}}} for name in names]
        ),
    },
)


@given(specs)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_configuration_is_written_and_read_back_unchanged(tmp_path: Path, spec: dict[str, Any]) -> None:
    config = runtime_config(pool(spec))
    assert RuntimeConfig.model_validate_json(config.model_dump_json()) == config
    assert RuntimeConfig.model_validate(config.model_dump()) == config
    assert load_config(written(tmp_path, dump_config(config), "config.yaml")) == config
    assert load_config(written(tmp_path, config.model_dump_json(), "config.json")) == config


def test_configurations_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RuntimeConfig(name="a").block_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "../a"}, "pattern"),
        ({"name": "a", "ram": {"capacityBytes": 1}, "blockToken": 3}, "blockToken"),
        ({"name": "a", "gpu": {"capacityBytes": 1, "initialBytes": 2}}, "above capacityBytes of 1"),
        ({"name": "a", "models": [{"name": "m"}, {"name": "m"}]}, "names are unique"),
        ({"name": "a", "models": [{"name": "m", "quotas": {"disk": {}}}]}, "quotas.disk"),
        ({"name": "a", "models": [{"name": "m", "quotas": {"ssd": {}}}]}, "does not have"),
        ({"name": "a", "models": [{"name": "m", "quotas": {"ram": {"guaranteedBytes": 2, "limitBytes": 1}}}]}, "below"),
        (
            {
                "name": "a",
                "ram": {"capacityBytes": 10},
                "models": [{"name": name, "quotas": {"ram": {"guaranteedBytes": 4}}} for name in "abc"],
            },
            "2 bytes above capacityBytes",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RuntimeConfig.model_validate(content)


def test_a_guarantee_of_a_shared_tier_is_refused() -> None:
    config = runtime_config(pool({"tiers": {"dragonfly": {"managed": {}}}}))
    model = ModelConfig(name="m", quotas={"dragonfly": QuotaConfig(guaranteed_bytes=1)})
    with pytest.raises(ValidationError, match="takes a limit only"):
        RuntimeConfig(name="a", dragonfly=config.dragonfly, models=(model,))


def test_the_directory_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_directory("chat") == Path("/data/kvpool/chat")
    monkeypatch.setenv("HOME", "/home/a")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", unset)
        assert default_directory("chat") == Path("/home/a/.local/share/kvpool/chat")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_directory("chat") == Path("/home/a/.local/share/kvpool/chat")

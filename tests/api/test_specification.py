"""The models of `KVCachePool`: names, bounds, and the rules between fields."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from kvpool.api import KVCachePool, Quantity
from kvpool.blocks import layout
from kvpool.config.fields import model_in

from .pools import document, pool, refused

GiB = 1 << 30
SERVING: dict[str, Any] = {"model": {"pvc": {"claimName": "weights"}}}
POSTGRES: dict[str, Any] = {"postgres": {"managed": {}}}


def every_model() -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [KVCachePool]
    for model in found:
        parts = [model_in(field.annotation) for field in model.model_fields.values()]
        found += dict.fromkeys(part for part in parts if part is not None and part not in found)
    return found


def test_a_pool_needs_no_more_than_a_name() -> None:
    assert pool().spec.tiers.ram.capacity == Quantity.parse("8Gi")
    assert pool().spec.tiers.ssd is None


def test_fields_are_camel_case_in_yaml_and_snake_case_in_python() -> None:
    spec = pool({"blockTokens": 16, "prices": {"ramGiBMonth": 1}}).spec
    assert spec.block_tokens == 16
    assert spec.prices.ram_gib_month == 1
    assert spec.model_dump(exclude_unset=True) == {"blockTokens": 16, "prices": {"ramGiBMonth": 1}}
    assert refused({"block_tokens": 16}) == {"block_tokens": "Extra inputs are not permitted"}


def test_pools_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        pool().spec.block_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize("model", every_model(), ids=lambda model: model.__name__)
def test_every_field_says_what_it_is_and_no_section_takes_unknown_ones(model: type[BaseModel]) -> None:
    assert model.__doc__
    assert [name for name, field in model.model_fields.items() if not field.description] == []
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == ("ignore" if model.__name__ == "Metadata" else "forbid")


def test_every_model_of_the_specification_was_looked_at() -> None:
    assert {"SsdTier", "Backup", "EnvVar", "QuotaStatus", "Volume"} <= {model.__name__ for model in every_model()}


def test_a_block_is_bounded_by_what_a_record_can_hold() -> None:
    assert refused({"blockTokens": layout.MAX_BLOCK_TOKENS}) == {}
    assert "blockTokens" in refused({"blockTokens": layout.MAX_BLOCK_TOKENS + 1})


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"blockTokens": 0}, "blockTokens"),
        ({"blockTokens": "64"}, "blockTokens"),
        ({"blockTokens": True}, "blockTokens"),
        ({"profiles": ["fast"]}, "profiles.0"),
        ({"tiers": {"ram": {"capacity": "1Mi"}}}, "tiers.ram.capacity"),
        ({"tiers": {"ram": {"capacity": "-1Gi"}}}, "tiers.ram.capacity"),
        ({"tiers": {"ram": {"capacity": "0.3Gi"}}}, "tiers.ram.capacity"),
        ({"tiers": {"ram": {"capacity": "10Ei"}}}, "tiers.ram.capacity"),
        ({"tiers": {"ram": {"capacity": "0" * 20 + "1Gi"}}}, "tiers.ram.capacity"),
        ({"tiers": {"ram": {"codec": "zstd"}}}, "tiers.ram.codec"),
        ({"tiers": {"ram": {"hugePages": "yes"}}}, "tiers.ram.hugePages"),
        ({"tiers": {"ssd": {}}}, "tiers.ssd.capacity"),
        ({"tiers": {"ssd": {"capacity": "1Mi"}}}, "tiers.ssd.capacity"),
        ({"tiers": {"ssd": {"capacity": "1Gi", "budget": "0s"}}}, "tiers.ssd.budget"),
        ({"tiers": {"ssd": {"capacity": "1Gi", "budget": 100}}}, "tiers.ssd.budget"),
        ({"tiers": {"dragonfly": {"managed": {"memory": "200Mi"}}}}, "tiers.dragonfly.managed.memory"),
        ({"tiers": {"database": {}}}, "tiers.database.postgres"),
        ({"tiers": {"database": {**POSTGRES, "inlineMax": "8Gi"}}}, "tiers.database.inlineMax"),
        ({"compression": {"outlierPercentile": 100.1}}, "compression.outlierPercentile"),
        ({"compression": {"outlierPercentile": "99"}}, "compression.outlierPercentile"),
        ({"policy": {"promotion": {"gpuAfterHits": 0}}}, "policy.promotion.gpuAfterHits"),
        ({"models": [{"name": ""}]}, "models.0.name"),
        ({"models": [{"name": "m", "prefillTokensPerSecond": 0}]}, "models.0.prefillTokensPerSecond"),
        ({"models": [{"name": f"m{i}"} for i in range(65)]}, "models"),
        ({"telemetry": {"tracing": {"endpoint": "collector:4317"}}}, "telemetry.tracing.endpoint"),
        ({"network": {"egress": ["10.0.0.1/8"]}}, "network.egress.0"),
        ({"runtime": {"env": [{"name": "1X"}]}}, "runtime.env.0.name"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_where_it_stands(spec: dict[str, Any], path: str) -> None:
    assert list(refused(spec)) == [path]


def test_a_pool_has_a_name_from_which_those_of_its_parts_can_be_made() -> None:
    for name in ("a" * 31, "Chat", "chat-", "1chat", "chat_1", "a.b", "../etc"):
        with pytest.raises(ValidationError, match="name"):
            pool({}, name)


@pytest.mark.parametrize("kind", ["dragonfly", "postgres", "qdrant"])
def test_a_server_is_either_managed_or_external(kind: str) -> None:
    managed: dict[str, Any] = {"managed": {}}
    external: dict[str, Any] = {"external": {"secret": "elsewhere"}}

    def tiers(server: dict[str, Any]) -> dict[str, Any]:
        if kind == "dragonfly":
            return {"tiers": {kind: server}}
        return {"tiers": {"database": {**POSTGRES, kind: server}}}

    path = "tiers.dragonfly" if kind == "dragonfly" else f"tiers.database.{kind}"
    assert refused(tiers(managed)) == refused(tiers(external)) == {}
    assert refused(tiers({})) == {path: "needs exactly one of managed or external"}
    both = "only one of managed or external may be given; remove all but one"
    assert refused(tiers({**managed, **external})) == {f"{path}.external": both}


def test_unified_memory_is_refused_with_the_reason() -> None:
    assert refused({"tiers": {"gpu": {"unifiedMemory": False}}}) == {}
    message = refused({"tiers": {"gpu": {"unifiedMemory": True}}})["tiers.gpu.unifiedMemory"]
    assert "neither capacities nor quotas" in message
    assert "leave it false" in message


def test_the_initial_size_is_within_the_capacity() -> None:
    assert refused({"tiers": {"gpu": {"capacity": "4Gi", "initialSize": "4Gi"}}}) == {}
    assert refused({"tiers": {"gpu": {"capacity": "4Gi", "initialSize": "4097Mi"}}}) == {
        "tiers.gpu.initialSize": "is 4097Mi, above the tier's capacity of 4Gi"
    }


def test_names_of_models_and_profiles_stand_once() -> None:
    spec = {"models": [{"name": "a"}, {"name": "b"}, {"name": "a"}, {"name": "a"}], "profiles": ["chat", "chat"]}
    message = "is 'a', as in entry 0; names are unique"
    assert refused(spec) == {
        "profiles.1": "is 'chat', as in entry 0; names are unique",
        "models.2.name": message,
        "models.3.name": message,
    }


@given(
    st.integers(16 << 20, 64 * GiB),
    st.lists(st.tuples(st.integers(0, 32 * GiB), st.none() | st.integers(0, 64 * GiB)), max_size=4),
    st.sampled_from(["gpu", "ram", "ssd"]),
)
def test_guarantees_fit_the_capacity_and_limits_are_not_below_them(
    capacity: int, quotas: list[tuple[int, int | None]], tier: str
) -> None:
    capacity = max(capacity, 64 << 20)
    models = [
        {"name": str(i), "quotas": {tier: {"guaranteed": g} if limit is None else {"guaranteed": g, "limit": limit}}}
        for i, (g, limit) in enumerate(quotas)
    ]
    faults = refused({"tiers": {tier: {"capacity": capacity}}, "models": models})
    below = {
        f"models.{i}.quotas.{tier}.limit" for i, (g, limit) in enumerate(quotas) if limit is not None and limit < g
    }
    if below:
        assert set(faults) == below
    else:
        assert (not faults) == (sum(g for g, _ in quotas) <= capacity)


def test_the_message_of_a_sum_names_the_model_that_is_too_much_and_what_to_change() -> None:
    models = [{"name": name, "quotas": {"ssd": {"guaranteed": "3Gi"}}} for name in "abc"]
    assert refused({"tiers": {"ssd": {"capacity": "8Gi"}}, "models": models}) == {
        "models.2.quotas.ssd.guaranteed": "brings what is guaranteed in ssd to 9Gi, above the tier's capacity of 8Gi; "
        "lower it, or raise spec.tiers.ssd.capacity"
    }


def test_shared_tiers_take_a_limit_only() -> None:
    tiers = {"dragonfly": {"managed": {}}, "database": POSTGRES}
    for tier in tiers:
        assert refused({"tiers": tiers, "models": [{"name": "m", "quotas": {tier: {"limit": "1Gi"}}}]}) == {}
        faults = refused({"tiers": tiers, "models": [{"name": "m", "quotas": {tier: {"guaranteed": "1Gi"}}}]})
        assert list(faults) == [f"models.0.quotas.{tier}.guaranteed"]


@pytest.mark.parametrize("tier", ["gpu", "dragonfly", "database", "ssd"])
def test_a_quota_for_a_tier_that_is_not_there_is_refused(tier: str) -> None:
    faults = refused({"models": [{"name": "m"}, {"name": "n", "quotas": {tier: {"limit": "1Gi"}}}]})
    assert f"add spec.tiers.{tier}" in faults[f"models.1.quotas.{tier}"]


def test_a_gpu_quota_of_a_model_with_serving_pods_is_refused_with_the_reason() -> None:
    model = {"name": "m", "quotas": {"gpu": {"limit": "1Gi"}}}
    assert refused({"tiers": {"gpu": {}}, "models": [model]}) == {}
    faults = refused({"tiers": {"gpu": {}}, "models": [{**model, "serving": SERVING}]})
    assert "all of it is this model's" in faults["models.0.quotas.gpu"]


@given(st.integers(1, 512), st.integers(1, 5000))
def test_prefixes_are_counted_in_whole_blocks(block: int, tokens: int) -> None:
    faults = refused({"blockTokens": block, "sharing": {"minPrefixTokens": tokens}})
    assert (not faults) == (tokens % block == 0)
    for message in faults.values():
        near = [int(word) for word in message.replace(",", " ").split() if word.isdigit()][-2:]
        assert all(suggestion % block == 0 and suggestion > 0 for suggestion in near)


def test_semantic_prefetch_needs_the_server_that_finds_similar_prompts() -> None:
    qdrant = {"tiers": {"database": {**POSTGRES, "qdrant": {"managed": {}}}}}
    assert refused({**qdrant, "prefetch": {"semantic": True}}) == {}
    assert "spec.tiers.database.qdrant" in refused({"prefetch": {"semantic": True}})["prefetch.semantic"]


def test_tokens_come_from_a_secret_exactly_when_one_is_named() -> None:
    assert refused({"tenants": {"tokens": "secret", "secret": "tokens"}}) == {}
    assert list(refused({"tenants": {"tokens": "secret"}})) == ["tenants.secret"]
    assert list(refused({"tenants": {"secret": "tokens"}})) == ["tenants.secret"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"args": ["--kv-transfer-config", "{}"]}, "args.0"),
        ({"args": ["--seed=1", "--kv_transfer_config={}"]}, "args.1"),
        ({"args": ["--port=1"]}, "args.0"),
        ({"gpu": {"count": 2}}, "cache"),
        ({"model": {}}, "model"),
        ({"model": {"hub": {"repo": "a/b"}}}, "model.cacheSize"),
        ({"model": {"pvc": {"claimName": "w"}, "cacheSize": "1Gi"}}, "model.cacheSize"),
        ({"model": {"pvc": {"claimName": "w"}, "image": {"reference": "i"}}}, "model.image"),
        ({"env": [{"name": "A"}, {"name": "A"}]}, "env.1.name"),
        ({"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "500m"}}}, "resources.requests.cpu"),
        ({"tolerations": [{"effect": "NoSchedule"}]}, "tolerations.0.operator"),
        ({"tolerations": [{"operator": "Exists", "value": "x"}]}, "tolerations.0.value"),
    ],
)
def test_a_serving_pod_that_could_not_work_is_refused(change: dict[str, Any], path: str) -> None:
    assert refused({"models": [{"name": "m", "serving": SERVING}]}) == {}
    assert list(refused({"models": [{"name": "m", "serving": {**SERVING, **change}}]})) == [f"models.0.serving.{path}"]


def test_several_gpus_work_with_the_cache_beside_the_engine() -> None:
    serving = {**SERVING, "gpu": {"count": 2}, "cache": "sidecar"}
    assert refused({"models": [{"name": "m", "serving": serving}]}) == {}


def test_a_serving_pod_asks_for_one_gpu_unless_told_otherwise() -> None:
    model = {"name": "m", "serving": {**SERVING, "gpu": {"resource": "amd.com/gpu"}}}
    serving = pool({"models": [model]}).spec.models[0].serving
    assert serving is not None
    assert serving.gpu.count == 1


def test_what_the_api_server_adds_to_the_metadata_is_passed_over() -> None:
    content = document()
    content["metadata"] |= {"resourceVersion": "7", "managedFields": [{"manager": "kubectl"}], "generation": 3}
    assert KVCachePool.model_validate(content).metadata.generation == 3


def test_a_status_is_written_and_read_back() -> None:
    status = {
        "observedGeneration": 4,
        "conditions": [
            {
                "type": "Degraded",
                "status": "True",
                "reason": "SsdUnavailable",
                "message": "disk full",
                "lastTransitionTime": "2026-01-02T03:04:05Z",
                "observedGeneration": 4,
            }
        ],
        "degradations": ["no-ssd"],
        "tiers": {
            "ssd": {"ready": 1, "desired": 2, "capacity": "1Ti", "used": "300Gi", "hitRatio": 0.4, "mode": "degraded"}
        },
        "models": [
            {"name": "m", "hitRatio": 0.5, "quotas": {"ram": {"used": "1Gi", "guaranteed": "2Gi", "limit": "3Gi"}}}
        ],
        "effective": [{"path": "spec.blockTokens", "value": "64", "source": "default"}],
        "replicas": 2,
        "selector": "app=kvpool",
    }
    read = KVCachePool.model_validate({**document(), "status": status}).status
    assert read is not None
    assert read.model_dump(mode="json", exclude_unset=True) == status


@pytest.mark.parametrize("field", ["type", "status", "reason"])
def test_a_condition_says_only_what_programs_can_rely_on(field: str) -> None:
    condition = {"type": "Ready", "status": "True", "reason": "AllTiersReady", field: "Fine"}
    with pytest.raises(ValidationError, match=field):
        KVCachePool.model_validate({**document(), "status": {"conditions": [condition]}})


@given(
    st.integers(1, 512),
    st.booleans(),
    st.sampled_from(["1Gi", "1.5Gi", 1 << 31, "2e9"]),
    st.sampled_from(["2h", "90m"]),
)
def test_a_pool_is_written_as_json_and_read_back_unchanged(block: int, flag: bool, size: object, ttl: str) -> None:
    spec = {
        "blockTokens": block,
        "tiers": {"ram": {"capacity": size, "hugePages": flag}, "dragonfly": {"managed": {}, "ttl": ttl}},
    }
    written = pool(spec)
    again = KVCachePool.model_validate_json(written.model_dump_json(exclude_unset=True))
    assert again == written
    assert again.model_dump_json(exclude_unset=True) == written.model_dump_json(exclude_unset=True)


def test_the_schema_of_a_size_is_one_that_a_custom_resource_can_have() -> None:
    schema = KVCachePool.model_json_schema(by_alias=True)
    capacity = schema["$defs"]["SsdTier"]["properties"]["capacity"]
    assert capacity["x-kubernetes-int-or-string"] is True
    assert capacity["maxLength"] == 20
    assert capacity["anyOf"] == [{"type": "integer"}, {"type": "string"}]

"""`load_config`: what a user reads when a file is wrong, and that a right one is taken."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool.config import RamConfig, RuntimeConfig, dump_config, load_config, load_pool, runtime_config
from kvpool.config.document import MAX_BYTES, read_document, yaml_text
from kvpool.errors import ConfigError

from .pools import HEADER, pool, written


def complaint(file: Path) -> str:
    """What `load_config` says of the file, without the directory."""
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return str(caught.value).replace(f"{file.parent}/", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pool.yaml is empty; it must hold a KVCachePool, see examples/laptop.yaml"),
        ("# nothing\n---\n", "pool.yaml is empty; it must hold a KVCachePool, see examples/laptop.yaml"),
        ("- a\n", "pool.yaml holds a list; it must hold the fields apiVersion, kind, metadata and spec"),
        ("hello", "pool.yaml holds a single value; it must hold the fields apiVersion, kind, metadata and spec"),
        ("a: 1\n---\nb: 2\n", "pool.yaml holds 2 documents; it must hold one, so split it"),
        ("a: [1\nb: 2\n", "pool.yaml:2 is not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "pool.yaml:4: b.c stands here a second time, after line 3; remove one"),
        ("a: {b: [{c: 1, c: 2}]}\n", "pool.yaml:1: a.b[0].c stands here a second time, after line 1; remove one"),
        ("1: 2\n", "pool.yaml:1: the file has a key that is not text; put it in quotes"),
        ("spec:\n  yes: 1\n", "pool.yaml:2: spec has a key that is not text; put it in quotes"),
        (
            "a: &x {b: 1}\nc:\n  <<: *x\n",
            "pool.yaml:3: c has a merge key (<<), which is not followed; write the fields out",
        ),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            "pool.yaml:1: a has the tag tag:yaml.org,2002:python/object/apply:os.system; write it without one",
        ),
        (
            "a: !!python/name:os.system\n",
            "pool.yaml:1 is not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'",
        ),
        ("kind: KVCachePool\n", "pool.yaml: apiVersion is missing; it must be kvpool.dev/v1alpha1"),
        ("apiVersion: v1\nkind: Pod\n", "pool.yaml:2: kind is 'Pod'; it must be KVCachePool"),
        ("spec: {}\n", "pool.yaml: kind is missing; it must be KVCachePool"),
        (
            "kind: KVCachePool\napiVersion: kvpool.dev/v1\n",
            "pool.yaml:2: apiVersion is 'kvpool.dev/v1'; it must be kvpool.dev/v1alpha1",
        ),
    ],
)
def test_a_file_that_is_no_pool_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(written(tmp_path, text)) == message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "tiers: {ram: {capacity: lots}}",
            "pool.yaml:5: spec.tiers.ram.capacity is 'lots'; it must be a number with an optional suffix, such as "
            "512Mi, 16Gi, 1.5G or 1048576",
        ),
        ("tiers: {ram: {capacity: 1Mi}}", "pool.yaml:5: spec.tiers.ram.capacity is '1Mi'; it must be at least 16Mi"),
        (
            "tiers: {ram: {capacity: 0.3Gi}}",
            "pool.yaml:5: spec.tiers.ram.capacity is '0.3Gi'; it must be a whole number of bytes",
        ),
        (
            "tiers: {ssd: {capacity: 1Gi, budget: 100}}",
            "pool.yaml:5: spec.tiers.ssd.budget is 100; it must be a duration with units, such as 50ms, 30s, 2h or "
            "1h30m",
        ),
        (
            "tiers: {ssd: {secondHit: true}}",
            "pool.yaml:5: spec.tiers.ssd.capacity is missing: Disk space per pod, at most: padding, dead records and "
            "one spare segment included.",
        ),
        ("tiers: {ram: {capcity: 1Gi}}", "pool.yaml:5: spec.tiers.ram.capcity is not known; did you mean capacity?"),
        ("block_tokens: 16", "pool.yaml:5: spec.block_tokens is not known; did you mean blockTokens?"),
        (
            "policy: {zzz: 1}",
            "pool.yaml:5: spec.policy.zzz is not known; spec.policy has eviction, promotion, readAhead",
        ),
        ("blockTokens: 64.5", "pool.yaml:5: spec.blockTokens is 64.5; it must be a whole number"),
        ("blockTokens: true", "pool.yaml:5: spec.blockTokens is true; it must be a whole number"),
        ("blockTokens: 0", "pool.yaml:5: spec.blockTokens is 0; it must be at least 1"),
        ("profiles: chat", "pool.yaml:5: spec.profiles is 'chat'; it must be a list"),
        (
            "profiles: [chat, fast]",
            "pool.yaml:5: spec.profiles[1] is 'fast'; it must be throughput, latency, memory-saver, chat or varied",
        ),
        ("tiers: []", "pool.yaml:5: spec.tiers is a list; it must be a mapping of fields"),
        (
            "models: [{name: 7}]",
            "pool.yaml:5: spec.models[0].name is 7; it must be text; put it in quotes if it looks like a number",
        ),
        (
            "tiers: {ssd: }",
            "pool.yaml:5: spec.tiers.ssd is empty; give it a value ({} for all defaults), or remove the line",
        ),
        (
            "tiers: {dragonfly: {managed: {}}}\n  models: [{name: m, quotas: {dragonfly: {guaranteed: 1Gi}}}]",
            "pool.yaml:6: spec.models[0].quotas.dragonfly.guaranteed cannot be set: this tier takes a limit only, "
            "for all pods share it and it evicts by its own rules",
        ),
        (
            "models:\n  - name: a\n  - name: b\n    quotas:\n      ram:\n        guaranteed: 2Gi\n        limit: 1Gi",
            "pool.yaml:11: spec.models[1].quotas.ram.limit is 1Gi, below guaranteed of 2Gi; it must be at least that",
        ),
        (
            "runtime: {nodeSelector: {kubernetes.io/arch: 7}}",
            'pool.yaml:5: spec.runtime.nodeSelector["kubernetes.io/arch"] is 7; it must be text; put it in quotes if '
            "it looks like a number",
        ),
        (
            "telemetry: {tracing: {endpoint: here}}",
            "pool.yaml:5: spec.telemetry.tracing.endpoint is 'here'; it must be a URL that starts with http:// or "
            "https://, or empty",
        ),
        (
            'tiers: {database: {postgres: {managed: {backup: {schedule: "0 25 * * *"}}}}}',
            "pool.yaml:5: spec.tiers.database.postgres.managed.backup.schedule is '0 25 * * *'; it has the hour '25'; "
            "it must be 0 to 23",
        ),
        (
            "network: {egress: [10.0.0.1/8]}",
            "pool.yaml:5: spec.network.egress[0] is '10.0.0.1/8'; it must be a network such as 10.0.0.0/8: 10.0.0.1/8 "
            "has host bits set",
        ),
    ],
)
def test_a_wrong_field_gets_its_line_its_path_and_what_would_be_right(tmp_path: Path, spec: str, message: str) -> None:
    assert complaint(written(tmp_path, f"{HEADER}spec:\n  {spec}\n")) == message


def test_all_that_is_wrong_is_listed_line_by_line(tmp_path: Path) -> None:
    text = (
        HEADER
        + "spec:\n  blockTokens: 0\n  tiers:\n    ram: {capacity: x}\n  policy:\n    eviction: random\n  foo: 1\n"
    )
    assert [line.split(" is ")[0] for line in complaint(written(tmp_path, text)).splitlines()] == [
        "pool.yaml:5: spec.blockTokens",
        "pool.yaml:7: spec.tiers.ram.capacity",
        "pool.yaml:9: spec.policy.eviction",
        "pool.yaml:10: spec.foo",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "profiles: [memory-saver]\n  tiers: {gpu: {initialSize: 8Gi}}",
            "pool.yaml:6: spec.tiers.gpu.initialSize is 8Gi, above the tier's capacity of 4Gi (spec.tiers.gpu.capacity "
            "comes from the profile memory-saver)",
        ),
        (
            "tiers: {gpu: {}}\n  models: [{name: m, quotas: {gpu: {guaranteed: 20Gi}}}]",
            "pool.yaml:6: spec.models[0].quotas.gpu.guaranteed brings what is guaranteed in gpu to 20Gi, above the "
            "tier's capacity of 16Gi; lower it, or raise spec.tiers.gpu.capacity (spec.tiers.gpu.capacity comes from "
            "the built-in default)",
        ),
    ],
)
def test_a_value_that_does_not_fit_a_profile_or_default_is_refused_and_told_so(
    tmp_path: Path, spec: str, message: str
) -> None:
    file = written(tmp_path, f"{HEADER}spec:\n  {spec}\n")
    assert complaint(file) == message
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_pool(file)


def test_a_file_that_cannot_be_read_gets_one_line(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none.yaml") == "none.yaml cannot be read: No such file or directory"
    (tmp_path / "folder.yaml").mkdir()
    assert complaint(tmp_path / "folder.yaml") == "folder.yaml cannot be read: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    assert complaint(tmp_path / "latin.yaml") == "latin.yaml is not UTF-8 text (byte 6)"
    (tmp_path / "nul.yaml").write_bytes(b"a: \x00")
    assert "\n" not in complaint(tmp_path / "nul.yaml")


def test_a_file_larger_than_a_mebibyte_is_not_read(tmp_path: Path) -> None:
    file = written(tmp_path, HEADER + "#" * (MAX_BYTES - len(HEADER)))
    assert load_config(file).name == "chat"
    with file.open("a") as stream:
        stream.write("#")
    assert complaint(file) == "pool.yaml is larger than 1 MiB; that is no KVCachePool"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\n"
        + "".join(f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "cdefghi"),
        "a: &a [*a]\n",
        "[" * 66 + "]" * 66,
        "[" * 9999 + "]" * 9999,
    ],
    ids=["billion laughs", "an alias of itself", "deep", "very deep"],
)
def test_a_file_that_grows_when_it_is_read_is_refused(tmp_path: Path, text: str) -> None:
    assert complaint(written(tmp_path, text)).startswith(
        "pool.yaml holds more than 100000 values, or more than 64 levels"
    )


def test_deep_json_is_refused(tmp_path: Path) -> None:
    for depth in (100, 100_000):
        assert complaint(written(tmp_path, '{"a":' * depth + "1" + "}" * depth, "pool.json")).startswith("pool.json")


def test_duplicate_keys_in_json_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, '{"kind": "KVCachePool", "spec": {"a": 1, "a": 2}}', "pool.json")
    assert complaint(file) == "pool.json: the key 'a' stands twice in one object; remove one"


def test_json_is_read_as_json(tmp_path: Path) -> None:
    content = {
        "apiVersion": "kvpool.dev/v1alpha1",
        "kind": "KVCachePool",
        "metadata": {"name": "chat"},
        "spec": {"telemetry": {"tracing": {"sampleRatio": 1e-05}}},
    }
    file = written(tmp_path, json.dumps(content, indent="\t"), "pool.json")
    assert load_config(file).telemetry.tracing_sample_ratio == 1e-05
    assert complaint(written(tmp_path, '{"a": }', "bad.json")).startswith("bad.json is not valid JSON: ")


def test_aliases_are_followed(tmp_path: Path) -> None:
    models = "models:\n  - {name: a, quotas: &q {ssd: {limit: 1Mi}}}\n  - {name: b, quotas: *q}\n"
    spec = f"spec:\n  tiers: {{ssd: {{capacity: 1Gi}}}}\n  {models}"
    config = load_config(written(tmp_path, HEADER + spec))
    assert config.models[0].quotas == config.models[1].quotas != {}


def test_numbers_are_those_of_kubernetes(tmp_path: Path) -> None:
    text = HEADER + "spec:\n  tiers: {ram: {capacity: 1e9}}\n  telemetry: {tracing: {sampleRatio: 1e-3}}\n"
    config = load_config(written(tmp_path, text))
    assert config.ram.capacity_bytes == 10**9
    assert config.telemetry.tracing_sample_ratio == 0.001


def test_the_status_of_an_object_is_passed_over_and_so_is_what_the_api_server_adds(tmp_path: Path) -> None:
    text = (
        HEADER.replace("{name: chat}", "{name: chat, uid: abc, managedFields: [{}]}") + "status: {later: [1, null]}\n"
    )
    assert load_config(written(tmp_path, text)) == runtime_config(pool({}))
    assert load_pool(written(tmp_path, text)).status is None


def test_load_pool_takes_no_other_kind(tmp_path: Path) -> None:
    file = written(tmp_path, RuntimeConfig(name="a").model_dump_json(), "config.json")
    with pytest.raises(ConfigError, match=r"config.json: kind is RuntimeConfig; it must be KVCachePool here"):
        load_pool(file)


def test_a_runtime_config_is_taken_as_it_is_and_its_errors_name_its_own_fields(tmp_path: Path) -> None:
    config = RuntimeConfig(name="a", directory=Path("/var/lib/kvpool"), ram=RamConfig(capacity_bytes=1))
    text = dump_config(config)
    assert load_config(written(tmp_path, text, "config.yaml")) == config
    wrong = text.replace("capacityBytes: 1", "capacityBytes: 1Gi\n  capacity: 3")
    lines = complaint(written(tmp_path, wrong, "config.yaml")).splitlines()
    assert lines[0].endswith("ram.capacityBytes is '1Gi'; it must be a whole number")
    assert lines[1].endswith("ram.capacity is not known; did you mean capacityBytes?")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode())
    assert load_config(file).name == "chat"


def test_reading_takes_nothing_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, HEADER)
    before = load_config(file)
    for name in list(os.environ):
        monkeypatch.delenv(name)
    assert load_config(file) == before


keys = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)
leaves = st.booleans() | st.integers(-(10**18), 10**18) | st.text(max_size=10) | st.none() | st.floats(allow_nan=False)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


@given(st.dictionaries(keys, trees, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_document_holds_is_what_was_written(tmp_path: Path, content: dict[str, Any]) -> None:
    assert read_document(written(tmp_path, yaml_text(content))).content == content
    assert read_document(written(tmp_path, json.dumps(content), "pool.json")).content == content

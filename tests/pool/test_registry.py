"""The registry: a directory knows its models by name after a restart, whatever happens to the file."""

import dataclasses
import json
import logging
import resource
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.errors import IncompatibleDataError
from kvpool.pool.registry import MAX_MODELS, Registry

LAYOUT = KVLayout(layers=2, kv_heads=3, head_size=64, dtype=Dtype.BFLOAT16)
LLAMA = ModelIdentity(name="llama", weights="sha256:1", layout=LAYOUT)
OTHER_LLAMA = dataclasses.replace(LLAMA, weights="sha256:2")
QWEN = ModelIdentity(name="qwen", weights="sha256:3", layout=LAYOUT)

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 200),
    kv_heads=st.integers(1, 200),
    head_size=st.integers(1, 1024),
    dtype=st.sampled_from(Dtype),
    block_tokens=st.integers(1, 512),
    value_head_size=st.none() | st.integers(0, 1024),
)
ranks = st.integers(1, 64).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size)))
texts = st.text(max_size=20)
identities = st.builds(
    lambda rank, **fields: ModelIdentity(tp_rank=rank[0], tp_size=rank[1], **fields),
    rank=ranks,
    name=texts.filter(bool),
    weights=texts.filter(bool),
    layout=layouts,
    revision=texts,
    adapter=texts,
    rope=texts,
    quantization=texts,
    kv_scales=texts,
    generation=st.binary(max_size=16),
)


@given(st.lists(identities, max_size=4, unique_by=lambda identity: identity.fingerprint))
@settings(max_examples=50, deadline=None)
def test_every_field_of_an_identity_survives_a_restart(models: list[ModelIdentity]) -> None:
    with tempfile.TemporaryDirectory() as name:
        registry = Registry.load(Path(name))
        for model in models:
            registry.remember(model)
        known = Registry.load(Path(name)).known()
        assert known == models[::-1]
        assert [model.fingerprint for model in known] == [model.fingerprint for model in models[::-1]]


def test_models_of_one_name_come_newest_first(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    for model in (LLAMA, QWEN, OTHER_LLAMA, LLAMA):
        registry.remember(model)
    for known in (registry, Registry.load(tmp_path)):
        assert known.by_name("llama") == [LLAMA, OTHER_LLAMA]
        assert known.by_name("absent") == []


def test_registering_the_newest_again_writes_nothing(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    registry.remember(LLAMA)
    before = (tmp_path / "models.json").stat()
    registry.remember(LLAMA)
    assert (tmp_path / "models.json").stat().st_ino == before.st_ino


def test_the_model_registered_longest_ago_is_forgotten_first(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    models = [dataclasses.replace(LLAMA, weights=str(number)) for number in range(MAX_MODELS)]
    for model in models:
        registry.remember(model)
    registry.remember(models[0])
    registry.remember(QWEN)
    known = Registry.load(tmp_path).known()
    assert len(known) == MAX_MODELS
    assert models[1] not in known
    assert known[:2] == [QWEN, models[0]]


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"version": "1"}',
        b'{"version": 1, "models": [{}]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_kept_aside_and_said_in_the_log(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models.json").write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        registry = Registry.load(tmp_path)
    assert "models.json" in caplog.text
    assert registry.known() == []
    assert (tmp_path / "models.json.damaged").read_bytes() == damaged
    registry.remember(LLAMA)
    assert Registry.load(tmp_path).known() == [LLAMA]


def test_a_model_whose_fields_were_changed_in_the_file_is_not_believed(tmp_path: Path) -> None:
    Registry.load(tmp_path).remember(LLAMA)
    path = tmp_path / "models.json"
    path.write_text(path.read_text().replace('"layers": 2', '"layers": 3'))
    assert Registry.load(tmp_path).known() == []


def test_a_newer_programs_file_is_refused_and_kept(tmp_path: Path) -> None:
    newer = json.dumps({"version": 3, "catalog": []})
    (tmp_path / "models.json").write_text(newer)
    with pytest.raises(IncompatibleDataError, match="format 3"):
        Registry.load(tmp_path)
    assert (tmp_path / "models.json").read_text() == newer


def test_a_full_disk_is_a_log_line_and_the_next_registration_catches_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry.load(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        registry.remember(LLAMA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "cannot be written" in caplog.text
    assert registry.known() == [LLAMA]
    assert Registry.load(tmp_path).known() == []
    registry.remember(LLAMA)
    assert Registry.load(tmp_path).known() == [LLAMA]

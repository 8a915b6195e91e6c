"""Two models share blocks only if everything that their keys and values depend on is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpool.adapters.transformers.geometry import inspect_model
from kvpool.adapters.transformers.identity import model_identity
from kvpool.blocks.identity import ModelIdentity
from tests.adapters.tiny import llama, made


def identity(model: Any, directory: Path, **options: Any) -> ModelIdentity:
    layout = inspect_model(model).layout(16)
    return model_identity(model, layout, digest_file=directory / "weights.json", **options)


def saved(directory: Path, **options: Any) -> Path:
    llama(**options).save_pretrained(directory / "model")
    return directory / "model"


def test_the_same_model_has_the_same_identity(tmp_path: Path) -> None:
    assert identity(llama(), tmp_path) == identity(llama(), tmp_path)


def test_a_model_in_a_directory_is_named_after_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(tmp_path))
    assert identity(model, tmp_path).name == "model"
    assert identity(model, tmp_path, name="llama-tiny").name == "llama-tiny"


def test_a_model_without_a_name_is_named_after_its_architecture(tmp_path: Path) -> None:
    assert identity(llama(), tmp_path).name == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "options",
    [
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_same_weights_with_another_setting_are_another_model(options: dict[str, Any], tmp_path: Path) -> None:
    plain, other = llama(), llama(**options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert identity(plain, tmp_path).fingerprint != identity(other, tmp_path).fingerprint


def test_settings_on_which_nothing_depends_leave_the_identity_as_it_is(tmp_path: Path) -> None:
    assert identity(llama(), tmp_path) == identity(llama(use_cache=False, eos_token_id=5), tmp_path)


def test_another_type_of_the_same_weights_is_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    one, other = (identity(model, tmp_path) for model in models)
    assert one.weights == other.weights
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("option", [{"generation": b"2"}, {"revision": "main"}, {"weights": "mine"}, {"name": "other"}])
def test_what_the_caller_says_is_part_of_the_identity(option: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    assert identity(model, tmp_path).fingerprint != identity(model, tmp_path, **option).fingerprint


def test_quantization_is_part_of_the_identity(tmp_path: Path) -> None:
    model = llama()
    plain = identity(model, tmp_path, weights="same")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    quantized = identity(model, tmp_path, weights="same")
    assert quantized.quantization == '{"bits":4,"quant_method":"gptq"}'
    assert plain.fingerprint != quantized.fingerprint


def test_the_engine_is_no_part_of_the_identity(tmp_path: Path) -> None:
    config = llama().config
    config._attn_implementation = "eager"
    assert identity(made(type(llama()), config), tmp_path) == identity(llama(), tmp_path)

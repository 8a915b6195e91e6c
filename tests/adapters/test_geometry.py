"""What a model keeps is measured; what blocks cannot hold is refused, with the layer and the reason."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

from kvpool.adapters.transformers.geometry import cache_argument, inspect_model
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.errors import InputError, UnsupportedModelError
from tests.adapters.tiny import FAMILIES, SIZES, deepseek, llama, made, mistral


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layout_is_what_the_model_s_cache_holds(dtype: torch.dtype) -> None:
    layout = inspect_model(llama(dtype)).layout(16)
    names = {torch.float32: Dtype.FLOAT32, torch.bfloat16: Dtype.BFLOAT16, torch.float16: Dtype.FLOAT16}
    assert layout == KVLayout(layers=3, kv_heads=2, head_size=16, dtype=names[dtype], block_tokens=16)


def test_latent_attention_has_another_size_for_values_than_for_keys() -> None:
    model = deepseek()
    layout = inspect_model(model).layout(16)
    cache: Any = DynamicCache(config=model.config)
    model(torch.tensor([[3, 4, 5]]), use_cache=True, **{cache_argument(model.forward): cache})
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert (layout.kv_heads, layout.head_size, layout.value_dim) == (keys.shape[1], keys.shape[3], values.shape[3])
    assert layout.head_size != layout.value_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_full_attention_are_taken(family: str) -> None:
    model = FAMILIES[family](torch.float32)
    assert len(inspect_model(model).devices) == model.config.num_hidden_layers


RECURRENT: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}


def _refused() -> dict[str, tuple[Any, str]]:
    four_layers = {**SIZES, "num_hidden_layers": 4, "head_dim": 16}
    text = {**four_layers, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "sliding window": (lambda: mistral(sliding_window=16), "layer 0 keeps a DynamicSlidingWindowLayer: a sliding"),
        "some layers slide": (lambda: made(Cohere2ForCausalLM, Cohere2Config(**text)), "a sliding window"),
        "chunked": (lambda: made(Llama4ForCausalLM, Llama4TextConfig(**four_layers)), "chunked attention"),
        "mamba": (
            lambda: made(MambaForCausalLM, MambaConfig(**RECURRENT)),
            "a recurrent or convolution state",
        ),
        "hybrid": (
            lambda: made(FalconH1ForCausalLM, FalconH1Config(**{**SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 4})),
            "a recurrent or convolution state",
        ),
        "state elsewhere": (
            lambda: made(RwkvForCausalLM, RwkvConfig(**RECURRENT, attention_hidden_size=32)),
            "layer 0 keeps nothing per token|a recurrent or convolution state",
        ),
        "encoder-decoder": (
            lambda: made(T5ForConditionalGeneration, T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        "images": (
            lambda: made(Gemma3ForConditionalGeneration, Gemma3Config(text_config=four_layers, vision_config=vision)),
            "images or audio",
        ),
        "dynamic rope": (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
            "RoPE of type 'dynamic'",
        ),
    }


REFUSED = _refused()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_cache_that_blocks_cannot_hold_is_refused_with_the_reason(kind: str) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=reason):
        inspect_model(make())


def test_attention_to_later_tokens_is_found_by_running_the_model() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"layer 1.*not causal"):
        inspect_model(model)


def test_layers_of_different_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicLayer.update
    narrow: list[Any] = []

    def uneven(layer: Any, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The first layer keeps half of its heads, as in models whose layers differ."""
        narrow.append(layer)
        if layer is narrow[0]:
            update(layer, keys[:, :1], values[:, :1])
            return keys, values
        return update(layer, keys, values)

    monkeypatch.setattr(DynamicLayer, "update", uneven)
    with pytest.raises(UnsupportedModelError, match="layers differ"):
        inspect_model(llama())


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        inspect_model(llama().train())


def test_adapters_are_refused_with_what_to_do_instead() -> None:
    model = llama()
    model.peft_config = {"default": object()}
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        inspect_model(model)


def test_something_that_cannot_generate_is_refused() -> None:
    with pytest.raises(InputError, match="cannot generate"):
        inspect_model(torch.nn.Linear(2, 2))


def test_models_loaded_by_their_auto_class_are_taken() -> None:
    auto: Any = AutoModelForCausalLM
    assert inspect_model(auto.from_config(llama().config).eval()).kv_heads == 2

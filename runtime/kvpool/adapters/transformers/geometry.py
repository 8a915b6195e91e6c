"""What a model keeps per token, found by running it: and whether that is something that blocks can hold.

A wrong answer here would be a wrong cache, so nothing is taken on trust. The configuration is read for what it admits
to (sliding windows, state-space layers, an encoder); then the model runs eight tokens, and what its cache holds
afterwards is the geometry.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.errors import InputError, UnsupportedModelError

DTYPES = {
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float8_e4m3fn: Dtype.FLOAT8_E4M3,
    torch.float8_e5m2: Dtype.FLOAT8_E5M2,
}
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""RoPE whose frequencies depend on the position alone; others change with the length of the whole prompt."""
DYNAMIC_CACHES = (None, "dynamic", "dynamic_full")
_REASONS = {
    "DynamicSlidingWindowLayer": "a sliding window or chunked attention forgets tokens that a block must hold",
    "DynamicIndexedLayer": "sparse attention keeps index keys that blocks have no place for",
    "DummyLayer": "it keeps nothing of its own and reads another layer's keys and values",
    "LinearAttentionLayer": "a recurrent or convolution state covers the whole prompt and cannot be cut into blocks",
}
_PROBE = ((0, 1, 2, 3), (0, 1, 4, 5))
"""Two prompts that share their first half."""


class Geometry(NamedTuple):
    """The keys and values of one token; `devices` says where each layer's lie."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    def layout(self, block_tokens: int) -> KVLayout:
        """How blocks of this model lie in a pool."""
        return KVLayout(
            layers=len(self.devices),
            kv_heads=self.kv_heads,
            head_size=self.key_dim,
            value_head_size=None if self.value_dim == self.key_dim else self.value_dim,
            dtype=DTYPES[self.dtype],
            block_tokens=block_tokens,
        )


def cache_argument(function: Any) -> str:
    """How this `forward` or `prepare_inputs_for_generation` calls its cache; it was renamed within transformers 5."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def generate_argument() -> str:
    """How `generate` calls the cache in the installed transformers."""
    return cache_argument(GenerationMixin.prepare_inputs_for_generation)


def takes_positions(model: Any) -> bool:
    """Whether the model is told each token's position, as left-padded rows need it."""
    return "position_ids" in inspect.signature(model.forward).parameters


def inspect_model(model: Any) -> Geometry:
    """Return the geometry of the model's keys and values, or raise `UnsupportedModelError` with the reason.

    Runs the model once, on two prompts of four tokens. Raises `InputError` for a model in training mode.
    """
    _refuse_by_kind(model)
    _refuse_by_configuration(model.config)
    for index, layer in enumerate(_empty_layers(model.config)):
        _refuse_layer(model, index, layer)
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{type(model).__name__}: {_REASONS['LinearAttentionLayer']}")
    return _measure(model)


def require_evaluation(model: Any) -> None:
    """Raise `InputError` while the model is in training mode: dropout makes keys and values of their own each time."""
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode: call model.eval() first")


def _refuse_by_kind(model: Any) -> None:
    name = type(model).__name__
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generate"):
        raise InputError(f"{name} cannot generate; pass a transformers model with generate(), such as LlamaForCausalLM")
    require_evaluation(model)
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{name} carries adapters (peft), and its keys and values depend on which of them are active: "
            "merge the one that is served (merge_and_unload) and pass weights= with an id of the merged weights"
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedModelError(
            f"{name} runs tensor-parallel over {model._tp_size} ranks, which would have to agree on what was matched"
        )


def _refuse_by_configuration(config: Any) -> None:
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: an encoder-decoder's keys and values depend on the encoder's input")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(
            f"{name}: keys and values depend on images or audio, which token ids do not say; pass the text model alone"
        )
    dynamic = sorted(set(_rope_types(config)) - STATIC_ROPE)
    if dynamic:
        raise UnsupportedModelError(
            f"{name}: RoPE of type {dynamic[0]!r} turns keys by the length of the whole prompt, "
            f"so a prefix has no keys of its own; supported are {', '.join(sorted(STATIC_ROPE))}"
        )


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """The RoPE settings as the configuration has them; empty where there are none."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _rope_types(config: Any) -> Iterator[str]:
    """Every RoPE type in use: one, or one per kind of layer."""
    parameters = rope_parameters(config)
    for settings in (parameters, *parameters.values()):
        if isinstance(settings, Mapping) and (kind := settings.get("rope_type", settings.get("type"))):
            yield str(kind)


def _empty_layers(config: Any) -> list[Any]:
    try:
        return list(DynamicCache(config=config).layers)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{type(config).__name__}: transformers has no dynamic cache for it: {error}"
        ) from None


def _refuse_layer(model: Any, index: int, layer: Any) -> None:
    if type(layer) is DynamicLayer:
        return
    kinds = [kind.__name__ for kind in type(layer).__mro__]
    reason = next(
        (_REASONS[kind] for kind in kinds if kind in _REASONS), "blocks hold the keys and values of plain layers"
    )
    raise UnsupportedModelError(f"{type(model).__name__}: layer {index} keeps a {kinds[0]}: {reason}")


def _measure(model: Any) -> Geometry:
    layers = _run_probe(model)
    for index, layer in enumerate(layers):
        _refuse_layer(model, index, layer)
        _refuse_contents(model, index, layer)
    name = type(model).__name__
    keys, values = layers[0].keys, layers[0].values
    shapes = {(layer.keys.shape, layer.values.shape, layer.keys.dtype, layer.values.dtype) for layer in layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"{name}: layers differ in heads, head size or type: {sorted(map(str, shapes))}")
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype or keys.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{name}: keys are {tuple(keys.shape)} {keys.dtype}, values {tuple(values.shape)} {values.dtype}"
        )
    return Geometry(
        kv_heads=keys.shape[1],
        key_dim=keys.shape[3],
        value_dim=values.shape[3],
        dtype=keys.dtype,
        devices=tuple(layer.keys.device for layer in layers),
    )


def _run_probe(model: Any) -> list[Any]:
    cache = DynamicCache(config=model.config)
    prompts = torch.tensor(_PROBE, device=model.device) % model.config.vocab_size
    try:
        with torch.no_grad():
            model(input_ids=prompts, use_cache=True, **{cache_argument(model.forward): cache})
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not run with a DynamicCache: {error}") from error
    return list(cache.layers)


def _refuse_contents(model: Any, index: int, layer: Any) -> None:
    name = f"{type(model).__name__}: layer {index}"
    if not layer.is_initialized or layer.get_seq_length() != len(_PROBE[0]):
        raise UnsupportedModelError(f"{name} keeps nothing per token: the model's state is elsewhere")
    shared = len(_PROBE[0]) // 2
    for tensor in (layer.keys, layer.values):
        if tensor.ndim != 4 or tensor.shape[0] != len(_PROBE):
            raise UnsupportedModelError(f"{name} keeps {tuple(tensor.shape)}, not [batch, heads, tokens, head size]")
        first, second = tensor[:, :, :shared].float()
        tolerance = 1e-3 if tensor.dtype == torch.float32 else 3e-2
        if not torch.equal(first, second) and not (first - second).abs().max() <= tolerance * first.abs().max():
            raise UnsupportedModelError(
                f"{name}: keys and values change with the tokens after them (the attention is not causal), "
                "so a prefix has none of its own"
            )

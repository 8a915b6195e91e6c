"""The identity of a `transformers` model: everything that its keys and values depend on, besides the tokens."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpool.adapters.transformers.geometry import rope_parameters
from kvpool.adapters.transformers.weights import default_digest_file, weights_digest
from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import KVLayout

_SAYS_NOTHING = frozenset({
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "label2id",
    "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
    "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Settings that no key or value depends on, or that have a field of their own; any other makes another identity."""


def model_identity(
    model: Any,
    layout: KVLayout,
    *,
    name: str | None = None,
    revision: str | None = None,
    weights: str | None = None,
    generation: bytes = b"",
    digest_file: Path | None = None,
) -> ModelIdentity:
    """Return the identity of `model`.

    `weights` is an explicit id that the caller vouches for; without it, the weights' whole content and the
    configuration are hashed, once: weights that are changed in place afterwards need another `generation`.
    """
    config = model.config
    if weights is None:
        digest = weights_digest(model, digest_file or default_digest_file())
        weights = f"{digest} config:{_settings_digest(config)}"
    return ModelIdentity(
        name=name or _name(model),
        weights=weights,
        layout=layout,
        revision=revision if revision is not None else str(getattr(config, "_commit_hash", None) or ""),
        rope=_canonical({"parameters": rope_parameters(config), "theta": getattr(config, "rope_theta", None)}),
        quantization=_quantization(config),
        generation=generation,
    )


def _name(model: Any) -> str:
    """The hub's name, or the name of the directory it was loaded from, or the architecture."""
    name = str(getattr(model, "name_or_path", "") or "")
    return (Path(name).resolve().name if name and Path(name).is_dir() else name) or type(model).__name__


def _settings_digest(config: Any) -> str:
    settings = {
        key: value for key, value in config.to_dict().items() if key not in _SAYS_NOTHING and not key.startswith("_")
    }
    return hashlib.sha256(_canonical(settings).encode()).hexdigest()[:32]


def _quantization(config: Any) -> str:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    return _canonical(settings if isinstance(settings, Mapping) else settings.to_dict())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)

"""Models small enough to be made in a test, with random weights; and the pools and prompts they are tried with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kvpool.adapters.transformers import Session, TransformersCache
from kvpool.adapters.transformers.geometry import generate_argument
from kvpool.config import RuntimeConfig
from kvpool.pool.pool import Pool

MIB = 1 << 20
BLOCK = 8
VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(kind: type, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(7)
    return kind(config).to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return made(LlamaForCausalLM, LlamaConfig(**{**SIZES, **options}), dtype)


def qwen2(dtype: torch.dtype = torch.float32) -> Any:
    return made(Qwen2ForCausalLM, Qwen2Config(**SIZES), dtype)


def mistral(dtype: torch.dtype = torch.float32, sliding_window: int | None = None) -> Any:
    return made(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=sliding_window), dtype)


def gemma(dtype: torch.dtype = torch.float32) -> Any:
    return made(GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=16), dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 512}
    return made(GPT2LMHeadModel, GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0), dtype)


def deepseek(dtype: torch.dtype = torch.float32) -> Any:
    """Latent attention: what it caches per token has another size for "keys" than for "values"."""
    latent: dict[str, Any] = {
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    }
    experts: dict[str, Any] = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    }
    config = DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **latent, **experts)
    return made(DeepseekV3ForCausalLM, config, dtype)


FAMILIES: dict[str, Callable[[torch.dtype], Any]] = {
    "llama": llama,
    "qwen2": qwen2,
    "mistral": mistral,
    "gemma": gemma,
    "gpt2": gpt2,
    "deepseek": deepseek,
}


def config(*, block_tokens: int = BLOCK, ram: int = 64 * MIB, ssd: int | None = None) -> RuntimeConfig:
    return RuntimeConfig.model_validate(
        {
            "name": "test",
            "blockTokens": block_tokens,
            "ram": {"capacityBytes": ram, "indexBytes": 16 * MIB},
            "ssd": None if ssd is None else {"capacityBytes": ssd, "secondHit": False, "budgetS": 10.0},
        }
    )


def opened(directory: Path, **options: Any) -> Pool:
    return Pool.open(config(**options), directory=directory / "pool")


def attached(pool: Pool, model: Any, directory: Path, **options: Any) -> TransformersCache:
    return TransformersCache(pool, model, digest_file=directory / "weights.json", **options)


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, tokens), generator=generator)


def padded(*rows: torch.Tensor) -> dict[str, Any]:
    """A batch, padded on the left with token 0, as a tokenizer returns it."""
    width = max(row.shape[1] for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - row.shape[1] :] = row[0]
        mask[number, width - row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, Any], tokens: int = 12, **options: Any) -> Any:
    """Exactly `tokens` tokens, with the logits of each."""
    fixed: dict[str, Any] = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    return model.generate(**inputs, **fixed, return_dict_in_generate=True, output_logits=True, **options)


def kept_in_memory(session: Session) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A copy of every layer's keys and values, as they are now."""
    return [(layer.keys.clone(), layer.values.clone()) for layer in session.past_key_values.layers]


def plain_cache(model: Any, memory: list[tuple[torch.Tensor, torch.Tensor]], columns: int) -> DynamicCache:
    """transformers' own cache, with the first columns of what was kept in memory."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(memory):
        if columns:
            cache.update(keys[:, :, :columns].clone(), values[:, :, :columns].clone(), layer)
    return cache


def continued(model: Any, inputs: dict[str, Any], cache: DynamicCache) -> dict[str, Any]:
    """The inputs of a run that continues from this cache."""
    return {**inputs, generate_argument(): cache}


def same(one: Any, other: Any) -> bool:
    """The same tokens, from the same logits, bit for bit."""
    logits = zip(one.logits, other.logits, strict=True)
    return torch.equal(one.sequences, other.sequences) and all(torch.equal(a, b) for a, b in logits)

"""What a pool is worth on a real model, in plain numbers: for the demo, and for `kvpool bench`."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvpool.adapters.transformers import TransformersCache
from kvpool.adapters.transformers.geometry import generate_argument
from kvpool.config import RuntimeConfig
from kvpool.demo.chats import handbook
from kvpool.demo.smollm2 import NAME, ChatModel, load_smollm2
from kvpool.demo.turn import FirstToken
from kvpool.pool.pool import Pool

_MIB = 1 << 20
_TENANT = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokenFigures:
    """Seconds from a prompt to its first token: medians of several rounds, taken in turns; of cold runs the best."""

    prompt_tokens: int
    loaded_tokens: int
    """What the pool had: whole blocks, and never the last token."""
    rounds: int
    cold_s: float
    """Nothing is kept."""
    pool_s: float
    """From the pool's ram tier: match, load and the rest of the prompt."""
    pool_load_s: float
    """The part of `pool_s` until the cache is filled."""
    memory_s: float
    """A `DynamicCache` in memory that lacks only the last token."""
    memory_same_tokens_s: float
    """A `DynamicCache` in memory with the very tokens that the pool had."""

    @property
    def times_sooner_than_cold(self) -> float:
        """Cold against pool."""
        return self.cold_s / self.pool_s

    @property
    def against_memory(self) -> float:
        """Pool against the `DynamicCache` that lacks only the last token."""
        return self.pool_s / self.memory_s

    @property
    def against_memory_same_tokens(self) -> float:
        """Pool against the `DynamicCache` with the same tokens."""
        return self.pool_s / self.memory_same_tokens_s


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadFigures:
    """What a pool costs where nothing is ever asked for again. Seconds are sums over all prompts."""

    prompts: int
    prompt_tokens: int
    answer_tokens: int
    plain_s: float
    """`model.generate` alone."""
    pool_s: float
    """The same through the pool, storing included."""
    session_s: float
    """The part of `pool_s` spent in making sessions and storing; the rest is generation."""

    @property
    def share(self) -> float:
        """Time spent for the pool, per time spent generating: this is what a user pays."""
        return self.session_s / (self.pool_s - self.session_s)

    @property
    def end_to_end(self) -> float:
        """Time with the pool against time without; below 1 where the adapter's cache saves more than the pool costs."""
        return self.pool_s / self.plain_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolLM2Figures:
    """Everything that `measure_smollm2` measures."""

    block_tokens: int
    threads: int
    first_token: FirstTokenFigures
    no_repeats: OverheadFigures


def measure_smollm2(
    *, rounds: int = 7, prompt_tokens: int = 2000, block_tokens: int = 16, overhead_prompts: int = 4
) -> SmolLM2Figures:
    """Measure on SmolLM2, with a pool of its own in a temporary directory: about a minute on two cores.

    With 16 tokens to a block a prompt of 2,000 consists of whole blocks; with 64, its last 16 tokens are computed each
    time. Raises `ModelMissingError` where the package that ships the model is not installed.
    """
    chat_model = load_smollm2()
    with tempfile.TemporaryDirectory(prefix="kvpool-bench-") as directory, _pool(Path(directory), block_tokens) as pool:
        cache = TransformersCache(pool, chat_model.model, name=NAME)
        return SmolLM2Figures(
            block_tokens=block_tokens,
            threads=torch.get_num_threads(),
            first_token=first_token(cache, prompt_of(chat_model, prompt_tokens), rounds=rounds),
            no_repeats=no_repeats(cache, overhead_prompts),
        )


def prompt_of(chat_model: ChatModel, tokens: int) -> torch.Tensor:
    """That many tokens of real text, as [1, tokens]."""
    text = handbook()
    ids = chat_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([(ids * (1 + tokens // len(ids)))[:tokens]])


def first_token(
    cache: TransformersCache, prompt: torch.Tensor, *, rounds: int, cold_rounds: int = 2, tenant: str = _TENANT
) -> FirstTokenFigures:
    """Measure how soon a prompt's first token is there when the prompt was asked before, and when it was not."""
    model = cache.model
    cold = [_first_token(model, prompt, DynamicCache(config=model.config)) for _ in range(cold_rounds)]
    memory = DynamicCache(config=model.config)
    _first_token(model, prompt, memory)
    cache.generate(prompt, tenant=tenant, max_new_tokens=1, do_sample=False)
    pooled, loads, whole, same = [], [], [], []
    for _ in range(rounds):
        began = time.perf_counter()
        with cache.session(prompt, tenant=tenant, room_tokens=1) as session:
            loads.append(time.perf_counter() - began)
            loaded = session.loaded_columns
            pooled.append(loads[-1] + _first_token(model, prompt, session.past_key_values))
        whole.append(_again(model, prompt, memory, prompt.shape[1] - 1))
        same.append(_again(model, prompt, memory, loaded))
    return FirstTokenFigures(
        prompt_tokens=prompt.shape[1],
        loaded_tokens=loaded,
        rounds=rounds,
        cold_s=min(cold),
        pool_s=statistics.median(pooled),
        pool_load_s=statistics.median(loads),
        memory_s=statistics.median(whole),
        memory_same_tokens_s=statistics.median(same),
    )


def no_repeats(
    cache: TransformersCache, prompts: int, *, prompt_tokens: int = 500, answer_tokens: int = 32
) -> OverheadFigures:
    """Measure what the pool costs on random prompts that nobody has asked before."""
    generator = torch.Generator().manual_seed(time.time_ns() % (1 << 62))
    vocabulary = cache.model.config.vocab_size
    plain_s = pool_s = session_s = 0.0
    options: dict[str, Any] = {"max_new_tokens": answer_tokens, "min_new_tokens": answer_tokens, "do_sample": False}
    for _ in range(prompts):
        prompt = torch.randint(100, vocabulary, (1, prompt_tokens), generator=generator)
        mask = torch.ones_like(prompt)
        began = time.perf_counter()
        cache.model.generate(input_ids=prompt, attention_mask=mask, **options)
        plain_s += time.perf_counter() - began
        began = time.perf_counter()
        with cache.session(prompt, mask, tenant=_TENANT, room_tokens=answer_tokens) as session:
            opened = time.perf_counter()
            output = cache.model.generate(**session.inputs, **options)
            generated = time.perf_counter()
            session.store(output)
        ended = time.perf_counter()
        pool_s += ended - began
        session_s += (opened - began) + (ended - generated)
    return OverheadFigures(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        plain_s=plain_s,
        pool_s=pool_s,
        session_s=session_s,
    )


def _first_token(model: Any, prompt: torch.Tensor, past: Any) -> float:
    """Seconds until the first token, going on from `past`, which holds the whole prompt then."""
    first = FirstToken()
    arguments = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), generate_argument(): past}
    began = time.perf_counter()
    model.generate(**arguments, max_new_tokens=1, do_sample=False, streamer=first)
    return first.at_s - began


def _again(model: Any, prompt: torch.Tensor, memory: DynamicCache, tokens: int) -> float:
    """The same from the first `tokens` tokens of a cache in memory, which holds the whole prompt before and after."""
    memory.crop(tokens - memory.get_seq_length())
    return _first_token(model, prompt, memory)


def _pool(directory: Path, block_tokens: int) -> Pool:
    """Room for some ten thousand tokens in ram, and no ssd."""
    ram = {"capacityBytes": 512 * _MIB, "indexBytes": 64 * _MIB}
    config = RuntimeConfig.model_validate({"name": "bench", "blockTokens": block_tokens, "ram": ram, "ssd": None})
    return Pool.open(config, directory=directory / "pool")

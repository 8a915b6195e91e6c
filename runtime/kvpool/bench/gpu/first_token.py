"""Time to first token of a repeated prompt: its blocks in the gpu tier, beside its cache left in device memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.rounds import of_pairs
from kvpool.bench.row import Figure, Row, at_least, ratio_at_most
from kvpool.blocks.layout import Dtype, KVLayout

if TYPE_CHECKING:
    from torch import Tensor

    from kvpool.bench.gpu.machine import Machine
    from kvpool.tiers.gpu.tier import GpuTier

PROMPT_TOKENS = 4_096
BLOCK_TOKENS = 64
_MS = 1e3


class Shape(NamedTuple):
    """A random-weight Llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int


LARGER = Shape(layers=24, hidden=2_048, heads=16, kv_heads=8)
"""Of 1.5 billion weights."""


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `first-token`."""
    try:
        from kvpool.bench.gpu.machine import Machine

        machine = Machine.with_cuda()
        from kvpool.demo.smollm2 import ModelMissingError, load_smollm2
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed: pip install 'kvpool[demo]'") from None
    yield from measure(machine, "random-llama", random_llama(LARGER), conditions)
    try:
        model = load_smollm2().model
    except ModelMissingError as error:
        raise UnmeasurableError(str(error)) from None
    yield from measure(machine, "smollm2", model, conditions)


def random_llama(shape: Shape) -> Any:
    """Seeded weights, in float32 on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=4 * shape.hidden,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=8_192,
        max_position_embeddings=2 * PROMPT_TOKENS,
    )  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(config)


def measure(machine: Machine, name: str, model: Any, conditions: Conditions) -> Iterator[Row]:
    """Rows of one model, on any device: half precision on CUDA."""
    import torch

    dtype = Dtype.FLOAT16 if machine.is_cuda else Dtype.FLOAT32
    model = model.to(device=machine.name, dtype=getattr(torch, dtype)).eval()
    blocks = conditions.scaled(PROMPT_TOKENS // BLOCK_TOKENS, least=2)
    prompt = torch.randint(0, 8_192, (1, blocks * BLOCK_TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        again = _Again(machine, model, prompt.to(machine.name), dtype, BLOCK_TOKENS)
        with closing(again.tier):
            cold_s = min(machine.timed(again.cold) for _ in range(3))
            if again.from_tier() != again.from_memory():
                raise AssertionError("blocks from the tier give another token than the cache that they were taken from")
            pairs = [
                (machine.timed(again.from_tier), machine.timed(again.from_memory)) for _ in range(3 * conditions.rounds)
            ]
    figure = of_pairs(pairs)
    yield Row(f"first-token.{name}.again", "ms", figure.in_unit(_MS), ratio_at_most(1.15))
    yield Row(f"first-token.{name}.cold", "ms", Figure(cold_s * _MS))
    yield Row(f"first-token.{name}.sooner-than-cold", "x", Figure(cold_s / figure.value), at_least(1))


class _Again:
    """A prompt whose cache lies in memory, and in blocks of the tier. Each way computes its last token alone."""

    def __init__(self, machine: Machine, model: Any, prompt: Tensor, dtype: Dtype, block_tokens: int) -> None:
        from transformers import DynamicCache

        from kvpool.adapters.transformers.geometry import cache_argument

        self._model = model
        self._cache_argument = cache_argument(model.forward)
        self._prompt = prompt
        self._memory: Any = DynamicCache(config=model.config)
        self._forward(prompt, self._memory)
        first: Any = self._memory.layers[0]
        keys, values = first.keys, first.values
        self._layout = KVLayout(
            layers=len(self._memory.layers), kv_heads=keys.shape[1], head_size=keys.shape[3], dtype=dtype,
            block_tokens=block_tokens, value_head_size=values.shape[3],
        )  # fmt: skip
        self._blocks = prompt.shape[1] // block_tokens
        self.tier = self._opened(machine)
        self._places = self.tier.allocate_many(self._layout.record_bytes, self._blocks, "bench")
        self._store()

    def cold(self) -> int:
        """The first token, from the prompt alone."""
        from transformers import DynamicCache

        return self._forward(self._prompt, DynamicCache(config=self._model.config))

    def from_memory(self) -> int:
        """From the cache that was left in memory."""
        self._memory.crop(-1)
        return self._forward(self._prompt[:, -1:], self._memory)

    def from_tier(self) -> int:
        """From a new cache, filled with the tier's blocks."""
        import torch
        from transformers import DynamicCache

        layout = self._layout
        shape = layout.layers, 2, 1, layout.kv_heads, self._prompt.shape[1], layout.head_size
        both = torch.empty(shape, dtype=getattr(torch, layout.dtype), device=self._prompt.device)
        for tokens, payload in self._payloads():
            both[:, :, 0, :, tokens].copy_(payload)
        cache = DynamicCache(config=self._model.config)
        for layer, (keys, values) in enumerate(both[:, :, :, :, :-1]):
            cache.update(keys, values, layer)
        return self._forward(self._prompt[:, -1:], cache)

    def _store(self) -> None:
        for tokens, payload in self._payloads():
            for layer, held in zip(payload, self._memory.layers, strict=True):
                layer[0].copy_(held.keys[0, :, tokens])
                layer[1].copy_(held.values[0, :, tokens])

    def _payloads(self) -> Iterator[tuple[slice, Tensor]]:
        """Each block's tokens, and its payload as [layer, keys and values, head, token, dimension]."""
        import torch

        layout = self._layout
        shape: Sequence[int] = (layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_size)
        for index, place in enumerate(self._places):
            first = index * layout.block_tokens
            payload = self.tier.payload(place)[: layout.payload_bytes].view(getattr(torch, layout.dtype)).view(shape)
            yield slice(first, first + layout.block_tokens), payload

    def _forward(self, tokens: Tensor, cache: Any) -> int:
        cached = {self._cache_argument: cache}
        logits = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cached).logits
        return int(logits[0, -1].argmax())

    def _opened(self, machine: Machine) -> GpuTier:
        from kvpool.tiers.gpu.tier import GpuTier

        capacity_bytes = self._layout.record_bytes * (self._blocks + 1)
        return GpuTier(capacity_bytes, device=machine.device, extent_bytes=capacity_bytes, margin_bytes=0)

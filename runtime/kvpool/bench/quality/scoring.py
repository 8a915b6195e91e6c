"""A model that goes on from a context's keys and values, whatever these went through; and how its words then differ.

The cache is cut into blocks and put together again by the adapter's own copies, so that a block is what a pool stores.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvpool.adapters.transformers.block_copy import CacheSink, CacheSource
from kvpool.adapters.transformers.geometry import cache_argument, inspect_model
from kvpool.adapters.transformers.host_memory import HostMemory
from kvpool.adapters.transformers.layers import KVBuffer, pooled_cache, slabs_of
from kvpool.blocks.record import Buffer


class Scorer:
    """A model, and the layout of its blocks.

    `rounded_to` is a type that keys and values are rounded to before they become blocks; None: the model's own. So a
    CPU without 16-bit arithmetic, which would take ten times as long, can say what a codec does to 16-bit blocks.
    """

    def __init__(self, model: Any, block_tokens: int, *, rounded_to: torch.dtype | None = None) -> None:
        self._model = model
        self._geometry = inspect_model(model)
        self._memory = HostMemory()
        self._stored = rounded_to or self._geometry.dtype
        self._held_layout = self._geometry.layout(block_tokens)
        self.layout = self._geometry._replace(dtype=self._stored).layout(block_tokens)

    def blocks_of(self, context: Sequence[int]) -> Buffer:
        """Run the context; the payloads of its whole blocks, uint8 [blocks, payload bytes]."""
        cache = self._cache(self._buffer(len(context)), 0)
        self._run(context, cache, logits_to_keep=1)
        slabs, length = slabs_of(cache, self._geometry, batch=1)
        source = CacheSource(self._held_layout, slabs, row=0, padding=0)
        payloads = np.empty((length // self.layout.block_tokens, self._held_layout.payload_bytes), np.uint8)
        for index, payload in enumerate(payloads):
            source.read_block(index, payload)
        return _converted(payloads, self._geometry.dtype, self._stored)

    def going_on(self, payloads: Buffer, given: Sequence[int]) -> "Words":
        """What the model says after each of the given tokens, when the context's blocks are these."""
        tokens = len(payloads) * self.layout.block_tokens
        buffer = self._buffer(tokens + len(given))
        sink = CacheSink(self._held_layout, buffer.slabs, row=0, padding=0, end=tokens)
        for index, payload in enumerate(_converted(payloads, self._stored, self._geometry.dtype)):
            sink.write_block(index, payload)
        logits = self._run(given, self._cache(buffer, tokens))
        return Words(torch.log_softmax(logits[0].float(), dim=-1))

    def _buffer(self, tokens: int) -> KVBuffer:
        return KVBuffer(self._geometry, 1, tokens, self._memory)

    def _cache(self, buffer: KVBuffer, tokens: int) -> Any:
        return pooled_cache(buffer, self.layout.layers, tokens)

    @torch.no_grad()
    def _run(self, tokens: Sequence[int], cache: Any, **options: Any) -> torch.Tensor:
        argument = {cache_argument(self._model.forward): cache}
        logits: torch.Tensor = self._model(torch.tensor([tokens]), use_cache=True, **argument, **options).logits
        return logits


def _converted(payloads: Buffer, numbers: torch.dtype, to: torch.dtype) -> Buffer:
    """The same numbers in another type; the very same payloads where it is the same type."""
    if numbers == to:
        return payloads
    converted: Buffer = torch.from_numpy(payloads).view(numbers).to(to).view(torch.uint8).numpy()
    return converted


class Difference(NamedTuple):
    """How one way of going on differs from the uncompressed one; sums over `tokens` positions."""

    tokens: int
    loss: float
    """-ln of the probabilities of what was expected."""
    exact_loss: float
    """The same without compression."""
    divergence: float
    """Kullback-Leibler, of the uncompressed probabilities from these; nats."""
    agreed: int
    """Positions where the likeliest token is the same."""


class Words:
    """Logarithms of the probabilities of every token at every position, float32 [positions, vocabulary]."""

    def __init__(self, logarithms: torch.Tensor) -> None:
        self.logarithms = logarithms
        self._likeliest = logarithms.argmax(dim=-1)

    def loss(self, expected: Sequence[int]) -> float:
        """-ln of the probabilities of these tokens, one for each position; summed."""
        at = torch.tensor(expected).unsqueeze(1)
        return -float(self.logarithms.gather(1, at).sum(dtype=torch.float64))

    def against(self, exact: "Words", expected: Sequence[int]) -> Difference:
        """How these differ from those without compression."""
        return Difference(
            tokens=len(expected),
            loss=self.loss(expected),
            exact_loss=exact.loss(expected),
            divergence=self._divergence_of(exact),
            agreed=int((self._likeliest == exact._likeliest).sum()),
        )

    def _divergence_of(self, exact: "Words") -> float:
        """Sum of p (e^d - 1 - d), d = ln q - ln p: the same as sum of -p d, for p and q both sum up to 1.

        No term is negative, so that nothing cancels out: differences of 1e-5 would be noise otherwise.
        """
        apart = self.logarithms - exact.logarithms
        terms = exact.logarithms.exp().mul_(torch.expm1(apart).sub_(apart))
        return max(0.0, float(terms.sum(dtype=torch.float64)))

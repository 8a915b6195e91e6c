"""The same keys and values, kept in memory: what answers from the pool are compared with.

Taken from the model's cache by plain slices, and given back as transformers' own cache, so that no code of the adapter
or the pool is in between. Written to a file only so that the second process has them in memory too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache


class InMemoryBlocks:
    """Keys and values by block; tensors are [layers, heads, tokens, head size]."""

    def __init__(self, block_tokens: int, blocks: dict[str, torch.Tensor] | None = None) -> None:
        self._block_tokens = block_tokens
        self._blocks = blocks or {}

    def keep(self, key: str, index: int, cache: Any) -> None:
        """Keep block `index` of what the cache of a single prompt holds."""
        columns = slice(index * self._block_tokens, (index + 1) * self._block_tokens)
        self._blocks[f"{key}.keys"] = torch.stack([layer.keys[0, :, columns] for layer in cache.layers])
        self._blocks[f"{key}.values"] = torch.stack([layer.values[0, :, columns] for layer in cache.layers])

    def payload(self, key: str) -> Any:
        """The block as the pool is to have it: per layer its keys, then its values."""
        keys, values = self._blocks[f"{key}.keys"], self._blocks[f"{key}.values"]
        layers = [part.flatten() for pair in zip(keys, values, strict=True) for part in pair]
        return torch.cat(layers).view(torch.uint8).numpy()

    def cache(self, config: Any, keys: Sequence[str], tokens: int) -> DynamicCache:
        """transformers' own cache, holding the first `tokens` tokens of these blocks."""
        needed = keys[: -(-tokens // self._block_tokens)]
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers if needed else 0):
            sides = [
                torch.cat([self._blocks[f"{key}.{side}"][layer] for key in needed], dim=1)[
                    None, :, :tokens
                ].contiguous()
                for side in ("keys", "values")
            ]
            cache.update(sides[0], sides[1], layer)
        return cache

    def save(self, path: Path) -> None:
        """Write all blocks to a file."""
        save_file(self._blocks, path)

    @classmethod
    def load(cls, path: Path, block_tokens: int) -> "InMemoryBlocks":
        """Read what `save` has written."""
        return cls(block_tokens, load_file(path))

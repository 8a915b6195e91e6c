"""What a codec did to a model's words and to its keys and values, summed over windows."""

from dataclasses import dataclass, field
from math import exp, expm1, sqrt
from statistics import stdev

import torch

from kvpool.adapters.transformers.geometry import DTYPES
from kvpool.bench.quality.scoring import Difference
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer

_TYPES = {dtype: number for number, dtype in DTYPES.items()}


class Distance:
    """Of keys, or of values, from what they were: a relative Frobenius norm."""

    def __init__(self) -> None:
        self._apart = self._whole = 0.0

    def add(self, numbers: torch.Tensor, exact: torch.Tensor) -> None:
        """Take more of them into account."""
        self._apart += _squares(numbers - exact)
        self._whole += _squares(exact)

    @property
    def share(self) -> float:
        """|x - exact| / |exact|; 0 while there is nothing."""
        return sqrt(self._apart / self._whole) if self._whole else 0.0


@dataclass
class Outcome:
    """Of one codec; filled window by window."""

    layout: KVLayout
    differences: list[Difference] = field(default_factory=list)
    keys: Distance = field(default_factory=Distance)
    values: Distance = field(default_factory=Distance)
    plain_bytes: int = 0
    stored_bytes: int = 0

    def add(self, difference: Difference, payloads: Buffer, exact: Buffer, stored_bytes: int) -> None:
        """Take a window into account; payloads are uint8 [blocks, payload bytes]."""
        self.differences.append(difference)
        self.plain_bytes += exact.size
        self.stored_bytes += stored_bytes
        keys, values = self._planes(payloads)
        exact_keys, exact_values = self._planes(exact)
        self.keys.add(keys, exact_keys)
        self.values.add(values, exact_values)

    @property
    def tokens(self) -> int:
        """Positions that were scored."""
        return sum(difference.tokens for difference in self.differences)

    @property
    def exact_perplexity(self) -> float:
        """Without compression."""
        return exp(sum(difference.exact_loss for difference in self.differences) / self.tokens)

    @property
    def perplexity(self) -> float:
        """e to the mean of -ln of the probabilities of what was expected."""
        return exp(sum(difference.loss for difference in self.differences) / self.tokens)

    @property
    def perplexity_change(self) -> float:
        """Share by which the perplexity is higher than without compression."""
        return expm1(sum(difference.loss - difference.exact_loss for difference in self.differences) / self.tokens)

    @property
    def perplexity_error(self) -> float:
        """Standard error of the change, from how it differs between windows; 0 where there is but one."""
        changes = [(difference.loss - difference.exact_loss) / difference.tokens for difference in self.differences]
        return stdev(changes) / sqrt(len(changes)) if len(changes) > 1 else 0.0

    @property
    def divergence(self) -> float:
        """Kullback-Leibler per position, in nats."""
        return sum(difference.divergence for difference in self.differences) / self.tokens

    @property
    def agreement(self) -> float:
        """Share of the positions where greedy decoding takes the same token."""
        return sum(difference.agreed for difference in self.differences) / self.tokens

    @property
    def compression(self) -> float:
        """Bytes of the payloads for each byte stored."""
        return self.plain_bytes / self.stored_bytes

    def _planes(self, payloads: Buffer) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as float32."""
        layout = self.layout
        layers = torch.from_numpy(payloads).view(_TYPES[layout.dtype]).view(len(payloads), layout.layers, -1)
        keys = layout.key_plane_bytes // layout.dtype.itemsize
        return layers[..., :keys].float(), layers[..., keys:].float()


def _squares(numbers: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(numbers, dtype=torch.float64)) ** 2

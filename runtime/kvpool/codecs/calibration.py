"""Learning clip limits from a model's first blocks.

A channel's limit is a percentile of the absolute values that it had in all of these blocks: of n values the one at
place ceil(percentile / 100 * (n - 1)) from below, an observed value (numpy's method `higher`). It is exact, and needs
no more memory than the values above it: a few for each channel at 99.99 %. Within one block of 64 tokens such a
percentile is the maximum, so that clipping by a block's own values would do nothing; over a thousand blocks it finds
the outliers.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from kvpool.blocks.layout import Dtype, KVLayout, Plane
from kvpool.blocks.record import Buffer
from kvpool.codecs.format import QUANTIZABLE
from kvpool.codecs.limits import ClipLimits, Floats
from kvpool.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_KEPT_BYTES = 64 << 20


class Calibrator:
    """Takes blocks until it is `done`, then knows the limits. One thread at a time.

    A low percentile of many blocks would need much memory: it is then learnt from as many blocks as `MAX_KEPT_BYTES`
    allow (`samples` says how many), from one block at least.
    """

    def __init__(self, layout: KVLayout, samples: int, percentile: float) -> None:
        if layout.dtype not in QUANTIZABLE:
            raise InputError(f"clip limits are for float payloads, not {layout.dtype}")
        if samples < 1 or not 50 < percentile <= 100:
            raise InputError(f"calibration needs a block or more, and a percentile above 50: {samples}, {percentile}")
        self.layout = layout
        self.percentile = percentile
        self.samples = samples
        while self.samples > 1 and 4 * _kept(layout, self.samples, percentile) * _channels(layout) > MAX_KEPT_BYTES:
            self.samples = max(1, self.samples * 3 // 4)
        self.seen = 0
        kept = _kept(layout, self.samples, percentile)
        heads = layout.layers, layout.kv_heads
        self._largest = (
            np.zeros((*heads, kept, layout.head_size), np.float32),
            np.zeros((*heads, kept, layout.value_dim), np.float32),
        )

    @property
    def done(self) -> bool:
        """Whether it has seen as many blocks as it takes."""
        return self.seen >= self.samples

    def observe(self, payload: Buffer) -> None:
        """Learn from a block: a numpy uint8 payload. One that holds an infinity or NaN is passed over."""
        if self.done:
            return
        if payload.nbytes != self.layout.payload_bytes:
            raise InputError(f"payload has {payload.nbytes} bytes; it must have exactly {self.layout.payload_bytes}")
        planes = [(plane, np.abs(_floats(payload, plane, self.layout.dtype))) for plane in self.layout.planes()]
        if not all(np.isfinite(values.max()) for _, values in planes):
            return
        for (plane, values), which in zip(planes, self._which(), strict=False):
            _merge(self._largest[which][plane.layer], values)
        self.seen += 1

    def limits(self) -> ClipLimits:
        """The limits by what was seen so far. `InputError` if that is nothing."""
        if not self.seen:
            raise InputError("no block was observed yet")
        place = _kept(self.layout, self.seen, self.percentile)
        keys, values = (_limits(largest, place) for largest in self._largest)
        return ClipLimits(keys, values, self.seen, self.percentile)

    def _which(self) -> Iterator[int]:
        """0 for keys, 1 for values, in the order of planes."""
        while True:
            yield 0
            if self.layout.value_dim:
                yield 1


def _kept(layout: KVLayout, blocks: int, percentile: float) -> int:
    """Which value from above, counted from 1, is the percentile of so many blocks."""
    values = blocks * layout.block_tokens
    return values - ceil(percentile / 100 * (values - 1))


def _channels(layout: KVLayout) -> int:
    return layout.layers * layout.kv_heads * (layout.head_size + layout.value_dim)


def _floats(payload: Buffer, plane: Plane, dtype: Dtype) -> Floats:
    """A plane as float32 [heads, tokens, dim]."""
    raw = payload[plane.offset : plane.offset + plane.nbytes]
    if dtype is Dtype.BFLOAT16:
        bits: NDArray[np.uint32] = raw.view(np.uint16).astype(np.uint32) << np.uint32(16)
        floats = bits.view(np.float32)
    else:
        floats = raw.view(np.float32 if dtype is Dtype.FLOAT32 else np.float16).astype(np.float32)
    return floats.reshape(plane.heads, plane.tokens, plane.dim)


def _merge(largest: Floats, values: Floats) -> None:
    """Keep the largest of both, per head and channel. Nearly all channels of nearly all blocks change nothing."""
    kept = largest.shape[1]
    heads, channels = np.nonzero(values.max(axis=1) > largest.min(axis=1))
    if len(heads):
        both = np.concatenate((largest[heads, :, channels], values[heads, :, channels]), axis=1)
        largest[heads, :, channels] = np.partition(both, both.shape[1] - kept, axis=1)[:, -kept:]


def _limits(largest: Floats, place: int) -> Floats:
    """The `place`-th largest of each channel; a channel that was zero throughout is not limited."""
    kept = largest.shape[2]
    limits = np.partition(largest, kept - place, axis=2)[:, :, kept - place]
    return np.where(limits > 0, limits, np.float32(np.inf))

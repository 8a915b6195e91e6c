"""What is tried: every codec, granularity and clipping that saves something on a layout; and one of them on blocks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvpool.api import Codec, Granularity
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer
from kvpool.codecs import Calibrator, ClipLimits, PayloadCodec, codec_for

INTEGERS = (Codec.INT8_SYMMETRIC, Codec.INT8_ASYMMETRIC, Codec.INT4_ASYMMETRIC)


class Trial(NamedTuple):
    """A codec as a pool would use it. `limits` None: a block's scales are of its own values alone."""

    name: str
    codec: PayloadCodec
    limits: ClipLimits | None = None

    def through(self, payloads: Buffer) -> "Stored":
        """Encode and decode blocks, uint8 [blocks, payload bytes]; what the codec refuses is stored as it is."""
        decoded = np.empty_like(payloads)
        encoded = np.empty(self.codec.encoded_bytes, np.uint8)
        stored_bytes = 0
        for payload, into in zip(payloads, decoded, strict=True):
            if self.codec.encode(payload, encoded, self.limits) is None:
                self.codec.decode(encoded, into)
                stored_bytes += self.codec.encoded_bytes
            else:
                np.copyto(into, payload)
                stored_bytes += len(payload)
        return Stored(decoded, stored_bytes)


class Stored(NamedTuple):
    """Blocks as they come back, and the bytes that they took: scales included, header pages and padding not."""

    payloads: Buffer
    stored_bytes: int


def limits_of(
    layout: KVLayout, blocks: Iterable[Buffer], *, samples: int, percentiles: Sequence[float]
) -> dict[float, ClipLimits]:
    """Clip limits learnt from these blocks, of which there are `samples`, at each of the percentiles."""
    calibrators = {percentile: Calibrator(layout, samples, percentile) for percentile in percentiles}
    for payload in blocks:
        for calibrator in calibrators.values():
            calibrator.observe(payload)
    return {percentile: calibrator.limits() for percentile, calibrator in calibrators.items()}


def trials(layout: KVLayout, limits: Mapping[float, ClipLimits]) -> Iterator[Trial]:
    """fp16; then each codec of integers at each granularity, without clipping and with it.

    At the codec's own granularity with each of the limits, which are by percentile; at the others with the first.
    """
    first = dict(list(limits.items())[:1])
    if (halved := codec_for(layout, Codec.FP16)) is not None:
        yield Trial("fp16", halved)
    for codec in INTEGERS:
        for granularity in Granularity:
            if (found := codec_for(layout, codec, granularity)) is not None:
                at = limits if granularity is Granularity.AUTO else first
                yield from _clipped_or_not(f"{codec}.{granularity}", found, at)


def _clipped_or_not(name: str, codec: PayloadCodec, limits: Mapping[float, ClipLimits]) -> Iterator[Trial]:
    yield Trial(name, codec)
    for percentile, learnt in limits.items():
        yield Trial(f"{name}.clipped-at-{percentile:g}", codec, learnt)

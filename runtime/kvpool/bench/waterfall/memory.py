"""Memory that stands for an inference engine's: numbers like keys and values go out of it, and others come in."""

from itertools import cycle

import numpy as np

from kvpool.bench.codecs.payloads import Data, numbers, payload_of
from kvpool.bench.probes import touched
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer


class EngineNumbers:
    """A source and a sink, each of so many blocks by turns. Codecs find in them what they find in a model's."""

    def __init__(self, layout: KVLayout, blocks: int) -> None:
        self._source = cycle([payload_of(layout, numbers(layout, Data.NORMAL, seed)) for seed in range(blocks)])
        self._sink = cycle(touched(layout.payload_bytes * blocks).reshape(blocks, layout.payload_bytes))

    def read_block(self, index: int, into: Buffer) -> None:
        """As `BlockSource` says."""
        np.copyto(into, next(self._source))

    def write_block(self, index: int, payload: Buffer) -> None:
        """As `BlockSink` says."""
        np.copyto(next(self._sink), payload)

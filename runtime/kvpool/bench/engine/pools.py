"""Pools, models, sources and sinks for the benchmarks that go through the library's public face."""

import random
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvpool.api import Eviction
from kvpool.bench.probes import touched
from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.blocks.record import Buffer
from kvpool.config import PolicyConfig, RamConfig, RuntimeConfig, SharingConfig, SsdConfig
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK_TOKENS = 64
_LAYER_BYTES = 128 * KIB
"""Keys and values of 64 tokens in one layer of 8 heads of size 64, in 16 bits."""


def layout_of(payload_bytes: int) -> KVLayout:
    """A layout with payloads of exactly this size: whole layers of 128 KiB, or one small one of whole 256 bytes."""
    if payload_bytes >= _LAYER_BYTES:
        return KVLayout(layers=payload_bytes // _LAYER_BYTES, kv_heads=8, head_size=64, dtype=Dtype.BFLOAT16)
    return KVLayout(layers=1, kv_heads=1, head_size=payload_bytes // (BLOCK_TOKENS * 4), dtype=Dtype.BFLOAT16)


def pool_config(
    *,
    ram_bytes: int,
    ssd_bytes: int | None = None,
    second_hit: bool = False,
    index_bytes: int = 256 * MIB,
    eviction: Eviction = Eviction.ADAPTIVE,
) -> RuntimeConfig:
    """Without an ssd tier if `ssd_bytes` is None. Nothing is protected from the policy, no budget on writes."""
    ssd = (
        None
        if ssd_bytes is None
        else SsdConfig(capacity_bytes=ssd_bytes, second_hit=second_hit, daily_write_bytes=None)
    )
    return RuntimeConfig(
        name="bench",
        ram=RamConfig(capacity_bytes=ram_bytes, index_bytes=index_bytes),
        ssd=ssd,
        sharing=SharingConfig(protect_shared=False),
        policy=PolicyConfig(eviction=eviction),
    )


def open_model(config: RuntimeConfig, directory: Path, payload_bytes: int) -> "OpenModel":
    """A pool in this directory, and a model in it with blocks of this size."""
    pool = Pool.open(config, directory=directory)
    return OpenModel(pool, pool.register(spec_of(payload_bytes)))


def spec_of(payload_bytes: int, name: str = "bench") -> ModelSpec:
    """A model with blocks of this size."""
    return ModelSpec(identity=ModelIdentity(name=name, weights="none", layout=layout_of(payload_bytes)))


class OpenModel(NamedTuple):
    """A pool, and its only model."""

    pool: Pool
    model: Model


class Prompts:
    """Random prompts, the same for the same seed."""

    def __init__(self, seed: int = 1) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - tokens, not secrets

    def next(self, blocks: int) -> bytes:
        """Token ids of so many blocks."""
        return self._rng.randbytes(4 * BLOCK_TOKENS * blocks)


class EngineMemory:
    """Warm memory of some blocks that stands for an inference engine's: a source and a sink that copy, by turns."""

    def __init__(self, payload_bytes: int, blocks: int) -> None:
        self._rows = touched(payload_bytes * blocks).reshape(blocks, payload_bytes)
        self._turn = cycle(range(blocks))

    def read_block(self, index: int, into: Buffer) -> None:
        """As `BlockSource` says."""
        np.copyto(into, self._rows[next(self._turn)])

    def write_block(self, index: int, payload: Buffer) -> None:
        """As `BlockSink` says."""
        np.copyto(self._rows[next(self._turn)], payload)


class InPlace:
    """A sink that reads a block where it lies: its first and its last byte."""

    def __init__(self) -> None:
        self.seen = 0

    def write_block(self, index: int, payload: Buffer) -> None:
        """As `BlockSink` says."""
        self.seen += int(payload[0]) + int(payload[-1])

"""Small models, prompts and payloads for the tests of the pool. A payload is a function of the block's identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.blocks.record import Buffer
from kvpool.blocks.tokens import token_bytes
from kvpool.config import RuntimeConfig
from kvpool.pool.model import Model
from kvpool.pool.results import ModelSpec, StoreResult

BLOCK_TOKENS = 4
KIB, MIB = 1 << 10, 1 << 20
LAYOUT = KVLayout(layers=2, kv_heads=1, head_size=128, dtype=Dtype.FLOAT32, block_tokens=BLOCK_TOKENS)
"""8 KiB of payload, 12 KiB of record."""
RECORD = LAYOUT.record_bytes


def identity(name: str = "m", *, layout: KVLayout = LAYOUT, weights: str = "w") -> ModelIdentity:
    return ModelIdentity(name=name, weights=weights, layout=layout)


def spec(name: str = "m", **options: object) -> ModelSpec:
    return ModelSpec(identity=identity(name, **options))  # type: ignore[arg-type]


def config(*, ram: int = 64 * RECORD, ssd: int | None = None, directory: Path | None = None, **ssd_options: object):  # type: ignore[no-untyped-def]
    """A pool of two tiers; `ssd` None: of one."""
    ssd_section = None if ssd is None else {"capacityBytes": ssd, "secondHit": False, **ssd_options}
    return RuntimeConfig.model_validate(
        {
            "name": "test",
            "blockTokens": BLOCK_TOKENS,
            "ram": {"capacityBytes": ram, "indexBytes": 64 * MIB},
            "ssd": ssd_section,
            "directory": directory,
        }
    )


def prompt(blocks: int, seed: int = 0, extra_tokens: int = 0) -> list[int]:
    """Token ids that no prompt of another seed begins with."""
    return [seed * 100_000 + at for at in range(blocks * BLOCK_TOKENS + extra_tokens)]


def payload(model: ModelIdentity, tokens: bytes, block: int, salt: str = "") -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """What block `block` of a prompt holds: other bytes for every other prefix, model and salt (a tenant, say)."""
    prefix = tokens[: (block + 1) * model.layout.token_bytes]
    seed = hashlib.blake2b(model.fingerprint + prefix + salt.encode(), digest_size=8).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
    return generator.integers(0, 256, model.layout.payload_bytes, np.uint8)


class Prompt:
    """Source and sink of one prompt's blocks: writes what is right, and counts what arrives wrong."""

    def __init__(self, model: Model, tokens: object, salt: str = "") -> None:
        self.model = model
        self.tokens = token_bytes(tokens)
        self.salt = salt
        self.read: list[int] = []
        self.written: list[int] = []
        self.wrong: list[int] = []

    def read_block(self, index: int, into: Buffer) -> None:
        self.read.append(index)
        into[:] = payload(self.model.identity, self.tokens, index, self.salt)

    def write_block(self, index: int, payload_: Buffer) -> None:
        self.written.append(index)
        if not np.array_equal(payload_, payload(self.model.identity, self.tokens, index, self.salt)):
            self.wrong.append(index)


def store(model: Model, tokens: object, tenant: str = "default") -> StoreResult:
    return model.store(tokens, Prompt(model, tokens, tenant), tenant=tenant)


def load(model: Model, tokens: object, tenant: str = "default") -> int:
    """Match and load; the blocks that arrived. Fails if one of them is wrong."""
    sink = Prompt(model, tokens, tenant)
    with model.match(tokens, tenant=tenant) as lease:
        loaded = lease.load(sink)
    assert sink.wrong == [], "a block came back other than it was stored"
    assert sink.written == list(range(len(sink.written)))
    assert loaded == len(sink.written) * model.layout.block_tokens
    return len(sink.written)


def matched(model: Model, tokens: object, tenant: str = "default") -> int:
    """The blocks that a match promises."""
    with model.match(tokens, tenant=tenant) as lease:
        return lease.blocks


def segment_files(directory: Path) -> Iterator[Path]:
    yield from sorted((directory / "ssd").glob("*.segment"))

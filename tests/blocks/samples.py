"""Records and identities of known content, small enough to be flipped byte by byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kvpool.blocks.identity import BlockKey, KeyChain, ModelIdentity, tenant_digest
from kvpool.blocks.layout import PAGE_BYTES, Dtype, KVLayout
from kvpool.blocks.record import Head, seal

SECRET = bytes(range(32))
LAYOUT = KVLayout(layers=2, kv_heads=2, head_size=8, dtype=Dtype.BFLOAT16, block_tokens=4, value_head_size=4)
IDENTITY = ModelIdentity(
    name="example/tiny", weights="sha256:00ff", layout=LAYOUT, revision="main", adapter="lora:1", rope='{"theta":1e4}',
    quantization="q4", kv_scales="k=1,v=2", tp_rank=1, tp_size=2, generation=bytes(range(16)),
)  # fmt: skip
TENANT = tenant_digest(SECRET, "acme")
CHAIN = KeyChain(SECRET, IDENTITY.fingerprint, TENANT, epoch=3)
TOKENS = np.arange(100, 104, dtype=np.int32).tobytes()
EXTRA = b"image-digest"


def head_of(layout: KVLayout = LAYOUT, **changes: Any) -> Head:
    """The head of the block that follows one block of token 7, under this module's identity."""
    tokens = np.arange(100, 100 + layout.block_tokens, dtype=np.int32).tobytes()
    parent = CHAIN.extend(CHAIN.root, bytes(layout.token_bytes), b"")
    head = Head(
        key=CHAIN.extend(parent, tokens, EXTRA), parent=parent, fingerprint=IDENTITY.fingerprint, tenant=TENANT,
        epoch=3, depth=1, tokens=tokens, extra=EXTRA, payload_bytes=layout.payload_bytes,
        raw_bytes=layout.payload_bytes,
    )  # fmt: skip
    return replace(head, **changes)


def payload_of(nbytes: int, seed: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that no two seeds share."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def sealed(head: Head, seed: int = 1) -> bytearray:
    """A whole record; what lay in the buffer before is 0xEE."""
    record = bytearray(b"\xee") * head.record_bytes
    record[PAGE_BYTES : PAGE_BYTES + head.payload_bytes] = payload_of(head.payload_bytes, seed).tobytes()
    seal(record, head)
    return record


def key(text: str) -> BlockKey:
    return BlockKey(text.encode().ljust(16, b"\0"))

"""What makes two blocks equal: the model's fingerprint, the tenant's seed, the tokens and the extra keys.

Everything here is pure. Digests are BLAKE2b, keyed with the pool secret, each use with its own personalisation, so that
no digest of one kind can stand for another. Two pools share blocks only with equal secrets.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, NewType

from kvpool.blocks.layout import KVLayout
from kvpool.errors import InputError

BlockKey = NewType("BlockKey", bytes)
"""16 bytes: the chained digest of all that a block depends on."""
Fingerprint = NewType("Fingerprint", bytes)
"""32 bytes: the digest of all that makes keys and values of two processes compatible."""
TenantDigest = NewType("TenantDigest", bytes)
"""16 bytes: what stands for a tenant's name outside this process."""

ALL_TENANTS = TenantDigest(bytes(16))
"""Stands for every tenant where epochs are kept: no name has this digest, as far as anybody knows."""
KEY_BYTES = 16
SECRET_BYTES = 32
MAX_EXTRA_KEY_BYTES = 1024
"""Extra keys of one block, together; digests of a few images, audio clips or prompt embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """All that makes keys and values compatible. One byte changed in any field is another fingerprint.

    `weights` is a digest of the weights' full content, or an explicit id that the user vouches for. `rope`,
    `quantization`, `kv_scales` are canonical texts of those settings. `generation` is empty until weights are reloaded
    in place or a cache is reset. The engine is no part of it: blocks of one model are shared between engines.
    """

    name: str
    weights: str
    layout: KVLayout
    revision: str = ""
    adapter: str = ""
    rope: str = ""
    quantization: str = ""
    kv_scales: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    generation: bytes = b""
    fingerprint: Fingerprint = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.name or not self.weights:
            raise InputError("ModelIdentity needs a name, and a digest of the weights or an explicit id")
        if not 0 <= self.tp_rank < self.tp_size:
            raise InputError(f"ModelIdentity.tp_rank is {self.tp_rank}; it must be 0 to {self.tp_size - 1}")
        object.__setattr__(self, "fingerprint", self._digest())

    def _digest(self) -> Fingerprint:
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in ("layout", "fingerprint")}
        fields["layout"] = {**asdict(self.layout), "value_head_size": self.layout.value_dim}
        fields["generation"] = self.generation.hex()
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.blake2b(_utf8(text, "ModelIdentity"), digest_size=32, person=b"kvpool-model-1")
        return Fingerprint(digest.digest())


class TreeId(NamedTuple):
    """Whose blocks: all prompts of one model and one tenant, as of one epoch. Blocks are shared within a tree alone."""

    fingerprint: Fingerprint
    tenant: TenantDigest
    epoch: int


_NO_EXTRA = bytes(4)


class KeyChain:
    """Computes the block keys of one (fingerprint, tenant, epoch) under one pool secret.

    `root` stands for the empty prefix: the parent of every first block. Thread-safe, for it never changes.
    """

    def __init__(self, secret: bytes, fingerprint: Fingerprint, tenant: TenantDigest, epoch: int) -> None:
        _check_secret(secret)
        seed = fingerprint + tenant + epoch.to_bytes(8, "little")
        self.root = BlockKey(hashlib.blake2b(seed, key=secret, digest_size=KEY_BYTES, person=b"kvpool-root-1").digest())
        self._step = hashlib.blake2b(key=secret, digest_size=KEY_BYTES, person=b"kvpool-block-1")

    def extend(self, parent: BlockKey, tokens: bytes, extra: bytes = b"") -> BlockKey:
        """Return the key of the block of these token bytes after `parent`; about 0.7 us."""
        step = self._step.copy()
        step.update(len(extra).to_bytes(4, "little") + parent + extra + tokens)
        return BlockKey(step.digest())

    def extend_all(
        self, parent: BlockKey, first: int, run: bytes, block_bytes: int, extra_keys: Mapping[int, bytes] | None
    ) -> list[BlockKey]:
        """Return the keys of the blocks of `run`, which follow `parent` from depth `first` on."""
        keys: list[BlockKey] = []
        if extra_keys:
            for depth, at in enumerate(range(0, len(run), block_bytes), first):
                parent = self.extend(parent, run[at : at + block_bytes], extra_keys.get(depth, b""))
                keys.append(parent)
            return keys
        copy = self._step.copy
        for at in range(0, len(run), block_bytes):
            step = copy()
            step.update(_NO_EXTRA + parent + run[at : at + block_bytes])
            parent = BlockKey(step.digest())
            keys.append(parent)
        return keys

    def keys(self, tokens: bytes, block_bytes: int, extra_keys: Mapping[int, bytes] | None = None) -> list[BlockKey]:
        """Return the key of every whole block of `tokens`, from the first on."""
        whole = len(tokens) // block_bytes * block_bytes
        return self.extend_all(self.root, 0, tokens[:whole], block_bytes, extra_keys)


def tenant_digest(secret: bytes, tenant: str) -> TenantDigest:
    """Return what stands for `tenant` in keys, records and rows; its name never leaves the process."""
    _check_secret(secret)
    digest = hashlib.blake2b(_utf8(tenant, "tenant"), key=secret, digest_size=16, person=b"kvpool-tenant-1")
    return TenantDigest(digest.digest())


def checked_extra_keys(extra_keys: Mapping[int, bytes]) -> Mapping[int, bytes]:
    """Return `extra_keys` (block index -> digest bytes) without empty ones, or raise `InputError` naming the index."""
    packed = {index: bytes(extra) for index, extra in extra_keys.items()}
    for index, extra in packed.items():
        if index < 0:
            raise InputError(f"extra_keys[{index}]: a block index is 0 or more")
        if len(extra) > MAX_EXTRA_KEY_BYTES:
            raise InputError(
                f"extra_keys[{index}] has {len(extra)} bytes; at most {MAX_EXTRA_KEY_BYTES}: pass a digest"
            )
    return {index: extra for index, extra in packed.items() if extra}


def joined_extra_keys(parts: Sequence[bytes]) -> bytes:
    """Fold several digests of one block into one, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _check_secret(secret: bytes) -> None:
    if len(secret) != SECRET_BYTES:
        raise InputError(f"the pool secret has {len(secret)} bytes; it must have {SECRET_BYTES}")


def _utf8(text: str, what: str) -> bytes:
    """Half a surrogate pair has no bytes: refused, so that no two texts give one digest."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds {text[error.start]!r}, which is no Unicode character") from None

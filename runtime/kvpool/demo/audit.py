"""Between a session and the pool: remembers the hash of every block that is stored, and checks what comes back.

The engine has checksums of its own; this trusts none of them. It hashes what the adapter wrote into the pool's memory,
and what the pool hands to the adapter, in this process or in the next.
"""

import hashlib
from collections.abc import Iterator, Mapping
from types import TracebackType

import xxhash

from kvpool.adapters.transformers.cache import ModelRegistry
from kvpool.adapters.transformers.session import BlockLease, BlockModel
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer
from kvpool.blocks.tokens import Tokens, token_bytes
from kvpool.blocks.transfer import BlockSink, BlockSource
from kvpool.config import RuntimeConfig
from kvpool.pool.results import LeaseState, ModelSpec, StoreResult
from kvpool.tiers.tier import TierName


class Ledger:
    """Hashes of blocks by what they are: a tenant and all tokens up to the block's end."""

    def __init__(self, hashes: Mapping[str, str] | None = None) -> None:
        self.hashes = dict(hashes or {})
        self.stored = 0
        self.checked = 0
        self.wrong: list[str] = []
        self.just_stored: list[int] = []
        """Indices of the blocks that the last store wrote."""

    def note(self, index: int, key: str, payload: Buffer) -> None:
        """A block was written into the pool."""
        self.hashes[key] = payload_hash(payload)
        self.stored += 1
        self.just_stored.append(index)

    def check(self, key: str, payload: Buffer) -> None:
        """A block came back from the pool."""
        self.checked += 1
        if self.hashes.get(key) != payload_hash(payload):
            self.wrong.append(key)


def payload_hash(payload: Buffer) -> str:
    """The hash of a block's payload; 128 bits, at the speed of memory."""
    return xxhash.xxh3_128_hexdigest(payload)


def block_keys(tenant: str, tokens: bytes, block_bytes: int) -> Iterator[str]:
    """What each whole block of a prompt is called in a ledger."""
    digest = hashlib.blake2b(tenant.encode() + b"\0", digest_size=16)
    for start in range(0, len(tokens) - block_bytes + 1, block_bytes):
        digest.update(tokens[start : start + block_bytes])
        yield digest.hexdigest()


class AuditedPool:
    """A pool whose models are audited."""

    def __init__(self, pool: ModelRegistry, ledger: Ledger) -> None:
        self._pool = pool
        self._ledger = ledger

    @property
    def config(self) -> RuntimeConfig:
        """The pool's configuration."""
        return self._pool.config

    def register(self, spec: ModelSpec) -> BlockModel:
        """The pool's model, audited."""
        return _AuditedModel(self._pool.register(spec), self._ledger)


class _AuditedModel:
    def __init__(self, model: BlockModel, ledger: Ledger) -> None:
        self._model = model
        self._ledger = ledger

    @property
    def layout(self) -> KVLayout:
        return self._model.layout

    def match(self, tokens: Tokens, *, tenant: str = "default") -> BlockLease:
        packed = token_bytes(tokens)
        keys = list(block_keys(tenant, packed, self.layout.token_bytes))
        return _AuditedLease(self._model.match(packed, tenant=tenant), keys, self._ledger)

    def store(self, tokens: Tokens, source: BlockSource, *, tenant: str = "default") -> StoreResult:
        packed = token_bytes(tokens)
        keys = list(block_keys(tenant, packed, self.layout.token_bytes))
        self._ledger.just_stored = []
        return self._model.store(packed, _AuditedSource(source, keys, self._ledger), tenant=tenant)

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        self._model.observe_prefill(tokens, seconds)


class _AuditedLease:
    def __init__(self, lease: BlockLease, keys: list[str], ledger: Ledger) -> None:
        self._lease = lease
        self._keys = keys
        self._ledger = ledger

    @property
    def blocks(self) -> int:
        return self._lease.blocks

    @property
    def tokens(self) -> int:
        return self._lease.tokens

    @property
    def served(self) -> dict[TierName, int]:
        return self._lease.served

    def ask(self, deadline_s: float) -> LeaseState:
        return self._lease.ask(deadline_s)

    def wait(self, deadline_s: float) -> LeaseState:
        return self._lease.wait(deadline_s)

    def load(self, sink: BlockSink) -> int:
        return self._lease.load(_AuditedSink(sink, self._keys, self._ledger))

    def __enter__(self) -> "_AuditedLease":
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lease.__exit__(kind, error, traceback)


class _AuditedSource:
    def __init__(self, source: BlockSource, keys: list[str], ledger: Ledger) -> None:
        self._source = source
        self._keys = keys
        self._ledger = ledger

    def read_block(self, index: int, into: Buffer) -> None:
        self._source.read_block(index, into)
        self._ledger.note(index, self._keys[index], into)


class _AuditedSink:
    def __init__(self, sink: BlockSink, keys: list[str], ledger: Ledger) -> None:
        self._sink = sink
        self._keys = keys
        self._ledger = ledger

    def write_block(self, index: int, payload: Buffer) -> None:
        self._ledger.check(self._keys[index], payload)
        self._sink.write_block(index, payload)

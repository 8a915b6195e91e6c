"""What models and leases of one pool work with: the index, the tiers, and the threads between them.

Assembled once by `Pool.open`; nothing here is public.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpool.blocks.identity import BlockKey, Fingerprint, KeyChain, ModelIdentity, TenantDigest, TreeId, tenant_digest
from kvpool.blocks.layout import KVLayout
from kvpool.errors import InputError
from kvpool.pool.copies import Copies
from kvpool.pool.encodings import Encodings
from kvpool.pool.epochs import Epochs
from kvpool.pool.events import EventBus
from kvpool.pool.fetch import FetchParts
from kvpool.pool.gate import Gate
from kvpool.pool.gpu_parts import Gpu
from kvpool.pool.memory import Memory
from kvpool.pool.ram_encoder import RamEncoder
from kvpool.pool.reading import Readers
from kvpool.pool.reclaim import Reclaimer
from kvpool.pool.remote.epoch_sync import EpochSync
from kvpool.pool.remote.parts import Remote
from kvpool.pool.ssd_store import SsdStore
from kvpool.pool.traffic import Traffic
from kvpool.pool.write_behind import WriteBehind
from kvpool.prefix.history import Loss
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.sharing import SharedMark
from kvpool.prefix.tree import PrefixTree
from kvpool.tiers.extents import Bytes
from kvpool.tiers.ram import RamTier

if TYPE_CHECKING:
    from kvpool.pool.prefetch import Prefetcher
    from kvpool.pool.remote.catalog import PoolCatalog
    from kvpool.pool.remote.prompts import PromptMemory

SHARED_TENANT = ""
"""Stands for all tenants where `sharing.scope` is `pool`; nobody's own name, for those are not empty."""

Identities = Callable[[Fingerprint], ModelIdentity | None]
"""What is known of the model of a fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSettings:
    """What may change while the pool is open; replaced as a whole."""

    second_hit: bool
    ssd_budget_s: float
    read_ahead: bool
    compress_shared: bool
    gpu_after_hits: int
    prefetch_bytes: int
    sends_again: bool
    """Whether what is read or used here, and is not in dragonfly any more, is sent there again."""
    shared_ttl_s: float
    shared_budget_s: float
    """The longest budget of a shared tier."""


class Tenants:
    """From tenants' names to their digests, epochs and trees. Erasing and making trees exclude each other."""

    def __init__(self, secret: bytes, epochs: Epochs, index: PrefixIndex, *, shared: bool) -> None:
        self.lock = threading.Lock()
        self.epochs = epochs
        self.shared = shared
        self._secret = secret
        self._index = index

    def digest(self, tenant: str) -> TenantDigest:
        """What stands for the tenant in keys and records. Raises `InputError` for what is no name."""
        if not isinstance(tenant, str) or not tenant:
            raise InputError(f"tenant is {tenant!r}; it must be a name that is not empty")
        return tenant_digest(self._secret, SHARED_TENANT if self.shared else tenant)

    def chain(self, tree_id: TreeId) -> KeyChain:
        """The keys of one tree."""
        return KeyChain(self._secret, *tree_id)

    def tree_id(self, fingerprint: Fingerprint, tenant: str) -> TreeId:
        """The identity of a tenant's tree as of now."""
        digest = self.digest(tenant)
        return TreeId(fingerprint, digest, self.epochs.of(digest))

    def is_stale(self, tree: PrefixTree) -> bool:
        """Whether the tree is of an epoch that was erased."""
        return tree.id.epoch != self.epochs.of(tree.id.tenant)

    def tree(self, tree_id: TreeId, *, token_bytes: int, record_bytes: int, model: str) -> PrefixTree:
        """The tree of this identity, made if need be. Call with `lock` held, so that no erasure comes between."""
        known = self._index.tree(tree_id)
        if known is not None:
            if model and not known.model:
                self._index.adopt(known, model)
            return known
        chain = self.chain(tree_id)
        return self._index.add_tree(
            PrefixTree(tree_id, token_bytes=token_bytes, record_bytes=record_bytes, chain=chain, model=model)
        )


@dataclass(slots=True, kw_only=True)
class Engine:
    """The parts of an open pool. `settings` is replaced by `Pool.reload`, all else stays."""

    index: PrefixIndex
    ram: RamTier
    store: SsdStore
    copies: Copies
    memory: Memory
    readers: Readers
    reclaimer: Reclaimer
    writer: WriteBehind
    events: EventBus
    tenants: Tenants
    settings: LiveSettings
    encodings: Encodings
    ram_encoder: RamEncoder
    gpu: Gpu | None
    """None: the configuration has no gpu tier."""
    epoch_sync: EpochSync
    remote: Remote | None
    """None: the configuration has no tier that is shared."""
    catalog: PoolCatalog | None
    """None: the configuration has no database tier."""
    prompts: PromptMemory | None
    """None: the configuration has no Qdrant."""
    prefetcher: Prefetcher | None
    """None: `prefetch.semantic` is off."""
    identity_of: Identities
    is_unregistered: Callable[[Fingerprint], bool]
    is_known_name: Callable[[str], bool]
    """Whether a model of this name is registered; the trees of unknown models have the name ''."""
    wake: Callable[[], None]
    """Has the housekeeper look for work now."""
    burying: threading.Lock = field(default_factory=threading.Lock)
    """Held from an erasure until its blocks are counted, so that nobody else gives them back meanwhile."""
    gate: Gate = field(default_factory=Gate)
    traffic: Traffic = field(default_factory=Traffic)
    dropped_at_start: Counter[str] = field(default_factory=Counter)
    shared_marks: Sequence[SharedMark] = ()
    """Which prefixes were shared when the pool was closed last."""
    restored_blocks: int = 0
    restore_seconds: float = 0.0

    def record(self, slot: int) -> Bytes:
        """A slot's bytes. Raises `PoolClosedError` where closing has given the memory back in the middle of a call."""
        try:
            return self.ram.record(slot)
        except ValueError:
            self.gate.check()
            raise

    def tell_listeners_of_removals(self) -> None:
        """From now on listeners are told of copies that leave, beside the catalog."""
        events, reporter = self.events, None if self.catalog is None else self.catalog.reporter

        def removed(level: int, keys: Sequence[BlockKey], loss: Loss) -> None:
            if reporter is not None:
                reporter.removed(level, keys, loss)
            events.publish_removed(level, keys, loss)

        self.index.on_removed = removed

    @property
    def fetch_parts(self) -> FetchParts:
        """What a fetch from SSD works with."""
        return FetchParts(self.index, self.memory, self.copies, self.store, self.readers, self.events, self.ram_encoder)

    @contextmanager
    def decoded(self, layout: KVLayout, record: Bytes) -> Iterator[Bytes]:
        """The payload of an encoded record, as the engine had it, for the time of the context."""
        payload = self.encodings.borrow(layout.payload_bytes)
        try:
            self.encodings.decode(layout, record, payload)
            yield payload
        finally:
            self.encodings.give_back(payload)

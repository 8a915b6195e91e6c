"""One model of a pool: its prompts are matched, stored and explained here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

from kvpool.blocks.identity import BlockKey, ModelIdentity, checked_extra_keys
from kvpool.blocks.layout import PAGE_BYTES, KVLayout
from kvpool.blocks.tokens import Tokens, token_bytes
from kvpool.blocks.transfer import BlockSource
from kvpool.errors import InputError
from kvpool.pool.copies import shrink_index
from kvpool.pool.engine import Engine
from kvpool.pool.events import BlockStored
from kvpool.pool.explain import Explainer
from kvpool.pool.fetch import WINDOW_BYTES, Fetch, plan
from kvpool.pool.gpu_landing import GpuLanding
from kvpool.pool.lease import Lease
from kvpool.pool.remote.lookup import Lookup, Prompt, Sources
from kvpool.pool.results import BlockReport, Refusal, StoreResult
from kvpool.prefix.accounts import Grant
from kvpool.prefix.heads import pinned_keys
from kvpool.prefix.history import Loss
from kvpool.prefix.index import BATCH_BLOCKS, Pin
from kvpool.prefix.node import GPU, NOWHERE, RAM
from kvpool.prefix.saving import is_between_saved
from kvpool.prefix.tree import Extras, PrefixTree
from kvpool.tiers.tier import TierName

MAX_KNOWN_TENANTS = 10_000
"""Tenants whose tree a model keeps at hand; beyond it is looked up anew."""
STORE_BATCH_BYTES = 64 << 20
REMEMBERED_REFUSALS = 256
"""Refused blocks of one store that `explain` will know about."""
_LOSS_OF = {
    Refusal.NO_ROOM: Loss.REFUSED,
    Refusal.OVER_QUOTA: Loss.OVER_QUOTA,
    Refusal.INDEX_FULL: Loss.INDEX_FULL,
    Refusal.ERASED: Loss.ERASED,
}
_REFUSAL_OF = {
    Grant.GIVEN: Refusal.NO_ROOM,
    Grant.OVER_LIMIT: Refusal.OVER_QUOTA,
    Grant.OTHERS_GUARANTEE: Refusal.OVER_QUOTA,
}
_RATE_WEIGHT = 0.3
"""How much the latest measured prefill counts."""


class Model:
    """Made by `Pool.register`. Every method may be called from any thread."""

    def __init__(
        self, engine: Engine, identity: ModelIdentity, explainer: Explainer, *, prefill_tokens_per_second: float | None
    ) -> None:
        self._engine = engine
        self.identity = identity
        self.name = identity.name
        self.layout: KVLayout = identity.layout
        self.saved_prefill_seconds = 0.0
        self.loaded_blocks: Counter[TierName] = Counter()
        """Blocks that loads delivered, by the tier in which they were found."""
        self._explainer = explainer
        self._token_bytes = self.layout.token_bytes
        self._prefill_rate = prefill_tokens_per_second
        self._measured = False
        self._rate_lock = threading.Lock()
        self._trees: dict[str, PrefixTree] = {}
        self._unregistered = False

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Tokens per second that the engine computes: measured, else as configured, else None."""
        return self._prefill_rate

    @property
    def measured_rate(self) -> float | None:
        """Tokens per second as `observe_prefill` found; None before."""
        return self._prefill_rate if self._measured else None

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Tell how long the engine took to compute `tokens` that were not loaded; recent measurements count more."""
        if tokens <= 0 or seconds <= 0:
            return
        with self._rate_lock:
            rate = tokens / seconds
            if self._measured and self._prefill_rate is not None:
                rate = _RATE_WEIGHT * rate + (1 - _RATE_WEIGHT) * self._prefill_rate
            self._prefill_rate, self._measured = rate, True

    def match(self, tokens: Tokens, *, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None) -> Lease:
        """Lease the longest prefix of `tokens`, in whole blocks, that gpu, ram and ssd hold for a tenant. Never waits.

        `extra_keys` says what token ids do not: for a block's index, a digest of the images, audio or embeddings whose
        placeholders are among its tokens; they must be the same when it is stored. Raises `InputError` for what is no
        sequence of int32 ids, and `PoolClosedError`.
        """
        engine = self._engine
        if engine.gate.is_shut:
            engine.gate.check()
        packed = tokens if type(tokens) is bytes and not len(tokens) & 3 else token_bytes(tokens)
        extras = checked_extra_keys(extra_keys) if extra_keys else None
        tree = self._trees.get(tenant)
        if tree is None:
            tree = self._tree(tenant)
        pin = engine.index.match(tree, packed, extras, None, asked=len(packed) // self._token_bytes)
        if pin.depth:
            if not engine.store.readable:
                self._shorten_to_memory(pin)
            if (pin.node.save_to < pin.depth or tree.gapped) and engine.store.writable:
                engine.writer.want(pin, pin.depth)
            remote = engine.remote
            if remote is not None and pin.node.sent < remote.round:
                remote.send_again(pin)
        if engine.prefetcher is not None:
            engine.prefetcher.asked(pin.tree.id, packed)
        return Lease(self, pin, packed, extras)

    def store(
        self,
        tokens: Tokens,
        source: BlockSource,
        *,
        tenant: str = "default",
        extra_keys: Mapping[int, bytes] | None = None,
    ) -> StoreResult:
        """Keep the whole blocks of `tokens` that are not there yet; `source` is asked for those, in order.

        Returns once they are in RAM, or in device memory where there is a gpu tier and the source is a
        `DeviceBlockSource`: writing them further down happens behind. A block that finds no room, since
        everything is leased, ends the store: what was stored before stays. What the source raises ends it as well, and
        reaches the caller. Raises `InputError` and `PoolClosedError` as `match` does.
        """
        packed = token_bytes(tokens)
        extras = checked_extra_keys(extra_keys) if extra_keys else None
        engine = self._engine
        with engine.gate:
            tree = self._trees.get(tenant) or self._tree(tenant)
            pin = engine.index.match(tree, packed, extras)
            if engine.tenants.is_stale(pin.tree):  # erased since it was looked up, and entered again by this match
                engine.index.erase(pin.tree)
            elif self._unregistered:
                engine.index.erase(pin.tree, Loss.UNREGISTERED)
            already = pin.depth
            total = len(packed) // self._token_bytes
            try:
                stored, refusal = self._store_after(pin, packed, source, extras, total)
                if engine.remote is not None and (stored or engine.prefetcher is not None):
                    engine.remote.note_prompt(pin)
                already += pin.depth - already - stored
                refused = {refusal: total - pin.depth} if refusal else {}
                if refusal:
                    self._note_refused(pin, packed, extras, total, _LOSS_OF[refusal])
            finally:
                engine.index.unpin(pin)
                self._shrink_index()
            engine.index.learn(pin.tree.account)
        engine.traffic.count_store(stored, already, refused, self.layout.record_bytes)
        return StoreResult(stored, already, refused)

    def declare_shared(
        self, tokens: Tokens, *, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None
    ) -> int:
        """Declare the whole blocks of `tokens` that are held a shared prefix; return how many tokens those are.

        Shared prefixes go after all others, as `sharing` in the configuration says. A declaration holds while the
        blocks are held, also over a restart. No request: it is in no statistics. Raises as `match` does.
        """
        packed = token_bytes(tokens)
        extras = checked_extra_keys(extra_keys) if extra_keys else None
        index = self._engine.index
        with self._engine.gate:
            pin = index.match(self._trees.get(tenant) or self._tree(tenant), packed, extras)
            try:
                index.mark_shared(pin)
                return 0 if pin.tree.erased else pin.depth * self.layout.block_tokens
            finally:
                index.unpin(pin)

    def explain(
        self, tokens: Tokens, *, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None
    ) -> list[BlockReport]:
        """Say of every whole block of `tokens` where it is, or why it is not. Changes nothing, not even ages."""
        self._engine.gate.check()
        extras = checked_extra_keys(extra_keys) if extra_keys else None
        return self._explainer.explain(self.identity, token_bytes(tokens), tenant, extras)

    # -- for the lease -------------------------------------------------------------------------------------------------

    def fetch(self, pin: Pin, in_memory: Sequence[int], on_ssd: Sequence[int]) -> Fetch | None:
        """What brings the blocks that are not in memory; None where SSD is out, or slower than computing them."""
        engine = self._engine
        record_bytes = self.layout.record_bytes
        batches = plan(in_memory, on_ssd)
        blocks = sum(len(batch.places) for batch in batches)
        nbytes = sum(len(batch.places) * batch.record_bytes for batch in batches)
        if not blocks or not engine.store.readable:
            return None
        tokens = blocks * self.layout.block_tokens
        if not engine.store.costs.worth_asking(nbytes, tokens, self._prefill_rate):
            engine.traffic.count_skipped(blocks)
            return None
        return Fetch.begin(
            engine.fetch_parts,
            pin,
            batches,
            payload_bytes=self.layout.payload_bytes,
            record_bytes=record_bytes,
            budget_s=engine.settings.ssd_budget_s,
            window_bytes=WINDOW_BYTES if engine.settings.read_ahead else 0,
        )

    def look_up(
        self, pin: Pin, packed: bytes, extras: Extras | None, sources: Sources, deadline_s: float, *, here: bool
    ) -> Lookup | None:
        """Begin to bring what shared tiers hold of the tail that is not pinned; None where that is nothing."""
        remote = self._engine.remote
        if remote is None or pin.depth >= len(packed) // self._token_bytes or pin.tree.erased:
            return None
        prompt = Prompt(pin.tree, packed, extras, self.layout, self._prefill_rate)
        return remote.lookup(prompt, sources, deadline_s, here=here)

    def count_loaded(self, matched: int, served: Counter[TierName]) -> None:
        """A lease was loaded: `served` blocks of the `matched` ones arrived."""
        arrived = served.total()
        self._engine.traffic.count_load(served, self.layout.record_bytes, short=arrived < matched)
        with self._rate_lock:
            self.loaded_blocks.update(served)
            if self._prefill_rate:
                self.saved_prefill_seconds += arrived * self.layout.block_tokens / self._prefill_rate

    # -- for the pool --------------------------------------------------------------------------------------------------

    def use_rate(self, prefill_tokens_per_second: float | None) -> None:
        """Take the configured prefill rate, unless one was measured."""
        with self._rate_lock:
            if not self._measured:
                self._prefill_rate = prefill_tokens_per_second

    def forget_tree(self, tenant: str) -> None:
        """Look the tenant's tree up anew: it was erased. Call with the tenants' lock held."""
        self._trees.pop(tenant, None)

    def forget_trees(self) -> None:
        """Look all tenants' trees up anew: epochs may have been raised."""
        with self._engine.tenants.lock:
            self.forget_trees_unlocked()

    def forget_trees_unlocked(self) -> None:
        """`forget_trees`, with the tenants' lock held."""
        self._trees = {}

    def unregister(self) -> None:
        """Nothing can be matched or stored any more. Call with the tenants' lock held."""
        self._unregistered = True
        self._trees = {}

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tree(self, tenant: str) -> PrefixTree:
        tenants = self._engine.tenants
        with tenants.lock:
            if self._unregistered:
                raise InputError(f"model {self.name!r} was unregistered: register it again")
            tree = tenants.tree(
                tenants.tree_id(self.identity.fingerprint, tenant),
                token_bytes=self._token_bytes,
                record_bytes=self.layout.record_bytes,
                model=self.name,
            )
            if len(self._trees) >= MAX_KNOWN_TENANTS:
                self._trees = {}
            self._trees[tenant] = tree
            return tree

    def _shorten_to_memory(self, pin: Pin) -> None:
        """SSD is out: promise only what does not need it."""
        index = self._engine.index
        held = index.places(pin, RAM)
        if self._engine.gpu is not None:
            held = [max(places) for places in zip(held, index.places(pin, GPU), strict=True)]
        if NOWHERE in held:
            index.shorten(pin, held.index(NOWHERE), uncount=True)

    def _store_after(
        self, pin: Pin, packed: bytes, source: BlockSource, extras: Extras | None, total: int
    ) -> tuple[int, Refusal | None]:
        """Store what follows the pin, batch by batch; the blocks stored, and why it ended early if it did."""
        record_bytes = self.layout.record_bytes
        most = max(1, min(BATCH_BLOCKS, STORE_BATCH_BYTES // record_bytes))
        gpu = self._engine.gpu
        landing = None if gpu is None else GpuLanding(gpu, self.layout, source)
        stored = 0
        while pin.depth < total:
            if not self._shrink_index():
                return stored, Refusal.INDEX_FULL
            level, tier, first, count = GPU, TierName.GPU, pin.depth, min(most, total - pin.depth)
            slots = [] if landing is None else landing.take(pin, count)
            if not slots:
                level, tier = RAM, TierName.RAM
                count = count if landing is None else landing.in_ram(count)
                slots, granted = self._engine.memory.allocate(pin.tree.account, record_bytes, count)
                if not slots:
                    return stored, _REFUSAL_OF[granted]
                self._fill(pin, slots, source)
            charged = len(slots) * record_bytes
            refused = self._engine.index.attach(pin, packed, level, slots, extras, charged=charged)
            self._drop(level, refused)
            if pin.tree.erased:
                return stored, Refusal.ERASED
            stored += len(slots) - len(refused)
            self._after_attach(pin, first, packed, tier)
        return stored, None

    def _drop(self, level: int, refused: list[int]) -> None:
        gpu = self._engine.gpu
        if level == GPU and gpu is not None:
            gpu.memory.drop(refused)
            gpu.demoter.wake_if_nearly_full()
        else:
            self._engine.memory.drop(refused)

    def _fill(self, pin: Pin, slots: list[int], source: BlockSource) -> None:
        """Have the source write payloads into slots; they are freed if it fails."""
        record, end = self._engine.record, PAGE_BYTES + self.layout.payload_bytes
        try:
            for block, slot in enumerate(slots, pin.depth):
                source.read_block(block, record(slot)[PAGE_BYTES:end])
        except BaseException:
            self._engine.memory.free(pin.tree.account, slots)
            raise

    def _after_attach(self, pin: Pin, first: int, packed: bytes, tier: TierName) -> None:
        engine = self._engine
        if engine.store.writable and (
            not engine.settings.second_hit or self._seen_before(pin) or is_between_saved(engine.index, pin, first)
        ):
            engine.writer.want(pin, pin.depth)
        if tier is TierName.RAM:
            engine.ram_encoder.want(pin.node)
        if engine.remote is not None:
            engine.remote.send_new(pin, first, tier)
        if engine.events.listened:
            parent, *keys = pinned_keys(engine.index, pin, first)
            run = packed[first * self._token_bytes : pin.depth * self._token_bytes]
            block_tokens, fingerprint = self.layout.block_tokens, self.identity.fingerprint
            engine.events.publish(BlockStored(tuple(keys), parent, run, block_tokens, fingerprint, tier))

    def _seen_before(self, pin: Pin) -> bool:
        """Whether the last block was here once and was lost: storing it again is its second hit."""
        return pin.key is not None and self._engine.index.history.fate(pin.key) is not None

    def _shrink_index(self) -> bool:
        return shrink_index(self._engine.index, self._engine.copies)

    def _note_refused(self, pin: Pin, packed: bytes, extras: Extras | None, total: int, loss: Loss) -> None:
        """So that `explain` can say it."""
        index, tree = self._engine.index, pin.tree
        until = min(total, pin.depth + REMEMBERED_REFUSALS)
        run = packed[pin.depth * self._token_bytes : until * self._token_bytes]
        with index.lock:
            parent = pin.key or tree.key_before(index._settled(pin), pin.depth)
        keys = tree.keys_after(parent, pin.depth, run, extras)
        found = [BlockKey(keys[at : at + 16]) for at in range(0, len(keys), 16)]
        index.note_lost(found, loss, RAM)

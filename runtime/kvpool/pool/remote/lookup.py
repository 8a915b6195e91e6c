"""Brings into RAM what the keyed tiers hold of one prompt, for the lease that asked.

The tail that the tree does not know is asked for window by window, each longer than the one before: of all tiers at
once, so that a prompt which nobody has costs one round trip of the slower one. Each block comes from the tier that is
expected to be quicker; it is verified, and entered in the tree. Slots belong to the lookup until then. What does not
come, or is not what was asked for, is not asked of that tier again: the others may have it. What another lookup is
fetching is waited for, not fetched again. A lookup ends with its lease: what is in flight then is not waited for, and
its slots are freed when it has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey, TenantDigest
from kvpool.blocks.layout import PAGE_BYTES, KVLayout
from kvpool.blocks.record import CODEC_NONE, Buffer, CorruptRecordError, Head, open_record
from kvpool.pool.encodings import Encodings
from kvpool.pool.events import EventBus, Form
from kvpool.pool.memory import Memory
from kvpool.pool.ram_encoder import RamEncoder
from kvpool.pool.remote.claims import Claims
from kvpool.pool.remote.store import Question, RemoteStore
from kvpool.pool.results import LeaseState
from kvpool.prefix.index import BATCH_BLOCKS, Pin, PrefixIndex
from kvpool.prefix.node import RAM
from kvpool.prefix.tree import Extras, PrefixTree
from kvpool.tiers.tier import Found, TierName

FIRST_WINDOW_BLOCKS, LAST_WINDOW_BLOCKS = 16, 1024
_LONGER = 4
"""Every miss costs the first window, 6 us a block beside 350 for asking at all; by it is judged whether reading pays.
Each next is so many times as long, since every window costs a hit a round trip."""
BATCH_BYTES = 16 << 20
"""About so much is read at once."""
_log = logging.getLogger(__name__)


Sources = dict[int, TierName]
"""The blocks of one lease that have arrived, and from where. Only lookups write it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupParts:
    """What lookups work with; one for all."""

    index: PrefixIndex
    memory: Memory
    encodings: Encodings
    events: EventBus
    ram_encoder: RamEncoder
    stores: Sequence[RemoteStore]
    """In the waterfall's order."""
    workers: Executor
    """Run lookups."""
    is_stale: Callable[[PrefixTree], bool]
    """Whether a tree is of an epoch that was erased."""
    look_at_hint: Callable[[TenantDigest], None]
    """Notices that the tenant was erased elsewhere, if that is noted in dragonfly. Raises `TierUnavailableError`."""
    count_skipped: Callable[[int], None]
    """Told of blocks that were not read, since computing them is quicker."""
    claims: Claims = field(default_factory=Claims)


class Prompt(NamedTuple):
    """What is looked up."""

    tree: PrefixTree
    tokens: bytes
    extras: Extras | None
    layout: KVLayout
    prefill_tokens_per_second: float | None

    @property
    def blocks(self) -> int:
        """Its whole blocks."""
        return len(self.tokens) // self.layout.token_bytes


class _Source(NamedTuple):
    """Where a block is to be had."""

    store: RemoteStore
    found: Found


class Lookup:
    """One lookup. `start`, `wait`, `state` and `end` are the lease's, in one thread; the rest runs in others."""

    def __init__(
        self, parts: LookupParts, prompt: Prompt, sources: Sources, *, finished: Callable[[Lookup], None]
    ) -> None:
        self._parts = parts
        self._finished = finished
        self._prompt = prompt
        self._window = FIRST_WINDOW_BLOCKS
        self._failed: set[tuple[TierName, BlockKey]] = set()
        """What a tier said it has, and did not give."""
        self._is_full = False
        """Whether there is no more room in RAM."""
        self._ended = self._expired = False
        self._done = threading.Event()
        self._until_s = 0.0
        self._sources = sources

    @property
    def state(self) -> LeaseState:
        """How far it is; it is ended once its time is up."""
        if not self._expired and not self._done.is_set() and time.monotonic() >= self._until_s:
            self._expired = True
            self.end()
        if self._expired:
            return LeaseState.EXPIRED
        return LeaseState.READY if self._done.is_set() else LeaseState.PENDING

    def start(self, deadline_s: float) -> None:
        """Begin, in the background."""
        self._until_s = time.monotonic() + deadline_s
        self._submit(self._run, None)

    def start_here(self, deadline_s: float) -> None:
        """Begin; ask for the first window in this thread, which saves hand-overs where nobody has anything.

        Takes as long as the slowest tier's budget, whatever the deadline.
        """
        self._until_s = time.monotonic() + deadline_s
        pin = None
        try:
            pin = self._pin()
            sources = self._ask(pin)
        except BaseException:
            self._finish(pin)
            raise
        if sources:
            self._submit(lambda: self._run(pin, sources), pin)
        else:
            self._finish(pin)

    def wait(self) -> LeaseState:
        """Wait until it is done, or its time is up."""
        self._done.wait(max(0.0, self._until_s - time.monotonic()))
        return self.state

    def end(self) -> None:
        """Nobody wants more of it. What has arrived stays."""
        self._ended = True

    def _submit(self, work: Callable[[], None], pin: Pin | None) -> None:
        """Have a worker do it. Where the pool is being closed nobody does."""
        try:
            future = self._parts.workers.submit(work)
        except RuntimeError:
            self._finish(pin)
        else:
            future.add_done_callback(lambda ended: self._finish(pin) if ended.cancelled() else None)

    def _run(self, pin: Pin | None = None, sources: Sequence[_Source] = ()) -> None:
        try:
            if pin is None:
                pin = self._pin()
                sources = self._ask(pin)
            if sources:
                self._look_at_hint()  # before something older is served; where nothing was found, that costs nothing
            while sources and not pin.tree.erased:
                came_whole = self._fetch(pin, sources)
                if self._ended or self._is_full or (came_whole and len(sources) < self._window):
                    return
                if came_whole:
                    self._window = min(_LONGER * self._window, LAST_WINDOW_BLOCKS)
                sources = self._ask(pin)
        except Exception:  # the thread's top: whoever waits must be told
            _log.exception("looking a prompt up in shared tiers")
        finally:
            self._finish(pin)

    def _pin(self) -> Pin:
        """A lease of the lookup's own, on what is here by now."""
        pin = self._parts.index.match(self._prompt.tree, self._prompt.tokens, self._prompt.extras)
        if self._parts.is_stale(pin.tree):  # erased while it was not in the index, and entered again by this match
            self._parts.index.erase(pin.tree)
        return pin

    def _look_at_hint(self) -> None:
        """As with whatever else dragonfly is asked: while it is out, this costs nothing."""
        tenant = self._prompt.tree.id.tenant
        for store in self._parts.stores:
            if store.name is TierName.DRAGONFLY:
                store.attempt(lambda tier: self._parts.look_at_hint(tenant))

    def _finish(self, pin: Pin | None) -> None:
        if pin is not None:
            self._parts.index.unpin(pin)
        self._done.set()
        self._finished(self)

    # -- asking --------------------------------------------------------------------------------------------------------

    def _ask(self, pin: Pin) -> list[_Source]:
        """The leading blocks of the next window that are to be had, each from the tier expected to be quickest."""
        prompt, tree = self._prompt, self._prompt.tree
        count = min(self._window, prompt.blocks - pin.depth)
        stores = [store for store in self._parts.stores if store.usable]
        if count <= 0 or not stores or pin.tree.erased:
            return []
        keys = self._keys(pin, count)
        codecs = sorted(self._parts.encodings.readable(tree.id.fingerprint))
        answers = self._answers(stores, keys, codecs)
        ranked = _quickest_first(stores, count * prompt.layout.record_bytes)
        sources: list[_Source] = []
        for at in range(count):
            source = self._source(ranked, answers, at)
            if source is None:
                break
            sources.append(source)
        return self._worth_reading(sources)

    def _source(
        self, ranked: Sequence[RemoteStore], answers: Mapping[RemoteStore, Sequence[Found | None]], at: int
    ) -> _Source | None:
        """The first of the stores that has this block, and has not failed to give it."""
        for store in ranked:
            found = answers[store][at]
            if found is not None and (store.name, found.key) not in self._failed:
                return _Source(store, found)
        return None

    def _answers(
        self, stores: Sequence[RemoteStore], keys: Sequence[BlockKey], codecs: Sequence[int]
    ) -> dict[RemoteStore, list[Found | None]]:
        """What each store has, all asked at once: the slower ones first, whose servers take longer."""
        tree_id, raw_bytes = self._prompt.tree.id, self._prompt.layout.record_bytes
        questions: dict[RemoteStore, Question] = {}
        try:
            for store in reversed(stores):
                questions[store] = store.inquire(tree_id, keys, codecs)
            answers = {store: questions[store].answer() for store in stores}
        finally:
            for question in questions.values():
                question.close()
        return {
            store: [found if found and _may_fit(found, raw_bytes) else None for found in answer]
            for store, answer in answers.items()
        }

    def _worth_reading(self, sources: list[_Source]) -> list[_Source]:
        """Up to the first block of a tier from which reading them would take longer than computing them."""
        block_tokens, rate = self._prompt.layout.block_tokens, self._prompt.prefill_tokens_per_second
        for store in dict.fromkeys(source.store for source in sources):
            own = [source.found.record_bytes for source in sources if source.store is store]
            if not store.costs.worth_asking(sum(own), len(own) * block_tokens, rate):
                self._parts.count_skipped(len(own))
                kept = next(at for at, source in enumerate(sources) if source.store is store)
                sources = sources[:kept]
        return sources

    def _keys(self, pin: Pin, count: int) -> list[BlockKey]:
        prompt, size = self._prompt, self._prompt.layout.token_bytes
        run = prompt.tokens[pin.depth * size : (pin.depth + count) * size]
        keys = prompt.tree.keys_after(self._parts.index.last_key(pin), pin.depth, run, prompt.extras)
        return [BlockKey(keys[at : at + KEY_BYTES]) for at in range(0, len(keys), KEY_BYTES)]

    # -- fetching ------------------------------------------------------------------------------------------------------

    def _fetch(self, pin: Pin, sources: Sequence[_Source]) -> bool:
        """Bring these blocks, which follow the pin; whether all came."""
        return all(not self._ended and self._fetch_or_await(pin, batch) for batch in _batches(sources))

    def _fetch_or_await(self, pin: Pin, batch: Sequence[_Source]) -> bool:
        """Bring these blocks, or see somebody else do it; whether all came, and were fetched here."""
        claim, is_ours = self._parts.claims.claim([source.found.key for source in batch])
        if not is_ours:
            if not claim.wait(max(0.0, self._until_s - time.monotonic())):
                self._expired = True
                self.end()
            self._advance(pin)
            return False
        try:
            if self._advance(pin):  # somebody else has brought it since it was asked for
                return False
            return self._fetch_batch(pin, batch[: len(claim.blocks)]) == len(batch)
        finally:
            claim.release()

    def _advance(self, pin: Pin) -> int:
        """Lengthen the pin over what others have brought; by how many blocks."""
        return self._parts.index.advance(pin, self._prompt.tokens, self._prompt.extras, counted=False)

    def _fetch_batch(self, pin: Pin, batch: Sequence[_Source]) -> int:
        """Records of one store and one length; how many leading ones are in the tree now."""
        memory, account = self._parts.memory, pin.tree.account
        store, record_bytes = batch[0].store, batch[0].found.record_bytes
        slots = memory.allocate(account, record_bytes, len(batch)).slots
        self._is_full = len(slots) < len(batch)
        heads = list(self._heads(pin, [source.found.key for source in batch[: len(slots)]]))
        good = 0
        try:
            wanted = [source.found for source in batch[: len(slots)]]
            buffers = [memory.ram.record(slot) for slot in slots]
            done = store.get(pin.tree.id, wanted, buffers)
            good = self._verified(pin, store, wanted, done, buffers, heads)
        finally:
            memory.free(account, slots[good:])
        if good < len(slots):
            self._failed.add((store.name, batch[good].found.key))
            self._is_full = False
        return self._enter(pin, batch, heads, slots[:good])

    def _verified(
        self,
        pin: Pin,
        store: RemoteStore,
        wanted: Sequence[Found],
        done: Sequence[bool],
        buffers: Sequence[Buffer],
        heads: Sequence[Head],
    ) -> int:
        """How many leading buffers hold the records that they should. One that is bad is dropped from its tier."""
        for at, head in enumerate(heads):
            if not done[at]:
                return at
            try:
                self._parts.encodings.check(open_record(buffers[at], head), buffers[at])
            except CorruptRecordError as error:
                store.count_corrupt(error.reason.value, head.key)
                store.drop(pin.tree.id, [wanted[at]])
                return at
        return len(wanted)

    def _heads(self, pin: Pin, keys: Sequence[BlockKey]) -> Iterator[Head]:
        """What the records of the blocks that follow the pin are to say of themselves."""
        prompt, size = self._prompt, self._prompt.layout.token_bytes
        fingerprint, tenant, epoch = pin.tree.id
        parent = self._parts.index.last_key(pin)
        for depth, key in enumerate(keys, pin.depth):
            yield Head(
                key=key,
                parent=parent,
                fingerprint=fingerprint,
                tenant=tenant,
                epoch=epoch,
                depth=depth,
                tokens=prompt.tokens[depth * size : (depth + 1) * size],
                extra=prompt.extras.get(depth, b"") if prompt.extras else b"",
                payload_bytes=prompt.layout.payload_bytes,
                raw_bytes=prompt.layout.payload_bytes,
            )
            parent = key

    def _enter(self, pin: Pin, batch: Sequence[_Source], heads: Sequence[Head], slots: list[int]) -> int:
        """Enter verified slots in the tree; how many blocks are there now."""
        if not slots:
            return 0
        store, record_bytes = batch[0].store, batch[0].found.record_bytes
        index, first = self._parts.index, pin.depth
        is_raw = record_bytes == self._prompt.layout.record_bytes
        if not is_raw:
            index.expect_encoded(pin.tree)
        charged = len(slots) * record_bytes
        refused = index.attach(pin, self._prompt.tokens, RAM, slots, self._prompt.extras, charged=charged)
        self._parts.memory.drop(refused)
        if pin.tree.erased:
            return 0
        kept = [at for at, slot in enumerate(slots) if slot not in refused]
        if kept and self._parts.events.active:
            forms = [Form(source.found.codec, record_bytes) for source in batch]
            self._parts.events.publish_stored([heads[at] for at in kept], TierName.RAM, [forms[at] for at in kept])
        self._sources.update({first + at: store.name for at in kept})
        if is_raw:
            self._parts.ram_encoder.want(pin.node)
        return len(slots)


def _may_fit(found: Found, raw_bytes: int) -> bool:
    """Whether it may be a record of a model with such blocks: of one length if it is not encoded, else shorter."""
    if found.record_bytes % PAGE_BYTES or found.record_bytes <= PAGE_BYTES:
        return False
    return found.record_bytes == raw_bytes if found.codec == CODEC_NONE else found.record_bytes < raw_bytes


def _quickest_first(stores: Sequence[RemoteStore], nbytes: int) -> list[RemoteStore]:
    """By how long each is expected to take for so many bytes; in the given order while one has not been measured."""
    expected = {store: store.costs.expected_seconds(nbytes) for store in stores}
    if None in expected.values():
        return list(stores)
    return sorted(stores, key=lambda store: expected[store] or 0.0)


def _batches(sources: Sequence[_Source]) -> Iterator[list[_Source]]:
    """Consecutive blocks of one store and one length, as many as are read at once."""
    for (_, record_bytes), run in groupby(sources, key=lambda source: (source.store, source.found.record_bytes)):
        alike = list(run)
        most = max(1, min(BATCH_BLOCKS, BATCH_BYTES // record_bytes))
        for at in range(0, len(alike), most):
            yield alike[at : at + most]

"""Tells the catalog what happens here, from what the engine leaves in a queue.

Nothing of it is worked out in the caller's thread: a store leaves a parcel, an eviction its keys. The queue is looked
at a few times a second, so that nobody is woken. It is bounded; beyond it the oldest entries are dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

from kvpool.blocks.identity import BlockKey, TreeId
from kvpool.blocks.record import CODEC_NONE, Head
from kvpool.catalog.rows import BlocksRemoved, BlocksStored, BlocksUsed, Op, PromptAsked, joined
from kvpool.pool.events import Form, chains
from kvpool.prefix import sending
from kvpool.prefix.history import Loss
from kvpool.prefix.index import LEVEL_NAMES, PrefixIndex
from kvpool.prefix.sending import Parcel
from kvpool.tiers.tier import TierName

if TYPE_CHECKING:
    from kvpool.catalog.writer import CatalogWriter

EVERY_S = 0.1
MAX_QUEUED = 100_000
TOKEN_BYTES = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _New:
    """A parcel was stored in this tier."""

    parcel: Parcel
    tier: TierName
    at_s: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """The prompt of a parcel was asked for."""

    parcel: Parcel
    at_s: float


@dataclass(frozen=True, slots=True)
class _Used:
    """A parcel was used."""

    parcel: Parcel
    at_s: float


@dataclass(frozen=True, slots=True)
class _Copied:
    """Blocks of one prompt have a copy in this tier."""

    heads: Sequence[Head]
    tier: TierName
    forms: Sequence[Form] | None
    at_s: float


@dataclass(frozen=True, slots=True)
class _Removed:
    """Blocks have no copy at this level any more."""

    level: int
    keys: Sequence[BlockKey]
    loss: Loss
    at_s: float


_Entry: TypeAlias = _New | _Asked | _Used | _Copied | _Removed


class Reporter:
    """The queue, and the thread that empties it. What reports may be called from any thread, with any lock held."""

    def __init__(self, index: PrefixIndex, writer: CatalogWriter, *, clock: Callable[[], float] = time.time) -> None:
        self.dropped = 0
        """Entries that were dropped, since the queue was full."""
        self.embeds = False
        """Whether prompts are remembered by their vectors too, each as the point of its last block's key."""
        self._index = index
        self._writer = writer
        self._clock = clock
        self._queue: deque[_Entry] = deque()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpool-report", daemon=True)
        self._thread.start()

    def stored(self, parcel: Parcel, tier: TierName) -> None:
        """A prompt's new blocks were stored."""
        self._push(_New(parcel, tier, self._clock()))

    def asked(self, parcel: Parcel) -> None:
        """A prompt was stored, whole or as far as there was room."""
        self._push(_Asked(parcel, self._clock()))

    def used(self, parcel: Parcel) -> None:
        """A prompt's blocks are in use; told once in a round for each edge."""
        self._push(_Used(parcel, self._clock()))

    def copied(self, heads: Sequence[Head], tier: TierName, forms: Sequence[Form] | None) -> None:
        """Blocks were copied to another tier."""
        self._push(_Copied(heads, tier, forms, self._clock()))

    def removed(self, level: int, keys: Sequence[BlockKey], loss: Loss) -> None:
        """Copies have left a tier of this process."""
        self._push(_Removed(level, keys, loss, self._clock()))

    def offer(self, op: Op) -> None:
        """Report something else."""
        self._writer.offer(op)

    def drain(self) -> None:
        """Hand over all that is queued, in order."""
        with self._lock:
            while self._queue:
                for op in self._ops(self._queue.popleft()):
                    self._writer.offer(op)

    def close(self, until_s: float) -> None:
        """Hand over what is queued, and end; `until_s` is on `time.monotonic`."""
        self._closed.set()
        self._thread.join(max(0.0, until_s - time.monotonic()))

    def _push(self, entry: _Entry) -> None:
        if len(self._queue) >= MAX_QUEUED:
            self.dropped += 1
            return
        self._queue.append(entry)

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            try:
                self.drain()
            except Exception:  # the thread's top: the rest is to be reported still
                _log.exception("reporting to the catalog")
        self.drain()

    def _ops(self, entry: _Entry) -> Iterable[Op]:
        match entry:
            case _New():
                return self._of_new(entry)
            case _Asked():
                return self._of_asked(entry.parcel, entry.at_s)
            case _Used():
                return self._of_used(entry)
            case _Copied():
                return _of_copied(entry)
            case _Removed():
                tier = TierName(LEVEL_NAMES[entry.level])
                return [BlocksRemoved(joined(entry.keys), tier, entry.loss.value, entry.at_s)]

    def _of_new(self, entry: _New) -> Iterator[Op]:
        known = sending.chain(self._index, entry.parcel)
        if known is None:
            return
        tree_id, keys = known
        tree = entry.parcel.node.tree
        block_tokens, first = tree.token_bytes // TOKEN_BYTES, entry.parcel.first
        if len(keys) > first:
            parent = keys[first - 1] if first else tree.chain.root
            yield BlocksStored(
                tree_id, parent, joined(keys[first:]), first, block_tokens, entry.tier, CODEC_NONE,
                tree.record_bytes, entry.at_s,
            )  # fmt: skip

    def _of_asked(self, parcel: Parcel, at_s: float) -> Iterator[Op]:
        known = sending.chain(self._index, parcel)
        if known is not None and known[1]:
            tree_id, keys = known
            tokens = len(keys) * parcel.node.tree.token_bytes // TOKEN_BYTES
            embedding = UUID(bytes=keys[-1]) if self.embeds else None
            yield PromptAsked(tree_id, keys[-1], tokens, embedding, at_s)

    def _of_used(self, entry: _Used) -> Iterator[Op]:
        known = sending.chain(self._index, entry.parcel)
        if known is not None and known[1]:
            yield BlocksUsed(joined(known[1]), entry.at_s)
            yield from self._of_asked(entry.parcel, entry.at_s)


def _of_copied(entry: _Copied) -> Iterator[Op]:
    """A report for each run of blocks that follow each other, and are of one codec and length."""
    forms = entry.forms or [Form(head.codec, head.record_bytes) for head in entry.heads]
    form_of = {head.key: form for head, form in zip(entry.heads, forms, strict=True)}
    for chain in chains(entry.heads):
        for form, alike in groupby(chain, key=lambda head: form_of[head.key]):
            run = list(alike)
            first = run[0]
            yield BlocksStored(
                TreeId(first.fingerprint, first.tenant, first.epoch), first.parent,
                joined(head.key for head in run), first.depth, len(first.tokens) // TOKEN_BYTES, entry.tier,
                form.codec, form.record_bytes, entry.at_s,
            )  # fmt: skip

"""Moves blocks from device memory down to RAM: the coldest, and before there is no room left.

In the background while the tier is nearly full, so that a store finds free slots; by whoever needs room where that was
not enough. What to take is the policy's choice. What has a copy below already goes without a copy being made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.pool.copies import Copies
from kvpool.pool.events import EventBus
from kvpool.pool.gpu_store import GpuOutError, GpuStore
from kvpool.pool.memory import Memory
from kvpool.pool.ram_encoder import RamEncoder
from kvpool.prefix import demoting
from kvpool.prefix.accounts import Account
from kvpool.prefix.demoting import Span
from kvpool.prefix.heads import pinned_heads
from kvpool.prefix.index import Gone, PrefixIndex
from kvpool.prefix.node import NOWHERE, RAM
from kvpool.tiers.tier import TierName

NEARLY_FULL, FULL_NO_MORE = 0.85, 0.75
"""Shares of the memory that is to be had between which blocks are moved down ahead."""
BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class DemotionParts:
    """What moving works with, up and down."""

    index: PrefixIndex
    store: GpuStore
    memory: Memory
    copies: Copies
    events: EventBus
    ram_encoder: RamEncoder
    payload_bytes_of: Callable[[Fingerprint], int | None]


class Demoter:
    """`run` is a chore; all else may be called from any thread."""

    def __init__(self, parts: DemotionParts) -> None:
        self._parts = parts
        self.room_bytes: int | None = None
        """What the device had when it gave no more; None: the capacity is to be had, as far as is known."""
        self.demoted_blocks = 0
        """Blocks that were copied down."""

    def wake_if_nearly_full(self) -> None:
        """Something has come: have room made for what comes next."""
        if self._above(NEARLY_FULL) > 0:
            self._parts.store.wake()

    def run(self) -> None:
        """Move the coldest blocks down until there is room again, or nothing more may go or finds room below."""
        if self._above(NEARLY_FULL) > 0:
            while (excess := self._above(FULL_NO_MORE)) > 0 and self.bring_down(min(BATCH_BYTES, excess)):
                pass

    def bring_down(
        self,
        wanted_bytes: int,
        *,
        requester: Account | None = None,
        own: Account | None = None,
        older_than: int | None = None,
    ) -> int:
        """Take blocks of one age from device memory, about `wanted_bytes`; the bytes that are free now.

        0 where nothing may go, or what goes next has nowhere to go to. See `kvpool.prefix.demoting.coldest`.
        """
        index = self._parts.index
        span = demoting.coldest(index, wanted_bytes, requester=requester, own=own, older_than=older_than)
        if span is None:
            return 0
        try:
            self._copy_down(span)
        except GpuOutError:
            index.unpin(span.pin)
            return 0
        except BaseException:
            index.unpin(span.pin)
            raise
        return self._release(demoting.leave_device(index, span))

    def vacate(self, places: Sequence[int]) -> list[int]:
        """Move the blocks at these places down, for their memory is to go; the places that leases still hold.

        What finds no room in RAM is lost.
        """
        held = []
        for place in places:
            span = demoting.held_at(self._parts.index, place)
            if span is None:
                if self._parts.store.slot_bytes(place):
                    held.append(place)
                continue
            try:
                self._copy_down(span)
            except GpuOutError:
                self._parts.index.unpin(span.pin)
                return []
            except BaseException:
                self._parts.index.unpin(span.pin)
                raise
            if not self._release(demoting.give_up_place(self._parts.index, span)):
                held.append(place)
        return held

    def _above(self, share: float) -> int:
        """By how many bytes more is used than this share of what is to be had."""
        store = self._parts.store
        room = store.usable_bytes
        if self.room_bytes is not None:
            room = min(room, self.room_bytes)
        return store.used_bytes - int(share * room)

    def _release(self, gone: Sequence[Gone]) -> int:
        self._parts.copies.release(gone)
        return sum(copy.record_bytes for copy in gone)

    def _copy_down(self, span: Span) -> None:
        """Copy what has no copy in RAM, as far as there is room for it, the last blocks first: those go first."""
        parts, tree = self._parts, span.pin.tree
        payload_bytes = parts.payload_bytes_of(tree.id.fingerprint)
        wanted = [
            at
            for at, (place, is_below) in enumerate(zip(span.places, span.is_below, strict=True))
            if not is_below and place not in parts.store.decoded
        ]
        if not wanted or payload_bytes is None:
            return
        slots = parts.memory.allocate(tree.account, tree.record_bytes, len(wanted)).slots
        if not slots:
            return
        wanted = wanted[-len(slots) :]
        end = PAGE_BYTES + payload_bytes
        try:
            into = [parts.memory.ram.record(slot)[PAGE_BYTES:end] for slot in slots]
            parts.store.download([span.places[at] for at in wanted], into)
        except GpuOutError as error:
            if error.settled:  # else bytes may still arrive there: nobody else must have these slots
                parts.memory.free(tree.account, slots)
            raise
        except BaseException:
            parts.memory.free(tree.account, slots)
            raise
        self._enter(span, wanted, slots, payload_bytes)

    def _enter(self, span: Span, wanted: Sequence[int], slots: Sequence[int], payload_bytes: int) -> None:
        parts, tree = self._parts, span.pin.tree
        places = [NOWHERE] * len(span.places)
        for at, slot in zip(wanted, slots, strict=True):
            places[at] = slot
        charged = len(slots) * tree.record_bytes
        refused = parts.index.fill(span.pin, span.first, RAM, places, charged=charged)
        parts.memory.drop(refused)
        self.demoted_blocks += len(slots) - len(refused)
        if parts.events.active and not tree.erased:
            heads = pinned_heads(parts.index, span.pin, span.first, len(places), payload_bytes=payload_bytes)
            kept = [head for head, place in zip(heads, places, strict=True) if place != NOWHERE]
            parts.events.publish_stored(kept, TierName.RAM)
        parts.ram_encoder.want(span.pin.node)

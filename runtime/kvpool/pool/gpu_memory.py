"""Room in device memory for blocks: slots of the gpu tier, made free by moving others down, and together.

As `Memory` for RAM: a slot that was allocated here is charged to its model's account until it is entered or freed.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from functools import partial

from kvpool.pool.charging import charge
from kvpool.pool.copies import Copies
from kvpool.pool.gpu_demotion import Demoter
from kvpool.pool.gpu_store import GpuOutError, GpuStore
from kvpool.prefix.accounts import Account
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.node import GPU
from kvpool.prefix.relocating import hold, release, settle
from kvpool.tiers.ram import region_of
from kvpool.tiers.tier import TierName


class GpuMemory:
    """Allocates slots for records. Safe from any thread. A device that is out, or full, is no room, and no error."""

    name = TierName.GPU

    def __init__(self, store: GpuStore, index: PrefixIndex, copies: Copies, demoter: Demoter) -> None:
        self._leaving: list[int] = []
        """Places that have to go since memory was given back, and are leased."""
        self._leaving_lock = threading.Lock()
        self._store = store
        self._index = index
        self._copies = copies
        self._demoter = demoter

    def allocate(self, account: Account, owner: Hashable, record_bytes: int, count: int) -> list[int]:
        """Up to `count` places for `owner`; fewer, or none, where what could make room is leased or not its own."""
        return self._allocate(account, owner, record_bytes, count, older_than=None)

    def allocate_over_colder(
        self, account: Account, owner: Hashable, record_bytes: int, count: int, *, used_at: int
    ) -> list[int]:
        """As `allocate`, in free room and in place of blocks that were used before `used_at`; none is lost for it."""
        return self._allocate(account, owner, record_bytes, count, older_than=used_at)

    def free(self, account: Account, record_bytes: int, places: Sequence[int]) -> None:
        """Give back places that were allocated for `account` and were not entered in the index."""
        if places:
            self._index.discharge(account, GPU, len(places) * record_bytes)
            self.drop(places)

    def drop(self, places: Sequence[int]) -> None:
        """Give back places that the index did not take, and has discharged."""
        self._store.drop(places)

    def give_back(self, nbytes: int) -> int:
        """The engine is out of device memory: hold so many bytes less, as far as leases allow; the bytes given back."""
        before = self._store.reserved_bytes()
        try:
            places = self._store.give_back(nbytes)
        except GpuOutError:
            return before
        with self._leaving_lock:
            self._leaving = self._demoter.vacate([*self._leaving, *places])
        return max(0, before - self._store.reserved_bytes())

    def vacate_leaving(self) -> None:
        """Take another look at what was leased when memory was given back."""
        if self._leaving:
            with self._leaving_lock:
                self._leaving = self._demoter.vacate(self._leaving)

    def _allocate(
        self, account: Account, owner: Hashable, record_bytes: int, count: int, *, older_than: int | None
    ) -> list[int]:
        if record_bytes > self._store.usable_bytes:
            return []
        give_up = partial(self._give_up, account, older_than)
        granted, _ = charge(self._index, account, GPU, [record_bytes] * count, give_up=give_up)
        places: list[int] = []
        try:
            if granted:
                self._fill_up(places, owner, record_bytes, granted)
                self._make_room(places, account, owner, record_bytes, granted, older_than)
        except GpuOutError:
            self.drop(places)
            places = []
        if len(places) < granted:
            self._index.discharge(account, GPU, (granted - len(places)) * record_bytes)
        return places

    def _give_up(self, account: Account, older_than: int | None, nbytes: int) -> bool:
        """Have the account give up some of its own; whether it did."""
        if self._demoter.bring_down(nbytes, own=account, older_than=older_than):
            return True
        return older_than is None and self._copies.evict_own(self._index, account, GPU, nbytes)

    def _fill_up(self, places: list[int], owner: Hashable, record_bytes: int, count: int) -> bool:
        """Take slots that are free; whether there were any. Notes what a device that gives no more has given."""
        before = len(places)
        places += self._store.allocate(record_bytes, count - before, owner)
        reserved = self._store.reserved_bytes()
        if len(places) < count:
            self._demoter.room_bytes = reserved
        elif self._demoter.room_bytes is not None and reserved > self._demoter.room_bytes:
            self._demoter.room_bytes = None
        return len(places) > before

    def _make_room(
        self,
        places: list[int],
        account: Account,
        owner: Hashable,
        record_bytes: int,
        count: int,
        older_than: int | None,
    ) -> None:
        stuck: set[int] = set()
        while len(places) < count:
            wanted = (count - len(places)) * record_bytes
            freed = bool(self._demoter.bring_down(wanted, requester=account, older_than=older_than))
            if not freed and older_than is None:
                gone = self._index.evict(GPU, wanted, account)
                self._copies.release(gone)
                freed = bool(gone)
            took = self._fill_up(places, owner, record_bytes, count)
            if len(places) < count and self._make_extent(record_bytes, stuck):
                took = self._fill_up(places, owner, record_bytes, count) or took
            if not took and not freed:
                break

    def _make_extent(self, record_bytes: int, stuck: set[int]) -> bool:
        """Empty an extent of another size by moving its blocks, so that it can be cut for this one."""
        while (occupied := self._store.movable_places(record_bytes, stuck)) is not None:
            unmoved = [place for place in occupied if not self._move(place)]
            if not unmoved:
                return True
            self._store.cancel_claim(record_bytes)
            stuck.update(map(region_of, unmoved))
        return False

    def _move(self, place: int) -> bool:
        """Copy one block to another place of its size on the device, charged to nobody: the old one goes at once."""
        record_bytes = self._store.slot_bytes(place)
        if not record_bytes:
            return True
        held = hold(self._index, GPU, place)
        if held is None:
            return not self._store.slot_bytes(place)
        try:
            fresh = self._store.allocate(record_bytes, 1, held.pin.tree.id)
            if fresh:
                self._copy(place, fresh[0], record_bytes)
        except BaseException:
            release(self._index, held)
            raise
        if not fresh:
            release(self._index, held)
            return False
        moved = settle(self._index, held, fresh[0])
        self.drop([place if moved else fresh[0]])
        return moved

    def _copy(self, place: int, fresh: int, nbytes: int) -> None:
        """On the device, in the calling thread's order. A mark that the bytes were decoded goes with them."""
        if place in self._store.decoded:
            self._store.decoded.add(fresh)
        with self._store.in_order():
            self._store.payload(fresh, nbytes).copy_(self._store.payload(place, nbytes))

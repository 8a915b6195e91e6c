"""The slab allocator: memory in extents, each cut into slots of one size.

Layout: an extent is about `extent_bytes` of memory, of the host or of a device, and holds a whole number of slots, so
that no tail is wasted; a slot is `extent number << 32 | index`. Sizes are any multiples of 4 KiB. Extents are mapped on
demand, never beyond `capacity_bytes`; one that is wholly free belongs to whoever needs it next, and is cut anew with
its pages.

Placement: each size keeps a stack of its extents that have room, and allocates from the top. An extent that was full
goes on top when a slot of it is freed; one that has become empty goes to the bottom. So the fuller ones fill up, the
sparser ones drain, and no allocation searches, whatever the number of extents. When another size needs room,
`movable_extent` and `sparse_extent` say what to move or evict, and hold that extent back until it is empty.

Contents: a slot is handed out with the bytes that its last owner left. Nobody may see them: the engine overwrites the
whole payload when it stores, and sealing a record zeroes its padding.

Threads: every method may be called from any thread; one lock, held for a few list operations. `for _ in self._acquired`
takes it as `with` does, in half the time: neither leaves a moment in which Ctrl-C finds the lock taken and nobody to
give it back, as a plain `acquire()` does.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.errors import InputError
from kvpool.tiers.extents import INDEX_MASK, SLOT_BITS, Bytes, Extent, ExtentMemory, HostSource, PageLock, View

MAX_EXTENT_BYTES = 64 << 20
EXTENTS_PER_CAPACITY = 64
"""Each size may strand less than one extent's slots, so five sizes strand less than 5 in 64: 8 %."""

_UNCUT = 0
"""The slot size under which extents are filed that are not cut yet."""
_RETIRED = 0
"""Claims an extent for nobody: it is unmapped when it is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlabStats:
    """What a slab holds now, in bytes, and counts since it was made."""

    capacity_bytes: int
    reserved_bytes: int
    """Held in extents."""
    used_bytes: int
    """Held in slots that are in use."""
    stranded_bytes: int
    """Unused bytes of extents that are partly in use: only their own size can have them, unless something is moved."""
    extents: int
    sizes: int
    mapped: int
    """Allocations that had to map memory; all others were served from extents that were there."""
    recut: int
    """Extents that were cut anew for another size."""

    @property
    def usable_share(self) -> float:
        """Share of the capacity that holds blocks, or could hold blocks of any size at once."""
        return 1 - self.stranded_bytes / self.capacity_bytes if self.capacity_bytes else 1.0


class SlabOf(Generic[View]):
    """Slots of any number of sizes, within `capacity_bytes`, of the memory that `source` gives, seen as `View`.

    `source` returns the memory of one extent, of the length asked for; `OSError` says that there is none to be had: no
    room. `extent_bytes` is by default 1/64 of the capacity, at most 64 MiB; a larger slot is an extent of its own.
    """

    def __init__(
        self, capacity_bytes: int, source: Callable[[int], ExtentMemory[View]], *, extent_bytes: int | None = None
    ) -> None:
        self._source = source
        self._capacity_bytes = _checked_capacity(capacity_bytes)
        self._asked_extent_bytes = extent_bytes
        self._extent_bytes = _extent_bytes(extent_bytes, capacity_bytes)
        self._reserved_bytes = 0
        self._prefaulting_bytes = 0  # of these, what nobody can use yet
        self._lock = threading.Lock()
        self._acquired = iter(self._lock.acquire, False)  # endless: each step takes the lock
        self._owner: dict[int, Extent[View]] = {}  # of each slot in use
        self._sizes: dict[int, dict[int, Extent[View]]] = {}  # slot size -> number -> extent: all there are
        self._stacks: dict[int, list[Extent[View]]] = {}  # slot size -> the unclaimed ones that have a free slot
        self._empty: dict[int, Extent[View]] = {}  # may name some that were allocated from since: see _empties
        self._claimed: dict[int, dict[int, Extent[View]]] = {}  # by the slot size that needs the room
        self._promised: dict[int, int] = {}  # to each of these sizes: bytes that are not reserved yet
        self._next_number = 1
        self._mapped = 0
        self._recut = 0
        self._closed = False

    def allocate(self, slot_bytes: int) -> int | None:
        """Return a slot, or None when there is no room: nothing is ever evicted here."""
        for _ in self._acquired:
            try:
                try:
                    stack = self._stacks[slot_bytes]
                    extent = stack[-1]
                except (KeyError, IndexError):
                    if not self._grow(slot_bytes):
                        return None
                    stack = self._stacks[slot_bytes]
                    extent = stack[-1]
                free = extent.free
                slot = free[-1]
                del free[-1]
                if not free:
                    del stack[-1]
                self._owner[slot] = extent
                return slot
            finally:
                self._lock.release()
        return None

    def allocate_many(self, slot_bytes: int, count: int) -> list[int]:
        """Return up to `count` slots: as many as there are."""
        taken: list[int] = []
        with self._lock:
            while len(taken) < count:
                if not self._stacks.get(slot_bytes) and not self._grow(slot_bytes):
                    break
                stack = self._stacks[slot_bytes]
                extent = stack[-1]
                slots = extent.free[len(taken) - count :]
                del extent.free[len(taken) - count :]
                if not extent.free:
                    del stack[-1]
                self._owner.update(dict.fromkeys(slots, extent))
                taken += reversed(slots)
        return taken

    def free(self, slot: int) -> None:
        """Take a slot back. Raises `ValueError` when it is not in use: never handed out, or freed before."""
        for _ in self._acquired:
            try:
                try:
                    extent = self._owner[slot]
                except KeyError:
                    return self._reject(slot)
                del self._owner[slot]
                free = extent.free
                free.append(slot)
                if not 1 < len(free) < extent.slots:
                    self._settle(extent)
                return None
            finally:
                self._lock.release()
        return None

    def free_many(self, slots: Sequence[int]) -> None:
        """Take slots back. Raises `ValueError` at the first that is not in use; those before it are free then."""
        owner = self._owner
        with self._lock:
            for slot in slots:
                extent = owner.pop(slot, None)
                if extent is None:
                    self._reject(slot)
                    continue
                extent.free.append(slot)
                if not 1 < len(extent.free) < extent.slots:
                    self._settle(extent)

    def view(self, slot: int) -> View:
        """Return the slot's memory: on the host writable uint8, exactly its length, aligned to 4 KiB, in 0.2 us.

        Good for as long as the slot is held: afterwards it shows whatever comes next. Raises `ValueError` when the slot
        is not in use.
        """
        try:
            view = self._owner[slot].rows[slot & INDEX_MASK]
        except (KeyError, IndexError):  # IndexError: it was freed, and its extent cut anew, since the line above began
            raise _not_in_use(slot) from None
        return view

    @property
    def extent_bytes(self) -> int:
        """About how long an extent is."""
        return self._extent_bytes

    def slot_bytes(self, slot: int) -> int | None:
        """Return the size of a slot in use, None for any other."""
        extent = self._owner.get(slot)
        return None if extent is None else extent.slot_bytes

    def movable_extent(self, slot_bytes: int, *, skip: Collection[int] = ()) -> list[int] | None:
        """As `sparse_extent`, but only where the extent's blocks fit into free slots of their own size elsewhere.

        So nothing needs to be evicted. Asked after every eviction, it turns the slack of all other sizes into room. It
        looks at extents that have a free slot, and at no others.
        """
        with self._lock:
            return self._claim_room(slot_bytes, skip, may_evict=False)

    def sparse_extent(self, slot_bytes: int, *, skip: Collection[int] = ()) -> list[int] | None:
        """Say how to make room for a slot of `slot_bytes`: the slots in use of the extent that is cheapest to empty.

        Extents of that size itself are left alone. For each slot the caller allocates another of its size, copies and
        frees, or evicts when there is none; then it allocates what it wanted, or asks again when that is refused.
        Meanwhile nobody else is given a slot of this extent, nor what else was counted on; that ends when it is used,
        with the next call for the same size, with `cancel_claim`, or when that size finds room elsewhere. `skip` names
        extents (`slot >> 32`) to pass over, because they hold a leased block. Several extents are listed where one is
        too small. An empty list: there is room by now. None: nothing could make room.
        """
        with self._lock:
            return self._claim_room(slot_bytes, skip, may_evict=True)

    def cancel_claim(self, slot_bytes: int) -> None:
        """Room for `slot_bytes` is no longer wanted: what was held back for it may be allocated from again."""
        with self._lock:
            self._release_claim(slot_bytes)

    def resize(self, capacity_bytes: int) -> list[int]:
        """Change the capacity. Return the slots in use that must be moved or freed before no more than that is held.

        They are those of the sparsest extents. No slot of these is handed out again, and each is unmapped once empty.
        What was held back for a size is held back no longer.
        """
        _checked_capacity(capacity_bytes)
        unmapped: list[Extent[View]] = []
        with self._lock:
            if self._closed:
                return []
            for claimant in [*self._claimed, *self._promised]:
                self._release_claim(claimant)
            self._capacity_bytes = capacity_bytes
            self._extent_bytes = _extent_bytes(self._asked_extent_bytes, capacity_bytes)
            for extent in self._empties():
                if self._excess_bytes() > 0:
                    self._remove(extent)
                    unmapped.append(extent)
            occupied = [slot for extent in self._retire_excess() for slot in extent.slots_in_use()]
        for extent in unmapped:
            extent.unmap()
        return occupied

    def prefault_extent(self, stopped: Callable[[], bool]) -> int:
        """Map one more extent and make it ready, for any size to use. Return the bytes that are: pages touched.

        0: the capacity is reached, or `stopped()`, which is asked before each step of some 8 MiB. The extent is
        nobody's until that is done, so a slot in use is never touched. Raises `OSError` when the system is out of
        memory.
        """
        if stopped():
            return 0
        with self._lock:
            nbytes = min(self._extent_bytes, self._room(_UNCUT) // PAGE_BYTES * PAGE_BYTES)
            if nbytes <= 0:
                return 0
            self._reserved_bytes += nbytes
            self._prefaulting_bytes += nbytes
            number = self._new_number()
        extent = None
        try:
            extent = Extent(number, self._source(nbytes))
            return extent.memory.touch(stopped)
        finally:
            self._publish(extent, nbytes)

    @property
    def capacity_bytes(self) -> int:
        """The most that extents may hold."""
        return self._capacity_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes held in extents. Above the capacity only after `resize`, until the slots that it named are freed."""
        return self._reserved_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use: a sum over all extents, 0.1 us for each."""
        with self._lock:
            return self._used_bytes()

    def stats(self) -> SlabStats:
        """Count what the slab holds: a walk over all extents."""
        with self._lock:
            extents = self._extents()
            return SlabStats(
                capacity_bytes=self._capacity_bytes,
                reserved_bytes=self._reserved_bytes,
                used_bytes=self._used_bytes(),
                stranded_bytes=sum(extent.nbytes - extent.used_bytes for extent in extents if not extent.is_empty),
                extents=len(extents),
                sizes=len(self._stacks),
                mapped=self._mapped,
                recut=self._recut,
            )

    def close(self) -> None:
        """Give all memory back. Afterwards nothing can be allocated, and freeing a slot does nothing."""
        with self._lock:
            self._closed = True
            self._capacity_bytes = 0
            self._owner.clear()
            self._promised.clear()
            extents = self._extents()
            for extent in extents:
                self._remove(extent)
        for extent in extents:
            extent.unmap()

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless every invariant of the slab holds. Slow: for tests and for diagnosis."""
        with self._lock:
            extents = self._extents()
            for extent in extents:
                self._check_extent(extent)
            for size, stack in self._stacks.items():
                filed = self._sizes.get(size, {})
                _check(all(filed.get(extent.number) is extent for extent in stack), "a stack holds extents of its size")
                _check(len(set(stack)) == len(stack), "an extent is stacked once")
            _check(self._sizes.keys() - {_UNCUT} == self._stacks.keys(), "a size has a stack while it has extents")
            _check(len(self._owner) == sum(extent.used_slots for extent in extents), "a slot in use lies in an extent")
            mapped = sum(extent.nbytes for extent in extents)
            _check(mapped + self._prefaulting_bytes == self._reserved_bytes, "what is mapped is what is reserved")
            retired = sum(extent.nbytes for extent in self._claimed.get(_RETIRED, {}).values())
            _check(self._excess_bytes() <= retired, "the capacity holds")
            promised = sum(self._promised.values())
            _check(not promised or self._room(_UNCUT) >= 0, "what is promised can be mapped")
            _check(all(self._claimed.values()), "a claim is forgotten with its last extent")
            claims = sum(len(claimed) for claimed in self._claimed.values())
            _check(claims == sum(extent.claim is not None for extent in extents), "a claimed extent is there")

    def _check_extent(self, extent: Extent[View]) -> None:
        free = set(extent.free)
        stacked = extent in self._stacks.get(extent.slot_bytes, [])
        _check(len(free) == len(extent.free), "a slot is free once")
        _check(free.isdisjoint(self._owner), "a free slot is not in use")
        _check(all(self._owner.get(slot) is extent for slot in extent.slots_in_use()), "a slot is free or in use")
        _check(extent.slots * extent.slot_bytes <= extent.nbytes, "the slots lie within the mapping")
        if extent.claim is not None:
            _check(self._claimed[extent.claim][extent.number] is extent, "a claim is on record")
            _check(not stacked, "a claimed extent is not allocated from")
        else:
            _check(stacked == bool(free), "an unclaimed extent is stacked while it has a free slot")
            _check(not extent.is_empty or extent.number in self._empty, "an empty extent can be found")

    def _grow(self, slot_bytes: int) -> bool:
        """Cut an extent for `slot_bytes` and put it on top: an empty one, or one of new memory. False: no room."""
        if slot_bytes <= 0 or slot_bytes % PAGE_BYTES:
            raise InputError(f"a slot of {slot_bytes} bytes: sizes are multiples of {PAGE_BYTES}, above 0")
        if not self._empty and not self._claimed and self._room(slot_bytes) < slot_bytes:
            return False
        spare = self._spare_extents(slot_bytes)
        if spare is None:
            return False
        for extent in spare[1:]:
            self._remove(extent)
            extent.unmap()
        room = self._room(slot_bytes) + (spare[0].nbytes if spare else 0)
        slots = min(max(1, round(self._extent_bytes / slot_bytes)), room // slot_bytes)
        cut = self._recut_extent(spare[0], slot_bytes, slots) if spare else self._map_extent(slot_bytes, slots)
        if cut is None:
            return False
        self._enter(cut)
        self._release_claim(slot_bytes)
        return True

    def _spare_extents(self, slot_bytes: int) -> list[Extent[View]] | None:
        """Empty extents that make room for a slot, together with what is not reserved yet; None when they do not.

        One is taken even where memory could be mapped, for its pages are there.
        """
        room = self._room(slot_bytes)
        spare: list[Extent[View]] = []
        held_back = [extent for extent in self._claimed.get(slot_bytes, {}).values() if extent.is_empty]
        for extent in held_back + self._empties():
            spare.append(extent)
            room += extent.nbytes
            if room >= slot_bytes:
                return spare
        return spare if room >= slot_bytes else None

    def _room(self, slot_bytes: int) -> int:
        """Bytes that may be mapped for this size: what is not reserved, nor promised to others."""
        promised = sum(nbytes for size, nbytes in self._promised.items() if size != slot_bytes) if self._promised else 0
        return self._capacity_bytes - self._reserved_bytes - promised

    def _recut_extent(self, extent: Extent[View], slot_bytes: int, slots: int) -> Extent[View] | None:
        self._remove(extent)
        self._recut += extent.slots > 0
        extent.cut(self._new_number(), slot_bytes, slots)
        if not extent.slots:
            extent.unmap()
            return self._map_extent(slot_bytes, slots)
        return extent

    def _map_extent(self, slot_bytes: int, slots: int) -> Extent[View] | None:
        number = self._new_number()
        try:
            extent = Extent(number, self._source(slots * slot_bytes))
        except OSError:  # the system has no memory to give: as good as no room
            return None
        extent.cut(number, slot_bytes, slots)
        self._mapped += 1
        return extent

    def _publish(self, extent: Extent[View] | None, nbytes: int) -> None:
        """Hand an extent that was prefaulted to everybody; or give its reservation back, if it came to nothing."""
        with self._lock:
            self._prefaulting_bytes -= nbytes
            fits = self._reserved_bytes <= self._capacity_bytes
            self._reserved_bytes -= nbytes
            if extent is not None and fits:
                self._enter(extent)
                return
        if extent is not None:
            extent.unmap()

    def _enter(self, extent: Extent[View]) -> None:
        """File an empty extent, on top of its size's stack."""
        self._reserved_bytes += extent.nbytes
        self._sizes.setdefault(extent.slot_bytes, {})[extent.number] = extent
        self._empty[extent.number] = extent
        if extent.slots:
            self._stacks.setdefault(extent.slot_bytes, []).append(extent)

    def _remove(self, extent: Extent[View]) -> None:
        """Take an extent out of all lists: it is no longer reserved, though still mapped."""
        self._reserved_bytes -= extent.nbytes
        self._empty.pop(extent.number, None)
        self._unstack(extent)
        if extent.claim is not None:
            self._unclaim(extent, extent.claim)
        filed = self._sizes[extent.slot_bytes]
        del filed[extent.number]
        if not filed:
            del self._sizes[extent.slot_bytes]
            self._stacks.pop(extent.slot_bytes, None)

    def _settle(self, extent: Extent[View]) -> None:
        """Put an extent where it belongs, after a slot was freed that left it with one free slot, or with all."""
        if extent.claim is not None:
            if extent.claim == _RETIRED and extent.is_empty:
                self._remove(extent)
                extent.unmap()
            return
        stack = self._stacks[extent.slot_bytes]
        if len(extent.free) < extent.slots:
            stack.append(extent)
        else:
            self._empty[extent.number] = extent
            if not stack or stack[0] is not extent:
                self._unstack(extent)
                stack.insert(0, extent)
        if self._claimed:
            self._release_claim(extent.slot_bytes)

    def _unstack(self, extent: Extent[View]) -> None:
        stack = self._stacks.get(extent.slot_bytes, [])
        if extent in stack:
            stack.remove(extent)

    def _claim_room(self, slot_bytes: int, skip: Collection[int], *, may_evict: bool) -> list[int] | None:
        self._release_claim(slot_bytes)
        empties = self._empties()
        unreserved = self._room(slot_bytes)
        room = unreserved + sum(extent.nbytes for extent in empties)
        if room >= slot_bytes or self._stacks.get(slot_bytes):
            return []
        self._promised[slot_bytes] = max(0, unreserved)  # counted on, as are the empty ones: nothing may move there
        for extent in empties:
            self._claim(extent, slot_bytes)
        chosen: list[Extent[View]] = []
        while room < slot_bytes:
            cheapest = self._cheapest_extent(slot_bytes, skip, may_evict=may_evict)
            if cheapest is None:
                self._release_claim(slot_bytes)
                return None
            self._claim(cheapest, slot_bytes)
            chosen.append(cheapest)
            room += cheapest.nbytes
        return [slot for extent in chosen for slot in extent.slots_in_use()]

    def _cheapest_extent(self, slot_bytes: int, skip: Collection[int], *, may_evict: bool) -> Extent[View] | None:
        """The extent of another size that costs the fewest bytes to evict, then the fewest to move."""
        costs = [
            cost
            for size in self._stacks
            if size != slot_bytes
            for cost in self._costs(size, self._sizes[size].values() if may_evict else self._stacks[size])
            if cost[2] not in skip and (may_evict or cost[0] == 0)
        ]
        return min(costs)[-1] if costs else None

    def _costs(self, size: int, extents: Iterable[Extent[View]]) -> Iterator[tuple[int, int, int, Extent[View]]]:
        """What it takes to empty each of these: bytes to evict, bytes to move, its number, itself."""
        free_slots = sum(len(extent.free) for extent in self._stacks[size])
        for claimed in self._claimed.values():  # what moves out of these takes free slots
            free_slots -= sum(extent.used_slots for extent in claimed.values() if extent.slot_bytes == size)
        for extent in extents:
            if extent.claim is None and not extent.is_empty:
                homeless = max(0, extent.slots - free_slots)  # its slots in use, less the free ones elsewhere
                yield homeless * size, extent.used_bytes, extent.number, extent

    def _retire_excess(self) -> list[Extent[View]]:
        retired: list[Extent[View]] = []
        excess = self._excess_bytes()
        for extent in sorted(self._extents(), key=lambda extent: extent.used_bytes):
            if excess <= 0:
                break
            self._claim(extent, _RETIRED)
            retired.append(extent)
            excess -= extent.nbytes
        return retired

    def _excess_bytes(self) -> int:
        """Bytes held above the capacity. What is being prefaulted is not kept if that does not fit."""
        return self._reserved_bytes - self._prefaulting_bytes - self._capacity_bytes

    def _claim(self, extent: Extent[View], claimant: int) -> None:
        self._unstack(extent)
        extent.claim = claimant
        self._claimed.setdefault(claimant, {})[extent.number] = extent
        self._empty.pop(extent.number, None)

    def _unclaim(self, extent: Extent[View], claimant: int) -> None:
        extent.claim = None
        claimed = self._claimed[claimant]
        del claimed[extent.number]
        if not claimed:
            del self._claimed[claimant]

    def _release_claim(self, claimant: int) -> None:
        """Let the extents be allocated from again that were held back for `claimant`; they go to the bottom."""
        self._promised.pop(claimant, None)
        for extent in list(self._claimed.get(claimant, {}).values()):
            self._unclaim(extent, claimant)
            if extent.free:
                self._stacks[extent.slot_bytes].insert(0, extent)
            if extent.is_empty:
                self._empty[extent.number] = extent

    def _empties(self) -> list[Extent[View]]:
        """The extents that are wholly free and unclaimed, the last emptied first. Forgets the others."""
        self._empty = {number: extent for number, extent in self._empty.items() if extent.is_empty}
        return list(reversed(self._empty.values()))

    def _extents(self) -> list[Extent[View]]:
        """Every extent, those that are not cut yet too."""
        return [extent for extents in self._sizes.values() for extent in extents.values()]

    def _used_bytes(self) -> int:
        return sum(extent.used_bytes for extent in self._extents())

    def _new_number(self) -> int:
        number = self._next_number
        self._next_number += 1
        return number

    def _reject(self, slot: int) -> None:
        if not self._closed:
            raise _not_in_use(slot)


class Slab(SlabOf[Bytes]):
    """Slots of host memory. `huge_pages` asks for 2 MiB pages where the kernel allows that; see `HostSource`."""

    def __init__(
        self,
        capacity_bytes: int,
        *,
        extent_bytes: int | None = None,
        huge_pages: bool = False,
        page_lock: PageLock | None = None,
    ) -> None:
        source = HostSource(huge_pages=huge_pages, page_lock=page_lock)
        super().__init__(capacity_bytes, source, extent_bytes=extent_bytes)
        self.huge_pages = source.huge_pages


def _checked_capacity(capacity_bytes: int) -> int:
    if capacity_bytes < 0:
        raise InputError(f"capacity_bytes is {capacity_bytes}; it must be 0 or more")
    return capacity_bytes


def _extent_bytes(asked: int | None, capacity_bytes: int) -> int:
    nbytes = min(MAX_EXTENT_BYTES, capacity_bytes // EXTENTS_PER_CAPACITY) if asked is None else asked
    return max(PAGE_BYTES, nbytes // PAGE_BYTES * PAGE_BYTES)


def _not_in_use(slot: int) -> ValueError:
    return ValueError(f"slot {slot >> SLOT_BITS}:{slot & INDEX_MASK} is not in use: never handed out, or freed before")


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise AssertionError(f"slab: {rule}")

"""The gpu tier as the engine uses it: it may be absent, or fall out, and none of that reaches a caller.

A device that fails takes all that lay there with it. So after a fault the tier is given up as a whole, its copies are
forgotten by the index, and another one is opened when the device works again. Places here are the tier's own, marked
with the generation of the tier that gave them: what is left of an earlier one is never taken for one of the present.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kvpool.blocks.transfer import DevicePayload
from kvpool.config.runtime import GpuConfig
from kvpool.resilience import CircuitBreaker
from kvpool.tiers.extents import SLOT_BITS, Bytes, PageLock
from kvpool.tiers.slab import EXTENTS_PER_CAPACITY, MAX_EXTENT_BYTES
from kvpool.tiers.tier import TierUnavailableError

if TYPE_CHECKING:
    from kvpool.tiers.gpu.tier import GpuTier
    from kvpool.tiers.gpu.transfer import Transfer

BUDGET_S = 10.0
"""How long a copy may make no progress before the device counts as failed."""
SETTLE_S = 1.0
"""How long copies that were under way when the device failed are waited for."""
_GENERATION_BIT = 55
_GENERATIONS = 1 << 7
_PLACE_MASK = (1 << _GENERATION_BIT) - 1
_log = logging.getLogger(__name__)


class GpuOutError(Exception):
    """The device cannot be used now. `settled`: no copy that was begun touches any memory any more."""

    def __init__(self, reason: str, *, settled: bool = True) -> None:
        super().__init__(reason)
        self.settled = settled


class GpuOpener(Protocol):
    """How a pool gets at a device."""

    def open_tier(self, config: GpuConfig) -> GpuTier:
        """A tier. Raises `TierUnavailableError` where there is no device that works."""
        ...

    def page_lock(self, max_bytes: int) -> PageLock:
        """What locks the pages of host memory for the device. Raises `TierUnavailableError`."""
        ...


class TorchDevice:
    """A device of torch: "cuda", "cuda:1", or "cpu", which is host memory through the same interface."""

    def __init__(self, name: str = "cuda") -> None:
        self._name = name

    def open_tier(self, config: GpuConfig) -> GpuTier:
        """Implements `GpuOpener`; torch is imported here, and not before."""
        from kvpool.tiers.gpu import open_gpu_tier

        return open_gpu_tier(
            config.capacity_bytes,
            initial_bytes=config.initial_bytes,
            streams=config.streams,
            pinned_memory=config.pinned_memory,
            device=self._name,
        )

    def page_lock(self, max_bytes: int) -> PageLock:
        """Implements `GpuOpener`."""
        from kvpool.tiers.gpu import page_lock_for

        return page_lock_for(self._name, max_bytes)


class GpuStore:
    """Guards one `GpuTier`. Safe from any thread. All but `drop` and `close` may raise `GpuOutError`."""

    def __init__(
        self, opener: GpuOpener, config: GpuConfig, *, breaker: CircuitBreaker, budget_s: float = BUDGET_S
    ) -> None:
        self.tier: GpuTier | None = None
        self.breaker = breaker
        self.config = config
        self.last_error = ""
        self.decoded: set[int] = set()
        """Places that hold what was decoded from a lossy codec: never encoded again, and not copied down."""
        self.wake: Callable[[], None] = _nobody
        """Has what is left of a failed tier cleared away."""
        self._opener = opener
        self._budget_s = budget_s
        self._lock = threading.Lock()
        self._generation = 0
        self._fallen: list[GpuTier] = []
        self._closed = False

    @property
    def generation(self) -> int:
        """Marks the places of the present tier."""
        return self._generation

    @property
    def used_bytes(self) -> int:
        """Device memory in slots that are in use; 0 without a tier."""
        tier = self.tier
        return 0 if tier is None else tier.used_bytes

    @property
    def usable_bytes(self) -> int:
        """The capacity, or less after the engine ran out of memory; 0 without a tier."""
        tier = self.tier
        return 0 if tier is None else tier.usable_bytes

    def open(self) -> bool:
        """Open the tier, if there is none; whether there is one now."""
        if self.tier is not None:
            return True
        try:
            tier = self._opener.open_tier(self.config)
        except TierUnavailableError as error:
            if error.reason != self.last_error:
                _log.warning("gpu tier: %s; not used until it can be opened", error.reason)
            self.last_error = error.reason
            self.breaker.trip(error.reason)
            return False
        with self._lock:
            if self._closed:
                tier.close()
                return False
            self.tier = tier
        self.breaker.succeeded()
        return True

    def is_lost(self, region: int) -> bool:
        """Whether a region is of a tier that fell out."""
        return self.tier is None or region >> (_GENERATION_BIT - SLOT_BITS) != self._generation

    def allocate(self, record_bytes: int, count: int, owner: Hashable) -> list[int]:
        """Up to `count` places, as many as there are now. They show nothing but `owner`'s own bytes, or zeros."""
        with self._used() as (tier, mark):
            return [place | mark for place in tier.allocate_many(record_bytes, count, owner)]

    def payload(self, place: int, nbytes: int) -> DevicePayload:
        """The first bytes of what lies at a place, on the device."""
        tier = self.tier  # before the generation, which changes after it
        if tier is None or place >> _GENERATION_BIT != self._generation:
            raise GpuOutError("it fell out")
        try:
            return tier.payload(place & _PLACE_MASK)[:nbytes]
        except ValueError:
            raise GpuOutError("it was closed meanwhile") from None

    def download(self, places: Sequence[int], into: Sequence[Bytes]) -> None:
        """Copy the beginning of each payload into host memory, and wait for it."""
        with self._used(*places) as (tier, _):
            self._finish(tier, tier.download([place & _PLACE_MASK for place in places], into))

    def upload(self, places: Sequence[int], payloads: Sequence[Bytes]) -> None:
        """Copy payloads from host memory into places that were allocated just now, and wait for it."""
        with self._used(*places) as (tier, _):
            self._finish(tier, tier.upload([place & _PLACE_MASK for place in places], payloads))

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """What the calling thread queues within comes after all that the engine queued, and before all it queues then.

        So whoever finds a block in the index may read it, on whatever stream, and a place is not written again before
        it has been read.
        """
        with self._used() as (tier, _):
            tier.follow_engine()
        try:
            yield
        finally:
            try:
                tier.precede_engine()
            except TierUnavailableError as error:
                self._fall_out(tier, error.reason)

    def drop(self, places: Sequence[int]) -> None:
        """Give places back; those of a tier that fell out went with it."""
        with self._lock:
            tier, mark = self.tier, self._mark()
        ours = [place & _PLACE_MASK for place in places if place & ~_PLACE_MASK == mark]
        if self.decoded:
            self.decoded.difference_update(places)
        if tier is not None and ours:
            tier.drop(ours)

    def slot_bytes(self, place: int) -> int:
        """The length of the record at a place; 0 where none is in use."""
        tier = self.tier
        return 0 if tier is None or place & ~_PLACE_MASK != self._mark() else tier.bytes_of(place & _PLACE_MASK)

    def movable_places(self, record_bytes: int, skip: set[int]) -> list[int] | None:
        """As `SlabOf.movable_extent`; `skip` are regions."""
        with self._used() as (tier, mark):
            plain = {region & (_PLACE_MASK >> SLOT_BITS) for region in skip}
            places = tier.slab.movable_extent(record_bytes, skip=plain)
            return None if places is None else [place | mark for place in places]

    def cancel_claim(self, record_bytes: int) -> None:
        """As `SlabOf.cancel_claim`."""
        with self._used() as (tier, _):
            tier.slab.cancel_claim(record_bytes)

    def give_back(self, nbytes: int) -> list[int]:
        """Hold so many bytes of device memory less; the places that have to go for that."""
        with self._used() as (tier, mark):
            return [place | mark for place in tier.give_back(nbytes)]

    def reserved_bytes(self) -> int:
        """Device memory held, in use or not; 0 without a tier."""
        tier = self.tier
        return 0 if tier is None else tier.slab.reserved_bytes

    def advance(self) -> None:
        """Move on copies that nobody waits for, and close what fell out."""
        while self._fallen:
            self._fallen.pop().close()
        if self.tier is not None:
            with self._used() as (tier, _):
                tier.advance()

    def close(self) -> None:
        """Give all device memory back."""
        with self._lock:
            self._closed = True
            tier, self.tier = self.tier, None
        for each in [*self._fallen, *([tier] if tier is not None else [])]:
            each.close()
        self._fallen.clear()

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _used(self, *places: int) -> Iterator[tuple[GpuTier, int]]:
        """The tier and its mark; a fault within makes it fall out."""
        with self._lock:
            tier, mark = self.tier, self._mark()
        if tier is None or any(place & ~_PLACE_MASK != mark for place in places):
            raise GpuOutError("it fell out" if tier is not None else "it is not open")
        try:
            yield tier, mark
        except TierUnavailableError as error:
            self._fall_out(tier, error.reason)
            raise GpuOutError(error.reason) from error

    def _finish(self, tier: GpuTier, transfer: Transfer) -> None:
        """Wait for as long as it moves."""
        landed = -1
        try:
            while transfer.landed > landed:
                landed = transfer.landed
                if transfer.wait(self._budget_s):
                    return
        except TierUnavailableError as error:
            self._fall_out(tier, error.reason)
            raise GpuOutError(error.reason, settled=_settled(transfer)) from error
        transfer.cancel()
        reason = f"the device did nothing for {self._budget_s:g} s"
        self._fall_out(tier, reason)
        raise GpuOutError(reason, settled=False)

    def _mark(self) -> int:
        return self._generation << _GENERATION_BIT

    def _fall_out(self, tier: GpuTier, reason: str) -> None:
        with self._lock:
            if self.tier is not tier:
                return
            self.tier = None
            self._generation = (self._generation + 1) % _GENERATIONS
            self._fallen.append(tier)
            self.decoded.clear()
        self.last_error = reason
        self.breaker.trip(reason)
        _log.warning("gpu tier: %s; what lay there is lost, and it is not used until it can be opened again", reason)
        self.wake()


def extent_bytes_of(config: GpuConfig) -> int:
    """About how long the tier's extents are, also where it cannot be opened."""
    return max(1, min(MAX_EXTENT_BYTES, config.capacity_bytes // EXTENTS_PER_CAPACITY))


def _settled(transfer: Transfer) -> bool:
    """Whether none of a failed transfer's copies is under way any more, now or after a while."""
    try:
        return transfer.done or transfer.wait(SETTLE_S)
    except TierUnavailableError:
        return transfer.done


def _nobody() -> None:
    """Nobody is there to be woken yet."""

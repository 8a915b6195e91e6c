"""What only a pool with a gpu tier has: made by `assembly`, and looked after by a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvpool.pool.copies import Copies
from kvpool.pool.gpu_demotion import Demoter
from kvpool.pool.gpu_memory import GpuMemory
from kvpool.pool.gpu_promotion import Promoter
from kvpool.pool.gpu_store import GpuOutError, GpuStore
from kvpool.prefix.demoting import forget_regions
from kvpool.prefix.index import PrefixIndex

_log = logging.getLogger(__name__)


class Gpu:
    """The gpu tier's parts, and the chores that keep it."""

    def __init__(
        self,
        index: PrefixIndex,
        copies: Copies,
        *,
        store: GpuStore,
        memory: GpuMemory,
        demoter: Demoter,
        promoter: Promoter,
    ) -> None:
        self.store = store
        self.memory = memory
        self.demoter = demoter
        self.promoter = promoter
        self.capacity_changed: Callable[[], None] | None = None
        """Told when more or less memory is to be had than before."""
        self._index = index
        self._copies = copies
        self._usable_bytes = 0

    def chores(self) -> list[Callable[[], None]]:
        """In the order in which they run."""
        return [
            self.forget_lost,
            self.reopen,
            self.note_capacity,
            self.advance,
            self.memory.vacate_leaving,
            self.demoter.run,
            self.promoter.run,
        ]

    def forget_lost(self) -> None:
        """Take what a tier that fell out has taken with it out of the index; also what was entered since then."""
        while gone := forget_regions(self._index, self.store.is_lost):
            self._copies.release(gone)

    def reopen(self) -> None:
        """Open the tier if it could not be opened, or fell out."""
        if self.store.tier is None and self.store.breaker.allows() and self.store.open():
            _log.info("gpu tier: in use again")

    def note_capacity(self) -> None:
        """Tell of memory that came, or went: the engine was out of it, and has it no more."""
        usable = self.store.usable_bytes
        if usable != self._usable_bytes:
            self._usable_bytes = usable
            if self.capacity_changed is not None:
                self.capacity_changed()

    def advance(self) -> None:
        """Let copies end that nobody waits for."""
        try:
            self.store.advance()
        except GpuOutError:
            return

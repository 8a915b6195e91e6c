"""The housekeeper's chores: each looks whether there is something to do, and does it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Head
from kvpool.errors import KvpoolError
from kvpool.pool.copies import shrink_index
from kvpool.pool.engine import Engine
from kvpool.pool.reading import UNREADABLE, ReadJob
from kvpool.pool.restoring import restore_from
from kvpool.prefix.heads import edge_heads
from kvpool.prefix.node import NOWHERE, SSD, Node
from kvpool.resilience import BreakerState
from kvpool.tiers.ssd.place import bytes_of

_log = logging.getLogger(__name__)


class Chores:
    """All chores of one engine. `payload_bytes` of a node's model may be unknown: then it is not probed with."""

    def __init__(self, engine: Engine, payload_bytes_of: Callable[[Fingerprint], int | None]) -> None:
        self._engine = engine
        self._payload_bytes_of = payload_bytes_of
        self.leaving: list[int] = []
        """RAM slots that have to go, since the capacity was lowered."""

    def all(self) -> list[Callable[[], None]]:
        """Every chore, in the order in which they run."""
        return [self.bury, self.reopen_ssd, self.probe_ssd, self.free_segments, self.shrink_ram, self.shrink_index]

    def bury(self) -> None:
        """Give back what is left of erased trees."""
        while gone := self._engine.index.bury():
            self._engine.copies.release(gone)

    def reopen_ssd(self) -> None:
        """Open the ssd tier if it could not be opened before."""
        store = self._engine.store
        if not store.configured or store.tier is not None or not store.writes.allows():
            return
        try:
            tier = store.reopen()
        except KvpoolError as error:
            store.last_error = str(error)
            store.writes.trip(str(error))
            return
        if tier is not None:
            restore_from(self._engine, tier)
            _log.info("ssd tier: in use again")

    def probe_ssd(self) -> None:
        """Let a tier that was out show that it is back: a write by the next block, a read by a record of its own."""
        store = self._engine.store
        if store.tier is None:
            return
        if store.writes.state is BreakerState.OPEN:
            store.writes.allows()
        if store.reads.state is BreakerState.OPEN and store.reads.allows():
            self._probe_reads()

    def free_segments(self) -> None:
        """Make room on SSD ahead of the writers, and keep to a capacity that was lowered."""
        self._engine.reclaimer.make_room()
        self._engine.reclaimer.shrink()

    def shrink_ram(self) -> None:
        """Move or evict what lies in memory that is to be given back."""
        leaving = self.leaving
        if leaving and self._engine.memory.vacate(leaving) and self.leaving is leaving:
            self.leaving = []

    def shrink_index(self) -> None:
        """Keep the index within its limit: that was lowered, or loads have filled it."""
        shrink_index(self._engine.index, self._engine.copies)

    def _probe_reads(self) -> None:
        engine = self._engine
        budget_s = engine.settings.ssd_budget_s
        if engine.readers.pending:  # still stuck in the reads that made it open
            engine.store.stalled(budget_s)
            return
        probe = self._probe_job()
        if probe is None:
            engine.store.reads.succeeded()  # nothing lies there: nothing can be learnt, and nothing goes wrong
            return
        engine.readers.submit(probe)
        if not engine.readers.wait(probe, budget_s):
            engine.store.stalled(budget_s)
        elif UNREADABLE not in probe.faults:
            _log.info("ssd tier: reads are served again")
        if probe.abandon():
            engine.memory.free(probe.slots)

    def _probe_job(self) -> ReadJob | None:
        engine = self._engine
        with engine.index.lock:
            node = next((node for nodes in engine.index.residents[SSD].values() for node in nodes), None)
            if node is None:
                return None
            place, head = self._a_record(node)
        slots = engine.memory.allocate(bytes_of(place), 1)
        return ReadJob([place], slots, [head]) if slots else None

    def _a_record(self, node: Node) -> tuple[int, Head]:
        """One of the node's records on SSD; its place."""
        places = node.places[SSD] or ()
        at = next(at for at, place in enumerate(places) if place != NOWHERE)
        known = self._payload_bytes_of(node.tree.id.fingerprint)
        payload_bytes = node.tree.record_bytes - PAGE_BYTES if known is None else known
        return places[at], edge_heads(node, at, at + 1, payload_bytes=payload_bytes)[0]

"""The housekeeper's chores: each looks whether there is something to do, and does it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import Head
from kvpool.errors import KvpoolError
from kvpool.pool.copies import shrink_index
from kvpool.pool.engine import Engine
from kvpool.pool.model import Model
from kvpool.pool.reading import TIER_OUT, ReadJob
from kvpool.pool.remote.parts import Remote
from kvpool.pool.restoring import use_tier
from kvpool.prefix.accounts import Account
from kvpool.prefix.heads import edge_heads
from kvpool.prefix.node import GPU, LEVELS, NOWHERE, SSD, Node
from kvpool.resilience import BreakerState
from kvpool.tiers.ssd.place import bytes_of
from kvpool.tiers.ssd.scratch import aligned
from kvpool.tiers.tier import TierName, TierUnavailableError

_log = logging.getLogger(__name__)


class Chores:
    """All chores of one engine."""

    def __init__(
        self,
        engine: Engine,
        forget_trees: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._forget_trees = forget_trees
        """Has every model look its tenants' trees up anew: epochs may have been raised."""
        self.leaving: list[int] = []
        """RAM slots that have to go, since the capacity was lowered."""

    def in_memory(self) -> list[Callable[[], None]]:
        """Those that never wait for a disk, in the order in which they run."""
        return [self.bury, self.check_ssd, self.keep_quotas, self.shrink_ram, self.shrink_index, self.learn]

    def on_disk(self) -> list[Callable[[], None]]:
        """Those that may be held up by one."""
        return [self.reopen_ssd, self.free_segments]

    def in_shared(self, remote: Remote, models: Callable[[], list[Model]]) -> list[Callable[[], None]]:
        """Those that wait for shared tiers, each no longer than its budget."""
        catalog = self._engine.catalog
        reports = [] if catalog is None else [lambda: catalog.report_usage(models())]
        return [
            *remote.chores(), self.follow_epochs, self.note_hints, self.follow_hints, remote.eraser.step, *reports
        ]  # fmt: skip

    def follow_epochs(self) -> None:
        """Hear what was erased elsewhere, and say that this node lives."""
        sync = self._engine.epoch_sync
        remote = self._engine.remote
        database = None if remote is None else remote.store(TierName.DATABASE)
        if database is None or not database.usable:
            return
        try:
            sync.step()
        except TierUnavailableError as error:
            database.refused_a_change(error.reason)

    def note_hints(self) -> None:
        """Leave word in dragonfly of what was erased here while that was out."""
        sync, remote = self._engine.epoch_sync, self._engine.remote
        dragonfly = None if remote is None else remote.store(TierName.DRAGONFLY)
        if dragonfly is not None:
            dragonfly.change(lambda tier: sync.note_hints())

    def follow_hints(self) -> None:
        """Without a catalog, hear from dragonfly what was erased elsewhere of that which is here."""
        index, sync, remote = self._engine.index, self._engine.epoch_sync, self._engine.remote
        dragonfly = None if remote is None else remote.store(TierName.DRAGONFLY)
        if dragonfly is None or sync.authority is not None:
            return
        with index.lock:
            tenants = {tree.tenant for tree in index.trees}
        dragonfly.attempt(lambda tier: sync.follow_hints(tenants))

    def bury(self) -> None:
        """Give back what is left of erased trees."""
        index = self._engine.index
        with self._engine.burying:
            while gone := index.bury():
                self._engine.copies.release(gone)
        index.close_accounts(self._engine.is_known_name)

    def learn(self) -> None:
        """For the models whose requests all hit: where something is stored, that is when it is learned."""
        index = self._engine.index
        with index.lock:
            accounts = list(index.ledger.accounts.values())
        for account in accounts:
            index.learn(account)

    def reopen_ssd(self) -> None:
        """Open the ssd tier if it could not be opened before."""
        store = self._engine.store
        if not store.configured or store.tier is not None:
            return
        if not self._engine.epoch_sync.trusted:
            store.last_error = "not used before the catalog has said which tenants were erased"
            return
        if not store.writes.allows():
            return
        try:
            tier = store.open()
        except KvpoolError as error:
            store.last_error = str(error)
            store.writes.trip(str(error))
            return
        if tier is not None and use_tier(self._engine, tier):
            self._forget_trees()
            _log.info("ssd tier: in use again")

    def check_ssd(self) -> None:
        """Notice a tier that has stalled, and let one that was out show that it is back.

        Writes are tried again with the next block, reads with a record of its own.
        """
        store = self._engine.store
        if store.tier is None:
            return
        store.check_writes()
        if store.writes.state is BreakerState.OPEN:
            store.writes.allows()
        if not store.readable and store.reads.allows():
            self._probe_reads()

    def free_segments(self) -> None:
        """Make room on SSD ahead of the writers, and keep to a capacity that was lowered."""
        self._engine.reclaimer.make_room()
        self._engine.reclaimer.shrink()

    def keep_quotas(self) -> None:
        """Take from models what they hold above a limit that was lowered; what is leased goes when its leases end."""
        index, gpu = self._engine.index, self._engine.gpu
        for level in LEVELS:
            for account, excess in index.ledger.over_limit(level):
                while level == GPU and gpu is not None and excess > 0 and gpu.demoter.bring_down(excess, own=account):
                    excess = -account.room(level)
                while excess > 0 and self._engine.copies.evict_own(index, account, level, excess):
                    excess = -account.room(level)

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
        record = self._some_record()
        if record is None:
            engine.store.reads.succeeded()  # nothing lies there: nothing can be learnt, and nothing goes wrong
            return
        place, head, account = record
        if engine.readers.pending:  # still stuck in the reads that opened the breaker: later
            engine.store.stalled(budget_s)
            return
        probe = ReadJob([place], [aligned(bytes_of(place))], [head], slots=[], account=account)
        engine.readers.submit(probe)
        if not engine.readers.wait(probe, budget_s):
            engine.store.stalled(budget_s)
        elif TIER_OUT not in probe.faults:
            _log.info("ssd tier: reads are served again")
        else:
            engine.store.reads.trip(engine.store.last_error)
        probe.abandon()

    def _some_record(self) -> tuple[int, Head, Account] | None:
        with self._engine.index.lock:
            nodes = self._engine.index.residents[SSD].values()
            node = next((node for nodes in nodes for node in nodes), None)
            return None if node is None else self._a_record(node)

    def _a_record(self, node: Node) -> tuple[int, Head, Account]:
        """One of the node's records on SSD: its place, what it is to say of itself, and whose it is."""
        places = node.places[SSD] or ()
        at = next(at for at, place in enumerate(places) if place != NOWHERE)
        identity = self._engine.identity_of(node.tree.id.fingerprint)
        payload_bytes = node.tree.record_bytes - PAGE_BYTES if identity is None else identity.layout.payload_bytes
        return places[at], edge_heads(node, at, at + 1, payload_bytes=payload_bytes)[0], node.tree.account

"""The catalog as the engine uses it: told what happens here, asked what happened elsewhere.

What it is told goes through a queue, a journal and a thread of the writer's own; none of it reaches a caller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from kvpool.blocks.identity import ALL_TENANTS, ModelIdentity, TenantDigest
from kvpool.catalog.authority import Authority
from kvpool.catalog.catalog import Catalog
from kvpool.catalog.connections import Connections
from kvpool.catalog.journal import Journal
from kvpool.catalog.migrations import Schema
from kvpool.catalog.rows import (
    PricesSet,
    SharedPrefixRow,
    SharedReport,
    TenantErased,
    TiersCleared,
    UsageReport,
    model_seen,
)
from kvpool.catalog.trimming import CatalogLimits
from kvpool.catalog.writer import CatalogWriter, WriterStats
from kvpool.config import DatabaseConfig, PricesConfig
from kvpool.config.service import ServiceAddress
from kvpool.pool.remote.reporter import Reporter
from kvpool.pool.remote.store import LIMITS
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.sharing import SharedPrefix, top_shared
from kvpool.resilience import CircuitBreaker
from kvpool.tiers.tier import TierName

if TYPE_CHECKING:
    from kvpool.pool.model import Model

JOURNAL_NAME = "journal"
USAGE_EVERY_S = 30.0
SHARED_PREFIXES = 50
CLOSE_S = 5.0
_log = logging.getLogger(__name__)


class PoolCatalog:
    """One for a pool with a database tier. `address` is asked for each new connection."""

    def __init__(
        self,
        config: DatabaseConfig,
        directory: Path,
        node: UUID,
        index: PrefixIndex,
        address: Callable[[], ServiceAddress],
        *,
        dragonfly_ttl_s: float | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.schema = Schema()
        self.connections = Connections(
            address, size=config.postgres.connections, budget_s=config.budget_s, tls=config.postgres.tls
        )
        self.reading = Catalog(self.connections, self.schema)
        self.authority = Authority(self.connections, self.schema)
        journal = Journal(directory / JOURNAL_NAME, max_bytes=config.journal_bytes)
        forgetting = {} if dragonfly_ttl_s is None else {TierName.DRAGONFLY: dragonfly_ttl_s}
        self._writer = CatalogWriter(
            self.connections,
            journal,
            node=node,
            schema=self.schema,
            breaker=CircuitBreaker(LIMITS),
            keep=CatalogLimits(ttl_s=forgetting),
        )
        self.reporter = Reporter(index, self._writer, clock=clock)
        self._index = index
        self._clock = clock
        self._usage_due_s = 0.0

    @property
    def stats(self) -> WriterStats:
        """How far the writer is."""
        return self._writer.stats()

    def start(self, prices: PricesConfig) -> None:
        """Begin to write. What this node had in memory when it was closed last is gone."""
        self._writer.start()
        now = self._clock()
        self._writer.offer(TiersCleared((TierName.GPU, TierName.RAM), "restarted", now))
        self.set_prices(prices)

    def set_prices(self, prices: PricesConfig) -> None:
        """What resources cost from now on."""
        self._writer.offer(PricesSet(prices.gpu_hour, prices.ram_gib_month, prices.ssd_gib_month, self._clock()))

    def model_is_used(self, identity: ModelIdentity) -> None:
        """A model was registered."""
        self._writer.offer(model_seen(identity, self._clock()))

    def tenant_was_erased(self, tenant: TenantDigest, epoch: int) -> None:
        """All rows of a tenant's earlier epochs are to go, after what this node has told of them."""
        self.reporter.drain()
        self._writer.offer(TenantErased(tenant, epoch))

    def report_usage(self, models: list[Model]) -> None:
        """Once in a while: what each model was asked for and served, and which prefixes are shared most."""
        now = self._clock()
        if now < self._usage_due_s:
            return
        self._usage_due_s = now + USAGE_EVERY_S
        told: set[str] = set()
        for model in models:
            self._writer.offer(self._usage_of(model, now, with_requests=model.name not in told))
            told.add(model.name)
        shared = top_shared(self._index, SHARED_PREFIXES)
        self._writer.offer(SharedReport(tuple(map(_shared_row, shared)), now))

    def flush(self, deadline_s: float) -> bool:
        """Wait until all that was reported by now is in the database; False at the deadline."""
        self.reporter.drain()
        return self._writer.flush(deadline_s)

    def close(self, models: list[Model], until_s: float) -> None:
        """Report what is left, and end; what cannot be written now stays in the journal. On `time.monotonic`."""
        self._usage_due_s = 0.0
        self.report_usage(models)
        self.reporter.close(until_s)
        self._writer.close(max(0.0, min(CLOSE_S, until_s - time.monotonic())))

    def _usage_of(self, model: Model, now: float, *, with_requests: bool) -> UsageReport:
        """Requests are counted by name: of several revisions, the first one's report has them."""
        account = self._index.ledger.accounts.get(model.name) if with_requests else None
        loaded = [model.loaded_blocks[tier] for tier in TierName]
        return UsageReport(
            model.identity.fingerprint,
            ALL_TENANTS,
            0 if account is None else account.asked_blocks,
            0 if account is None else account.matched_blocks,
            (loaded[0], loaded[1], loaded[2], loaded[3], loaded[4]),
            sum(loaded) * model.layout.block_tokens,
            model.saved_prefill_seconds,
            now,
        )


def _shared_row(prefix: SharedPrefix) -> SharedPrefixRow:
    return SharedPrefixRow(prefix.tree, prefix.key, prefix.depth, prefix.tokens, prefix.hits, max(prefix.bytes))

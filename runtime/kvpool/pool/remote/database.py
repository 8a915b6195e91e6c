"""Connects the database tier: PostgreSQL that runs elsewhere, or one that is started here, and what is kept there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from kvpool.blocks.identity import Fingerprint
from kvpool.catalog.connections import SCHEMES
from kvpool.catalog.payloads import PayloadTier
from kvpool.config import DatabaseConfig, RuntimeConfig
from kvpool.config.service import ServiceAddress, read_service
from kvpool.local import LocalServer, LocalServerError, local_postgres
from kvpool.pool.remote.catalog import PoolCatalog
from kvpool.pool.remote.epoch_sync import EpochSync
from kvpool.pool.remote.share import Limit
from kvpool.tiers.tier import TierName, TierUnavailableError, Usage

_log = logging.getLogger(__name__)


class DatabaseConnector:
    """A `Connector`, and the database itself for what else is kept there. As `DragonflyConnector` otherwise."""

    name = TierName.DATABASE

    def __init__(
        self,
        config: DatabaseConfig,
        services: Path,
        local: Path,
        epochs: EpochSync,
        *,
        make_catalog: Callable[[Callable[[], ServiceAddress]], PoolCatalog],
        record_bytes_of: Callable[[Fingerprint], int | None],
    ) -> None:
        self.catalog = make_catalog(self._address)
        epochs.authority = self.catalog.authority
        self._config = config
        self._services = services
        self._local = local
        self._epochs = epochs
        self._record_bytes_of = record_bytes_of
        self._server: LocalServer | None = None
        self._tier: PayloadTier | None = None
        self._is_trimmed = False
        self._limits: Mapping[Fingerprint, Limit] = {}

    @property
    def server(self) -> LocalServer | None:
        """As `RunsServer` says."""
        return self._server

    def start(self) -> None:
        """As `Connector` says."""
        if self._config.postgres.secret is not None:
            return
        try:
            if self._server is None:
                self._server = local_postgres(self._local, connections=self._config.postgres.connections)
            self._server.start()
        except LocalServerError as error:
            raise TierUnavailableError(self.name, str(error)) from error

    def connect(self) -> PayloadTier:
        """As `Connector` says; afterwards it is known which tenants were erased."""
        try:
            self._epochs.step()
        except OSError as error:
            raise TierUnavailableError(self.name, f"epochs cannot be kept: {error.strerror or error}") from error
        except TierUnavailableError:
            if not self._epochs.reached:
                raise  # else it may be a server that takes no changes: it can be read
        tier = PayloadTier(
            self.catalog.connections,
            self.catalog.schema,
            inline_max_bytes=self._config.inline_max_bytes,
            inline_bytes=self._config.inline_bytes,
        )
        tier.usage()
        self._tier = tier
        self.set_limits(self._limits)
        return tier

    def is_wanted(self, fingerprint: Fingerprint) -> bool:
        """Whether a model's records are small enough to be kept in the database."""
        record_bytes = self._record_bytes_of(fingerprint)
        return record_bytes is not None and record_bytes <= self._config.inline_max_bytes

    def set_limits(self, limits: Mapping[Fingerprint, Limit]) -> None:
        """As `Connector` says; kept by the database, for all processes together, for each revision by itself."""
        before, self._limits = self._limits, limits
        self._is_trimmed = self._is_trimmed and before == limits
        if self._tier is not None:
            for fingerprint in {*before, *limits}:
                limit = limits.get(fingerprint)
                self._tier.set_limit(fingerprint, None if limit is None else limit.nbytes)

    def shares(self) -> Mapping[str, Usage]:
        """As `Connector` says: what all processes have put there, all revisions of a model together."""
        known = {} if self._tier is None else self._tier.last_usage
        shares: dict[str, Usage] = {}
        for fingerprint, limit in self._limits.items():
            used = known[fingerprint].used_bytes if fingerprint in known else 0
            shares[limit.name] = Usage(used + shares.get(limit.name, Usage(0, 0)).used_bytes, limit.nbytes)
        return shares

    def tend(self) -> None:
        """As `Connector` says: brings about limits that were lowered."""
        if self._tier is not None and not self._is_trimmed:
            self._tier.trim()
            self._is_trimmed = True

    def reconfigure(self, config: RuntimeConfig) -> None:
        """As `Connector` says."""
        if config.database is not None:
            self._config = config.database
            self.catalog.connections.budget_s = config.database.budget_s

    def close(self) -> None:
        """As `Connector` says."""
        self.catalog.connections.close()
        if self._server is not None:
            try:
                self._server.stop()
            except LocalServerError as error:
                _log.warning("%s", error)

    def _address(self) -> ServiceAddress:
        folder = self._server.folder if self._server is not None else self._services / str(self._config.postgres.secret)
        return read_service(folder, schemes=SCHEMES)

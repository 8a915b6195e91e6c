"""Connects the dragonfly tier: to a server that runs elsewhere, or to one that is started here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvpool.blocks.identity import Fingerprint
from kvpool.config import DragonflyConfig, RuntimeConfig
from kvpool.config.service import ServiceAddress, read_service
from kvpool.local import LocalServer, LocalServerError, local_redis
from kvpool.pool.remote.epoch_sync import EpochSync
from kvpool.pool.remote.share import Limit, LimitedTier
from kvpool.tiers.dragonfly.opening import SCHEMES
from kvpool.tiers.dragonfly.tier import DragonflyTier
from kvpool.tiers.tier import TierName, TierUnavailableError, Usage


class DragonflyConnector:
    """A `Connector`. `services` has a folder for each server that runs elsewhere, `local` is where one here lives."""

    name = TierName.DRAGONFLY

    def __init__(self, config: DragonflyConfig, services: Path, local: Path, epochs: EpochSync) -> None:
        self._config = config
        self._services = services
        self._local = local
        self._epochs = epochs
        self._server: LocalServer | None = None
        self._tier: DragonflyTier | None = None
        self._limited: LimitedTier | None = None
        self._limits: Mapping[Fingerprint, Limit] = {}

    @property
    def server(self) -> LocalServer | None:
        """As `RunsServer` says."""
        return self._server

    def start(self) -> None:
        """As `Connector` says."""
        if self._config.secret is not None:
            return
        try:
            if self._server is None:
                assert self._config.memory_bytes is not None
                self._server = local_redis(self._local, memory_bytes=self._config.memory_bytes)
            self._server.start()
        except LocalServerError as error:
            raise TierUnavailableError(self.name, str(error)) from error

    def connect(self) -> LimitedTier:
        """As `Connector` says. Not before it is known what was erased meanwhile."""
        if not self._epochs.trusted:
            raise TierUnavailableError(self.name, "not used before the catalog has said which tenants were erased")
        config = self._config
        tier = DragonflyTier(
            self._address,
            ttl_s=config.ttl_s,
            connections=config.connections,
            batch_size=config.batch_size,
            budget_s=config.budget_s,
            tls=config.tls,
        )
        try:
            tier.usage()
        except BaseException:
            tier.close()
            raise
        self._tier = self._epochs.hints = tier
        self._limited = LimitedTier(tier, ttl_s=lambda: self._config.ttl_s)
        self._limited.set_limits(self._limits)
        return self._limited

    def is_wanted(self, fingerprint: Fingerprint) -> bool:
        """All blocks go there."""
        return True

    def set_limits(self, limits: Mapping[Fingerprint, Limit]) -> None:
        """As `Connector` says; kept by what this process writes."""
        self._limits = limits
        if self._limited is not None:
            self._limited.set_limits(limits)

    def shares(self) -> Mapping[str, Usage]:
        """As `Connector` says: what this process has put there."""
        limited = self._limited
        return {
            limit.name: Usage(0 if limited is None else limited.used_bytes(limit.name), limit.nbytes)
            for limit in self._limits.values()
        }

    def tend(self) -> None:
        """As `Connector` says: nothing, the server forgets by itself."""

    def reconfigure(self, config: RuntimeConfig) -> None:
        """As `Connector` says."""
        if config.dragonfly is None:
            return
        self._config = config.dragonfly
        if self._tier is not None:
            self._tier.ttl_s = self._config.ttl_s
            self._tier.batch_size = self._config.batch_size
            self._tier.budget_s = self._config.budget_s

    def close(self) -> None:
        """As `Connector` says."""
        self._epochs.hints = None
        if self._server is not None:
            self._server.stop()

    def _address(self) -> ServiceAddress:
        folder = self._server.folder if self._server is not None else self._services / str(self._config.secret)
        return read_service(folder, schemes=SCHEMES)

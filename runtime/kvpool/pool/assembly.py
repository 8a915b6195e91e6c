"""Puts an engine together from a configuration and an open directory. Called by `Pool.open` alone."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvpool.api import SharingScope
from kvpool.api.codec import Codec
from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import KVLayout
from kvpool.config import RuntimeConfig, SsdConfig
from kvpool.policy import LruPolicy
from kvpool.pool.calibration import NO_CLIPPING, Calibrations
from kvpool.pool.copies import Copies
from kvpool.pool.costs import TierCosts
from kvpool.pool.directory import PoolDirectory
from kvpool.pool.encodings import Encodings
from kvpool.pool.engine import Engine, Identities, LiveSettings, Tenants
from kvpool.pool.epochs import Epochs
from kvpool.pool.events import EventBus
from kvpool.pool.memory import Memory
from kvpool.pool.ram_encoder import RamEncoder
from kvpool.pool.reading import Readers
from kvpool.pool.reclaim import Reclaimer
from kvpool.pool.sealing import Sealer
from kvpool.pool.secret import load_or_create_secret
from kvpool.pool.ssd_store import SsdStore
from kvpool.pool.write_behind import WriteBehind
from kvpool.prefix.history import History
from kvpool.prefix.index import PrefixIndex, SharingRules
from kvpool.prefix.node import RAM, SSD
from kvpool.resilience import BreakerLimits, CircuitBreaker
from kvpool.tiers.ram import RamTier, region_of
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.place import bytes_of, segment_of
from kvpool.tiers.ssd.tier import SsdTier

READ_FAILURES, WRITE_FAILURES = 3, 1
_log = logging.getLogger(__name__)


def assemble(
    config: RuntimeConfig,
    directory: PoolDirectory,
    history: History,
    *,
    identity_of: Identities,
    is_unregistered: Callable[[Fingerprint], bool],
    wake: Callable[[], None],
    disk: Disk | None,
) -> Engine:
    """Make the parts and start their threads. The ssd tier is opened by the caller, with `store.reopen`."""
    secret = load_or_create_secret(directory.path)
    epochs = Epochs.load(directory.path, is_new=directory.is_new)
    ram = RamTier(config.ram.capacity_bytes, huge_pages=config.ram.huge_pages)
    ram.start_prefault()
    index = PrefixIndex(
        limit_bytes=config.ram.index_bytes,
        make_policy=LruPolicy,
        sharing=sharing_rules(config),
        history=history,
        region_of={RAM: region_of, SSD: segment_of},
        bytes_of={RAM: ram.bytes_of, SSD: bytes_of},
    )
    store = SsdStore(
        _ssd_opener(directory, disk),
        config.ssd,
        reads=CircuitBreaker(BreakerLimits(failures=READ_FAILURES)),
        writes=CircuitBreaker(BreakerLimits(failures=WRITE_FAILURES)),
        costs=TierCosts(),
    )
    events = EventBus()
    copies = Copies(ram, store)
    memory = Memory(ram, index, copies)
    reclaimer = Reclaimer(index, store, copies)
    encodings = make_encodings(config, directory, identity_of)

    def payload_bytes_of(fingerprint: Fingerprint) -> int | None:
        identity = identity_of(fingerprint)
        return None if identity is None else identity.layout.payload_bytes

    engine = Engine(
        index=index,
        ram=ram,
        store=store,
        copies=copies,
        memory=memory,
        readers=Readers(store, memory, encodings),
        reclaimer=reclaimer,
        writer=WriteBehind(
            index,
            memory,
            store,
            copies,
            reclaimer,
            events,
            Sealer(ram, index, encodings, compresses_shared=lambda: engine.settings.compress_shared),
            payload_bytes_of=payload_bytes_of,
        ),
        events=events,
        tenants=Tenants(secret, epochs, index, shared=config.sharing.scope is SharingScope.POOL),
        settings=live_settings(config),
        encodings=encodings,
        ram_encoder=RamEncoder(
            index,
            memory,
            encodings,
            on_eviction=config.compression.on_eviction,
            compresses_shared=lambda: engine.settings.compress_shared,
        ),
        identity_of=identity_of,
        is_unregistered=is_unregistered,
        wake=wake,
    )
    return engine


def make_encodings(config: RuntimeConfig, directory: PoolDirectory, identity_of: Identities) -> Encodings:
    """The codecs of the tiers."""
    compression = config.compression

    def layout_of(fingerprint: Fingerprint) -> KVLayout | None:
        identity = identity_of(fingerprint)
        return None if identity is None else identity.layout

    calibrations = None
    if compression.outlier_percentile < NO_CLIPPING:
        calibrations = Calibrations(
            directory.path, samples=compression.calibration_samples, percentile=compression.outlier_percentile
        )
    by_level = {RAM: config.ram.codec, SSD: config.ssd.codec if config.ssd else Codec.NONE}
    return Encodings(by_level, compression.granularity, layout_of=layout_of, calibrations=calibrations)


def live_settings(config: RuntimeConfig) -> LiveSettings:
    """What of the configuration is looked at while the pool runs."""
    ssd = config.ssd
    return LiveSettings(
        second_hit=ssd is not None and ssd.second_hit,
        ssd_budget_s=0.1 if ssd is None else ssd.budget_s,
        read_ahead=config.policy.read_ahead,
        compress_shared=config.sharing.compress_shared,
    )


def sharing_rules(config: RuntimeConfig) -> SharingRules:
    """The index's part of the sharing section."""
    sharing = config.sharing
    return SharingRules(
        auto_detect=sharing.enabled and sharing.auto_detect,
        protect=sharing.enabled and sharing.protect_shared,
        min_prefix_tokens=sharing.min_prefix_tokens,
        max_shared_bytes=sharing.max_shared_bytes,
    )


def notices(config: RuntimeConfig) -> tuple[str, ...]:
    """What the configuration asks for and this version does not have, a sentence each."""
    found = [
        f"tiers.{name} is not used: this version has the ram and ssd tiers"
        for name, tier in (("gpu", config.gpu), ("dragonfly", config.dragonfly), ("database", config.database))
        if tier is not None
    ]
    return tuple(found)


def _ssd_opener(directory: PoolDirectory, disk: Disk | None) -> Callable[[SsdConfig], SsdTier]:
    def open_tier(config: SsdConfig) -> SsdTier:
        return SsdTier.open(
            directory.ssd,
            capacity_bytes=config.capacity_bytes,
            daily_write_bytes=config.daily_write_bytes,
            disk=disk,
        )

    return open_tier

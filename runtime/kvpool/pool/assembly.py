"""Puts an engine together from a configuration and an open directory. Called by `Pool.open` alone."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kvpool.api import SharingScope
from kvpool.api.codec import Codec
from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import KVLayout
from kvpool.codecs import check_available
from kvpool.config import RuntimeConfig, SsdConfig
from kvpool.policy import POLICIES
from kvpool.pool.calibration import NO_CLIPPING, Calibrations
from kvpool.pool.copies import Copies
from kvpool.pool.costs import TierCosts
from kvpool.pool.directory import PoolDirectory
from kvpool.pool.encodings import DATABASE, DRAGONFLY, Encodings, Layouts
from kvpool.pool.engine import Engine, Identities, LiveSettings, Tenants
from kvpool.pool.epochs import Epochs
from kvpool.pool.events import EventBus
from kvpool.pool.gpu_demotion import Demoter, DemotionParts
from kvpool.pool.gpu_memory import GpuMemory
from kvpool.pool.gpu_parts import Gpu
from kvpool.pool.gpu_promotion import Promoter
from kvpool.pool.gpu_store import GpuOpener, GpuStore
from kvpool.pool.memory import Memory
from kvpool.pool.node_file import load_or_create_node
from kvpool.pool.ram_encoder import RamEncoder
from kvpool.pool.reading import Readers
from kvpool.pool.reclaim import Reclaimer
from kvpool.pool.remote.connecting import Connector
from kvpool.pool.remote.epoch_sync import EpochSync
from kvpool.pool.remote.lookup import LookupParts
from kvpool.pool.remote.opening import SharedTiers, shared_tiers
from kvpool.pool.remote.parts import Remote
from kvpool.pool.remote.sender import Sender
from kvpool.pool.remote.store import RemoteStore
from kvpool.pool.sealing import Sealer
from kvpool.pool.secret import load_or_create_secret
from kvpool.pool.ssd_store import SsdStore
from kvpool.pool.write_behind import WriteBehind
from kvpool.prefix.history import History
from kvpool.prefix.index import PrefixIndex, SharingRules
from kvpool.prefix.node import GPU, RAM, SSD
from kvpool.resilience import BreakerLimits, CircuitBreaker
from kvpool.tiers.extents import PageLock
from kvpool.tiers.ram import RamTier, region_of
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.place import bytes_of, segment_of
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierName, TierUnavailableError

READ_FAILURES, WRITE_FAILURES = 3, 1
LOOKUP_THREADS, SENDER_THREADS = 8, 2
DATABASE_ROUND_S = 7200.0
"""Where nothing has a TTL: blocks that are used are offered to the database as often as if it had this one."""
if TYPE_CHECKING:
    from kvpool.pool.prefetch import Prefetcher
    from kvpool.pool.remote.prompts import PromptMemory

_log = logging.getLogger(__name__)


def assemble(
    config: RuntimeConfig,
    directory: PoolDirectory,
    history: History,
    *,
    identity_of: Identities,
    is_unregistered: Callable[[Fingerprint], bool],
    is_known_name: Callable[[str], bool],
    wake: Callable[[], None],
    adopted: Callable[[], None],
    disk: Disk | None,
    gpu: GpuOpener,
    shared: Sequence[Connector] | None,
) -> Engine:
    """Make the parts and start their threads. The gpu and ssd tiers are opened by the caller."""
    secret = load_or_create_secret(directory.path, config.secret_file)
    epochs = Epochs.load(directory.path, is_new=directory.is_new)
    node = load_or_create_node(directory.path)
    epoch_sync = EpochSync(epochs, node, f"{config.name}@{socket.gethostname()}", adopted=adopted)
    ram = RamTier(config.ram.capacity_bytes, huge_pages=config.ram.huge_pages, page_lock=_page_lock(config, gpu))
    ram.start_prefault()
    index = _make_index(config, ram, history)
    store = _make_ssd_store(config, directory, disk)
    gpu_store = _make_gpu_store(config, gpu)
    events = EventBus()
    copies = Copies(ram, store, gpu_store)
    memory = Memory(ram, index, copies)
    reclaimer = Reclaimer(index, store, copies)

    def layout_of(fingerprint: Fingerprint) -> KVLayout | None:
        identity = identity_of(fingerprint)
        return None if identity is None else identity.layout

    def payload_bytes_of(fingerprint: Fingerprint) -> int | None:
        layout = layout_of(fingerprint)
        return None if layout is None else layout.payload_bytes

    encodings = make_encodings(config, directory, layout_of)
    ram_encoder = RamEncoder(
        index,
        memory,
        encodings,
        on_eviction=config.compression.on_eviction,
        compresses_shared=lambda: engine.settings.compress_shared,
    )
    gpu_parts = None
    if gpu_store is not None:
        parts = DemotionParts(index, gpu_store, memory, copies, events, ram_encoder, payload_bytes_of)
        demoter = Demoter(parts)
        gpu_memory = GpuMemory(gpu_store, index, copies, demoter)
        promoter = Promoter(
            parts, gpu_memory, encodings, layout_of=layout_of, after_hits=lambda: engine.settings.gpu_after_hits
        )
        gpu_parts = Gpu(index, copies, store=gpu_store, memory=gpu_memory, demoter=demoter, promoter=promoter)
    sealer = Sealer(ram, index, encodings, compresses_shared=lambda: engine.settings.compress_shared, gpu=gpu_store)
    engine = Engine(
        index=index,
        ram=ram,
        store=store,
        copies=copies,
        memory=memory,
        readers=Readers(store, memory, encodings),
        reclaimer=reclaimer,
        writer=WriteBehind(index, memory, store, copies, reclaimer, events, sealer, payload_bytes_of=payload_bytes_of),
        events=events,
        tenants=Tenants(secret, epochs, index, shared=config.sharing.scope is SharingScope.POOL),
        settings=live_settings(config),
        encodings=encodings,
        ram_encoder=ram_encoder,
        gpu=gpu_parts,
        remote=None,
        catalog=None,
        prompts=None,
        prefetcher=None,
        epoch_sync=epoch_sync,
        identity_of=identity_of,
        is_unregistered=is_unregistered,
        is_known_name=is_known_name,
        wake=wake,
    )
    tiers = SharedTiers(shared or ())
    if shared is None:
        tiers = shared_tiers(
            config,
            directory.path,
            index,
            node,
            epoch_sync,
            record_bytes_of=lambda fingerprint: _record_bytes(encodings, layout_of(fingerprint), fingerprint),
        )
    if tiers.connectors:
        engine.remote = make_remote(config, engine, sealer, tiers.connectors, payload_bytes_of=payload_bytes_of)
        _tell_catalog(engine, engine.remote, tiers)
        if engine.prompts is not None and config.prefetch.semantic:
            engine.prefetcher = make_prefetcher(engine, engine.prompts, layout_of)
    return engine


def _make_index(config: RuntimeConfig, ram: RamTier, history: History) -> PrefixIndex:
    policy = POLICIES[config.policy.eviction.value]
    return PrefixIndex(
        limit_bytes=config.ram.index_bytes,
        make_policy=policy.make_policy,
        make_learner=policy.make_learner,
        sharing=sharing_rules(config),
        history=history,
        region_of={**({GPU: region_of} if config.gpu else {}), RAM: region_of, SSD: segment_of},
        bytes_of={RAM: ram.bytes_of, SSD: bytes_of},
    )


def _make_ssd_store(config: RuntimeConfig, directory: PoolDirectory, disk: Disk | None) -> SsdStore:
    return SsdStore(
        _ssd_opener(directory, disk),
        config.ssd,
        reads=CircuitBreaker(BreakerLimits(failures=READ_FAILURES)),
        writes=CircuitBreaker(BreakerLimits(failures=WRITE_FAILURES)),
        costs=TierCosts(),
    )


def _make_gpu_store(config: RuntimeConfig, gpu: GpuOpener) -> GpuStore | None:
    if config.gpu is None:
        return None
    return GpuStore(gpu, config.gpu, breaker=CircuitBreaker(BreakerLimits(failures=READ_FAILURES)))


def _tell_catalog(engine: Engine, remote: Remote, tiers: SharedTiers) -> None:
    """Report to the catalog, if there is one, what happens in the engine from now on."""
    if tiers.catalog is None:
        return
    reporter = tiers.catalog.reporter
    engine.catalog = tiers.catalog
    remote.reporter = reporter
    remote.prompts = engine.prompts = tiers.prompts
    reporter.embeds = tiers.prompts is not None
    engine.events.tap = reporter.copied
    engine.index.on_removed = reporter.removed


def make_prefetcher(engine: Engine, prompts: PromptMemory, layout_of: Layouts) -> Prefetcher:
    """What brings blocks up before they are asked for."""
    from kvpool.pool.prefetch import Prefetcher

    return Prefetcher(engine, prompts, max_bytes=lambda: engine.settings.prefetch_bytes, layout_of=layout_of)


def _record_bytes(encodings: Encodings, layout: KVLayout | None, fingerprint: Fingerprint) -> int | None:
    """How long a model's records are in the database tier."""
    codec = encodings.codec(fingerprint, DATABASE)
    if codec is not None:
        return codec.record_bytes
    return None if layout is None else layout.record_bytes


def make_remote(
    config: RuntimeConfig,
    engine: Engine,
    sealer: Sealer,
    connectors: Sequence[Connector],
    *,
    payload_bytes_of: Callable[[Fingerprint], int | None],
) -> Remote:
    """The tiers that are shared, in the waterfall's order. Nothing is connected yet."""
    stores = {connector.name: RemoteStore(connector.name) for connector in connectors}
    lookups = LookupParts(
        index=engine.index,
        memory=engine.memory,
        encodings=engine.encodings,
        events=engine.events,
        ram_encoder=engine.ram_encoder,
        stores=tuple(stores.values()),
        workers=ThreadPoolExecutor(LOOKUP_THREADS, "kvpool-lookup"),
        is_stale=engine.tenants.is_stale,
        look_at_hint=engine.epoch_sync.look_at_hint,
        count_skipped=engine.traffic.count_skipped,
    )
    senders = [
        Sender(
            engine.index,
            stores[connector.name],
            sealer,
            engine.encodings,
            engine.events,
            level=DRAGONFLY if connector.name is TierName.DRAGONFLY else DATABASE,
            payload_bytes_of=payload_bytes_of,
            is_wanted=connector.is_wanted,
            sends_again=lambda: engine.settings.sends_again,
            threads=SENDER_THREADS,
        )
        for connector in connectors
    ]
    return Remote(
        engine.index,
        lookups,
        senders,
        connectors,
        ttl_s=lambda: engine.settings.shared_ttl_s,
        budget_s=lambda: engine.settings.shared_budget_s,
    )


def make_encodings(config: RuntimeConfig, directory: PoolDirectory, layout_of: Layouts) -> Encodings:
    """The codecs of the tiers."""
    compression = config.compression
    calibrations = None
    if compression.outlier_percentile < NO_CLIPPING:
        calibrations = Calibrations(
            directory.path, samples=compression.calibration_samples, percentile=compression.outlier_percentile
        )
    by_level = {
        level: Codec.NONE if tier is None else tier.codec
        for level, tier in (
            (RAM, config.ram), (SSD, config.ssd), (DRAGONFLY, config.dragonfly), (DATABASE, config.database),
        )
    }  # fmt: skip
    if any(codec is not Codec.NONE for codec in by_level.values()):
        check_available()
    return Encodings(by_level, compression.granularity, layout_of=layout_of, calibrations=calibrations)


def live_settings(config: RuntimeConfig) -> LiveSettings:
    """What of the configuration is looked at while the pool runs."""
    ssd = config.ssd
    return LiveSettings(
        second_hit=ssd is not None and ssd.second_hit,
        ssd_budget_s=0.1 if ssd is None else ssd.budget_s,
        read_ahead=config.policy.read_ahead,
        compress_shared=config.sharing.compress_shared,
        gpu_after_hits=config.policy.gpu_after_hits,
        prefetch_bytes=config.prefetch.max_bytes,
        sends_again=config.policy.promote_to_dragonfly,
        shared_ttl_s=DATABASE_ROUND_S if config.dragonfly is None else config.dragonfly.ttl_s,
        shared_budget_s=max(
            (tier.budget_s for tier in (config.dragonfly, config.database) if tier is not None), default=0.0
        ),
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
    """What the configuration asks for and cannot be done with the rest of it, a sentence each."""
    found = []
    if config.prefetch.semantic and (config.database is None or config.database.qdrant is None):
        found.append("prefetch.semantic is not used: it needs tiers.database.qdrant")
    elif config.prefetch.semantic and config.ssd is None:
        found.append("prefetch.semantic is not used: there is no tiers.ssd to read from")
    return tuple(found)


def _page_lock(config: RuntimeConfig, gpu: GpuOpener) -> PageLock | None:
    """What pins the ram tier's memory, so that the device copies from and to it directly; None without a device."""
    if config.gpu is None or not config.gpu.pinned_memory:
        return None
    try:
        return gpu.page_lock(config.ram.capacity_bytes)
    except TierUnavailableError as error:
        _log.info("ram tier: not pinned: %s", error.reason)
        return None


def _ssd_opener(directory: PoolDirectory, disk: Disk | None) -> Callable[[SsdConfig], SsdTier]:
    def open_tier(config: SsdConfig) -> SsdTier:
        return SsdTier.open(
            directory.ssd,
            capacity_bytes=config.capacity_bytes,
            daily_write_bytes=config.daily_write_bytes,
            disk=disk,
        )

    return open_tier

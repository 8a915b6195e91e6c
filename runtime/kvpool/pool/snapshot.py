"""Collects the counters of an engine into what `Pool.stats` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kvpool.api.codec import Codec
from kvpool.pool.engine import Engine
from kvpool.pool.gpu_store import GpuStore
from kvpool.pool.model import Model
from kvpool.pool.outages import OutageWatch
from kvpool.pool.remote.store import RemoteStore
from kvpool.pool.stats import (
    AccountStats,
    EncodingStats,
    IndexStats,
    ModelStats,
    PoolStats,
    RestoreStats,
    SharedShareStats,
    SharedTierStats,
    ShareStats,
    TierStats,
    WriteBehindStats,
)
from kvpool.prefix.accounts import UNLIMITED, Account
from kvpool.prefix.node import GPU, RAM, SSD
from kvpool.resilience import mode
from kvpool.tiers.tier import TierName, Usage


def snapshot(name: str, engine: Engine, models: Sequence[Model], outages: OutageWatch) -> PoolStats:
    """Return all counters as they are now. Counts of different parts may be of slightly different moments."""
    index, traffic = engine.index, engine.traffic
    shared = {TierName.RAM: index.shared_bytes[RAM], TierName.SSD: index.shared_bytes[SSD]}
    if engine.gpu is not None:
        shared = {TierName.GPU: index.shared_bytes[GPU], **shared}
    return PoolStats(
        name=name,
        mode=mode(outages.look()),
        mode_changes=outages.changes(),
        requests=index.matches,
        asked_blocks=index.asked_blocks,
        matched_blocks=index.matched_blocks,
        shared_hit_blocks=index.shared_hits,
        shared_bytes=shared,
        saved_prefill_seconds=sum(model.saved_prefill_seconds for model in models),
        stored_blocks=traffic.stored_blocks,
        stored_bytes=traffic.stored_bytes,
        already_there_blocks=traffic.already_there_blocks,
        already_there_bytes=traffic.already_there_bytes,
        refused_blocks=dict(traffic.refused_blocks),
        short_loads=traffic.short_loads,
        skipped_slower_blocks=traffic.skipped_slower_blocks,
        demoted_blocks=0 if engine.gpu is None else engine.gpu.demoter.demoted_blocks,
        promoted_blocks=0 if engine.gpu is None else engine.gpu.promoter.promoted_blocks,
        tiers=_tiers(engine),
        shared=_shared(engine),
        prefetch=None if engine.prefetcher is None else engine.prefetcher.stats(),
        skipped_lookups=0 if engine.remote is None else engine.remote.skipped_lookups,
        write_behind=_write_behind(engine),
        index=IndexStats(trees=len(index.trees), blocks=index.blocks, bytes=index.bytes, limit_bytes=index.limit_bytes),
        restored=RestoreStats(
            blocks=engine.restored_blocks,
            seconds=engine.restore_seconds,
            dropped={reason: count for reason, count in engine.dropped_at_start.items() if count},
        ),
        models=tuple(
            ModelStats(
                name=model.name,
                fingerprint=model.identity.fingerprint.hex(),
                record_bytes=model.layout.record_bytes,
                prefill_tokens_per_second=model.prefill_tokens_per_second,
            )
            for model in models
        ),
        accounts=_accounts(engine),
        encoding=EncodingStats(
            encoded_blocks=_plain(engine.encodings.encoded_blocks),
            raw_bytes=_plain(engine.encodings.raw_bytes),
            encoded_bytes=_plain(engine.encodings.encoded_bytes),
            kept_raw_blocks=dict(engine.encodings.kept_raw),
        ),
    )


def _levels(engine: Engine) -> dict[TierName, int]:
    """The tiers that the pool is configured with, and their levels in the index."""
    levels = {TierName.GPU: GPU, TierName.RAM: RAM, TierName.SSD: SSD}
    has = {TierName.GPU: engine.gpu is not None, TierName.RAM: True, TierName.SSD: engine.store.configured}
    return {tier: level for tier, level in levels.items() if has[tier]}


def _accounts(engine: Engine) -> tuple[AccountStats, ...]:
    levels = _levels(engine)
    shares = {} if engine.remote is None else engine.remote.shares()
    return tuple(_account(account, levels, shares) for account in list(engine.index.ledger.accounts.values()))


def _account(
    account: Account, levels: Mapping[TierName, int], shares: Mapping[TierName, Mapping[str, Usage]]
) -> AccountStats:
    return AccountStats(
        name=account.name,
        asked_blocks=account.asked_blocks,
        matched_blocks=account.matched_blocks,
        shared={
            tier: SharedShareStats(
                used_bytes=named[account.name].used_bytes, limit_bytes=named[account.name].capacity_bytes
            )
            for tier, named in shares.items()
            if account.name in named
        },
        tiers={
            tier: ShareStats(
                blocks=account.copies[level],
                used_bytes=account.bytes[level],
                in_flight_bytes=account.in_flight[level],
                guaranteed_bytes=account.quotas[level].guaranteed,
                limit_bytes=None if account.quotas[level].limit == UNLIMITED else account.quotas[level].limit,
            )
            for tier, level in levels.items()
        },
    )


def _tiers(engine: Engine) -> dict[TierName, TierStats]:
    index, traffic, store = engine.index, engine.traffic, engine.store
    tiers = {} if engine.gpu is None else {TierName.GPU: _gpu(engine, engine.gpu.store)}
    tiers |= {
        TierName.RAM: TierStats(
            name=TierName.RAM,
            available=True,
            capacity_bytes=engine.ram.capacity_bytes,
            used_bytes=engine.ram.used_bytes,
            blocks=index.copies[RAM],
            block_bytes=index.copy_bytes[RAM],
            loaded_blocks=traffic.loaded_blocks[TierName.RAM],
            loaded_bytes=traffic.loaded_bytes[TierName.RAM],
            corrupt={},
            last_error="",
        )
    }
    if engine.remote is not None:
        tiers |= {one.name: _remote(engine, one) for one in engine.remote.stores}
    if store.configured:
        tiers[TierName.SSD] = TierStats(
            name=TierName.SSD,
            available=not store.degraded,
            capacity_bytes=store.tier.capacity_bytes if store.tier else 0,
            used_bytes=store.tier.used_bytes if store.tier else 0,
            blocks=index.copies[SSD],
            block_bytes=index.copy_bytes[SSD],
            loaded_blocks=traffic.loaded_blocks[TierName.SSD],
            loaded_bytes=traffic.loaded_bytes[TierName.SSD],
            corrupt=dict(store.corrupt),
            last_error=store.last_error,
        )
    return tiers


def _remote(engine: Engine, store: RemoteStore) -> TierStats:
    traffic = engine.traffic
    return TierStats(
        name=store.name,
        available=not store.degraded,
        capacity_bytes=store.usage.capacity_bytes,
        used_bytes=store.usage.used_bytes,
        blocks=0,
        block_bytes=0,
        loaded_blocks=traffic.loaded_blocks[store.name],
        loaded_bytes=traffic.loaded_bytes[store.name],
        corrupt=dict(store.corrupt),
        last_error=store.last_error,
    )


def _shared(engine: Engine) -> dict[TierName, SharedTierStats]:
    senders = () if engine.remote is None else engine.remote.senders
    return {
        sender.store.name: SharedTierStats(
            queued_parcels=sender.queued,
            sent_blocks=sender.store.stored_blocks,
            sent_bytes=sender.store.stored_bytes,
            dropped_blocks=dict(sender.dropped),
            found_blocks=sender.store.found_blocks,
            fetched_blocks=sender.store.fetched_blocks,
            fetched_bytes=sender.store.fetched_bytes,
            in_flight_bytes=sender.store.bulkhead.in_flight_bytes,
            refused_for_room=sender.store.bulkhead.refused_total,
            busy=sender.store.busy,
            fell_out=sender.store.breaker.opened_total,
        )
        for sender in senders
    }


def _gpu(engine: Engine, store: GpuStore) -> TierStats:
    index, traffic = engine.index, engine.traffic
    return TierStats(
        name=TierName.GPU,
        available=store.tier is not None,
        capacity_bytes=store.usable_bytes,
        used_bytes=store.used_bytes,
        blocks=index.copies[GPU],
        block_bytes=index.copy_bytes[GPU],
        loaded_blocks=traffic.loaded_blocks[TierName.GPU],
        loaded_bytes=traffic.loaded_bytes[TierName.GPU],
        corrupt={},
        last_error=store.last_error,
    )


def _write_behind(engine: Engine) -> WriteBehindStats:
    writer, reclaimer, tier = engine.writer, engine.reclaimer, engine.store.tier
    dropped = {**writer.dropped, "evicted-before": engine.index.unsaved_blocks}
    return WriteBehindStats(
        queued_edges=writer.queued,
        saved_blocks=writer.saved_blocks,
        saved_bytes=writer.saved_bytes,
        dropped_blocks={reason: blocks for reason, blocks in dropped.items() if blocks},
        physical_bytes_written=tier.stats().bytes_written if tier else 0,
        freed_segments=reclaimer.freed_segments,
        rewritten_blocks=reclaimer.rewritten_blocks,
        rewritten_bytes=reclaimer.rewritten_bytes,
    )


def _plain(counts: Counter[Codec]) -> dict[str, int]:
    return {codec.value: count for codec, count in counts.items()}

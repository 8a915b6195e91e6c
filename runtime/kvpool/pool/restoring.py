"""Brings the index back from what lies on SSD when a pool is opened, or when the tier comes back.

Only what can be matched is kept: records of an epoch that was erased since, or whose ancestors are gone, are dropped
and counted. Each record is verified when it is read, not here.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict

from kvpool.blocks.identity import TreeId
from kvpool.blocks.record import CODEC_NONE
from kvpool.pool.copies import shrink_index
from kvpool.pool.engine import Engine
from kvpool.pool.epochs import Epochs
from kvpool.prefix.restore import restore
from kvpool.prefix.sharing import mark_again
from kvpool.tiers.ssd.segment import RecoveredRecord
from kvpool.tiers.ssd.tier import SsdTier
from kvpool.tiers.tier import TierUnavailableError

_log = logging.getLogger(__name__)


def restore_from(engine: Engine, tier: SsdTier) -> None:
    """Enter all that `tier` has recovered, and let everybody use it.

    Raises `OSError` where adopted epochs cannot be made durable, and `TierUnavailableError`: it is not in use then.
    """
    started = time.perf_counter()
    groups = _groups(tier)
    _settle_epochs(engine, groups)
    dropped: Counter[str] = Counter()
    blocks = sum(_restore_tree(engine, tier, tree_id, records, dropped) for tree_id, records in groups.items())
    dropped += tier.recovery.dropped
    seconds = time.perf_counter() - started
    _log.info("ssd tier: %d blocks found again in %.2f s, dropped %s", blocks, seconds, dict(dropped) or "none")
    engine.restored_blocks += blocks
    engine.dropped_at_start += dropped
    engine.restore_seconds += seconds
    if engine.dropped_at_start:  # what these blocks were is not known, so neither is why they are missing
        engine.index.history.complete_since_s = time.time()
    mark_again(engine.index, engine.shared_marks)
    engine.store.publish(tier)
    shrink_index(engine.index, engine.copies)


def use_tier(engine: Engine, tier: SsdTier) -> bool:
    """`restore_from`, with a fault of the disk counted and logged; False where the tier was closed again for one."""
    try:
        restore_from(engine, tier)
    except (OSError, TierUnavailableError) as error:
        _log.warning("ssd tier: %s; tried again later", error)
        engine.store.last_error = str(error)
        engine.store.writes.trip(str(error))
        tier.close()
        return False
    return True


def _groups(tier: SsdTier) -> dict[TreeId, list[RecoveredRecord]]:
    groups: dict[TreeId, list[RecoveredRecord]] = defaultdict(list)
    for records in tier.recovered():
        for record in records:
            groups[TreeId(record.fingerprint, record.tenant, record.epoch)].append(record)
    return groups


def _settle_epochs(engine: Engine, groups: dict[TreeId, list[RecoveredRecord]]) -> None:
    """A record of a higher epoch than is known proves that epoch; where erasures are unknown, no record is believed."""
    epochs = engine.tenants.epochs
    if not epochs.trusted:
        distrust(epochs, max((tree_id.epoch for tree_id in groups), default=0))
        return
    for tree_id in groups:
        epochs.at_least(tree_id.tenant, tree_id.epoch)
    epochs.save()


def distrust(epochs: Epochs, seen: int = 0) -> None:
    """Let no record of before be matched, found or not: the new epoch is the time, which no counter has reached."""
    epochs.distrust_up_to(max(seen, time.time_ns()))


def _restore_tree(
    engine: Engine, tier: SsdTier, tree_id: TreeId, records: list[RecoveredRecord], dropped: Counter[str]
) -> int:
    identity = engine.identity_of(tree_id.fingerprint)
    if engine.is_unregistered(tree_id.fingerprint):
        tier.drop([record.place for record in records])
        dropped["unregistered"] += len(records)
        return 0
    alike = [record for record in records if _can_be_served(engine, record)]
    raw = [record.record_bytes for record in alike if record.codec == CODEC_NONE]
    record_bytes = identity.layout.record_bytes if identity else next(iter(raw), 0)
    alike = [record for record in alike if record.codec != CODEC_NONE or record.record_bytes == record_bytes]
    token_bytes = len(records[0].tokens)
    with engine.tenants.lock:
        if tree_id.epoch != engine.tenants.epochs.of(tree_id.tenant):
            tier.drop([record.place for record in records])
            dropped["erased"] += len(records)
            return 0
        model = identity.name if identity else ""
        tree = engine.tenants.tree(tree_id, token_bytes=token_bytes, record_bytes=record_bytes, model=model)
    restored = restore(engine.index, tree, alike)
    unlike: list[int] = []
    if len(alike) < len(records):
        kept = {record.place for record in alike}
        unlike = [record.place for record in records if record.place not in kept]
    tier.drop(restored.orphans + restored.duplicates + unlike)
    dropped["orphan"] += len(restored.orphans)
    dropped["duplicate"] += len(restored.duplicates)
    dropped["codec-or-length"] += len(unlike)
    return restored.blocks


def _can_be_served(engine: Engine, record: RecoveredRecord) -> bool:
    """Whether its codec is one that the configuration names: a pool without lossy codecs serves no lossy block."""
    if record.codec == CODEC_NONE:
        return True
    known = engine.identity_of(record.fingerprint) is not None
    return known and record.codec in engine.encodings.readable(record.fingerprint)

"""What each eviction policy hits through a whole pool: bytes, tiers, models and leases as in service."""

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from kvpool.api import Eviction
from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import BLOCK_TOKENS, KIB, EngineMemory, InPlace, pool_config, spec_of
from kvpool.bench.engine.traces import trace_of
from kvpool.bench.row import Figure, Row
from kvpool.config import RuntimeConfig
from kvpool.pool.lease import Lease
from kvpool.pool.pool import Pool
from kvpool.replay.trace import Trace
from kvpool.tiers.tier import TierName

PAYLOAD_BYTES = 4 * KIB
RECORD_BYTES = 8 * KIB
RAM_BLOCKS = (2_000, 5_000, 20_000)
SSD_BLOCKS = 10_000
MODELS = 2
HELD_LEASES = 64
"""So many requests are in service at once, where leases are held: over half of what is stored."""


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `policy`: hits in percent of the blocks asked for, the adaptive policy's beside LRU's."""
    trace = trace_of(conditions)
    for blocks in RAM_BLOCKS:
        yield from _rows(f"ram-{blocks // 1_000}k-blocks", trace, conditions, ram_blocks=blocks)
    small, middle, _ = RAM_BLOCKS
    yield from _rows("ram-and-ssd", trace, conditions, ram_blocks=small, ssd_blocks=SSD_BLOCKS)
    yield from _rows("two-models", trace, conditions, ram_blocks=middle, models=MODELS)
    yield from _rows("leases", trace, conditions, ram_blocks=small, held_leases=HELD_LEASES)


def _rows(
    name: str,
    trace: Trace,
    conditions: Conditions,
    *,
    ram_blocks: int,
    ssd_blocks: int = 0,
    models: int = 1,
    held_leases: int = 1,
) -> Iterator[Row]:
    config = pool_config(
        ram_bytes=conditions.scaled(ram_blocks, least=256) * RECORD_BYTES,
        ssd_bytes=conditions.scaled(ssd_blocks, least=4_096) * RECORD_BYTES if ssd_blocks else None,
    )
    hits = [
        _hit_percent(trace, _evicting_by(config, eviction), conditions, models, held_leases)
        for eviction in (Eviction.LRU, Eviction.ADAPTIVE)
    ]
    lru, adaptive = hits
    for tier in lru:
        yield Row(
            f"policy.{name}.{tier}", "%", Figure(adaptive[tier], lru[tier], adaptive[tier] / max(lru[tier], 1e-9))
        )


def _evicting_by(config: RuntimeConfig, eviction: Eviction) -> RuntimeConfig:
    policy = config.policy.model_copy(update={"eviction": eviction})
    return config.model_copy(update={"policy": policy})


def _hit_percent(
    trace: Trace, config: RuntimeConfig, conditions: Conditions, models: int, held_leases: int
) -> Mapping[str, float]:
    """Play a trace; a conversation, known by its second block (the first may be the same for all), has one model."""
    memory, sink = EngineMemory(PAYLOAD_BYTES, 64), InPlace()
    with conditions.place("pool") as place, Pool.open(config, directory=place) as pool:
        served = [pool.register(spec_of(PAYLOAD_BYTES, f"bench-{at}")) for at in range(models)]
        held: deque[Lease] = deque()
        for blocks in trace:
            model = served[blocks[min(1, len(blocks) - 1)] % models]
            tokens = np.repeat(np.asarray(blocks, np.int32), BLOCK_TOKENS).tobytes()
            held.append(model.match(tokens))
            held[-1].load(sink)
            model.store(tokens, memory)
            if len(held) >= held_leases:
                held.popleft().close()
        while held:
            held.popleft().close()
        stats = pool.stats()
    asked = sum(map(len, trace))
    tiers = [TierName.RAM, *([TierName.SSD] if config.ssd else [])]
    shares = {tier.value: 100 * stats.tiers[tier].loaded_blocks / asked for tier in tiers}
    return {**shares, "all": sum(shares.values())} if len(tiers) > 1 else shares

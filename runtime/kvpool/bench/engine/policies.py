"""What each eviction policy hits through a whole pool: bytes, tiers, models and leases as in service."""

from collections.abc import Iterator, Mapping

from kvpool.api import Eviction
from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import KIB, pool_config, spec_of
from kvpool.bench.engine.traces import serve, trace_of
from kvpool.bench.row import Figure, Row
from kvpool.pool.pool import Pool
from kvpool.replay.trace import Trace
from kvpool.tiers.tier import TierName

PAYLOAD_BYTES = 4 * KIB
RECORD_BYTES = 8 * KIB
RAM_BLOCKS = (2_000, 5_000, 20_000)
SSD_BLOCKS = 10_000
MODELS = 2
AT_ONCE = 64
"""So many requests run at once, where several do, each with a lease."""


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `policy`: hits in percent of the blocks asked for, the adaptive policy's beside LRU's."""
    trace = trace_of(conditions)
    for blocks in RAM_BLOCKS:
        yield from _rows(f"ram-{blocks // 1_000}k-blocks", trace, conditions, ram_blocks=blocks)
    small, middle, _ = RAM_BLOCKS
    yield from _rows("ram-and-ssd", trace, conditions, ram_blocks=small, ssd_blocks=SSD_BLOCKS)
    yield from _rows("two-models", trace, conditions, ram_blocks=middle, models=MODELS)
    yield from _rows(f"{AT_ONCE}-at-once", trace, conditions, ram_blocks=small, at_once=AT_ONCE)


def _rows(
    name: str,
    trace: Trace,
    conditions: Conditions,
    *,
    ram_blocks: int,
    ssd_blocks: int = 0,
    models: int = 1,
    at_once: int = 1,
) -> Iterator[Row]:
    def hit_percent(eviction: Eviction) -> Mapping[str, float]:
        config = pool_config(
            ram_bytes=conditions.scaled(ram_blocks, least=256) * RECORD_BYTES,
            ssd_bytes=conditions.scaled(ssd_blocks, least=4_096) * RECORD_BYTES if ssd_blocks else None,
            eviction=eviction,
        )
        with conditions.place("pool") as place, Pool.open(config, directory=place) as pool:
            served = [pool.register(spec_of(PAYLOAD_BYTES, f"bench-{at}")) for at in range(models)]
            serve(trace, served, PAYLOAD_BYTES, at_once=at_once)
            loaded = pool.stats().tiers
        asked = sum(map(len, trace))
        tiers = [TierName.RAM, TierName.SSD] if ssd_blocks else [TierName.RAM]
        shares = {tier.value: 100 * loaded[tier].loaded_blocks / asked for tier in tiers}
        return {**shares, "all": sum(shares.values())} if ssd_blocks else shares

    lru, adaptive = hit_percent(Eviction.LRU), hit_percent(Eviction.ADAPTIVE)
    for tier, probe in lru.items():
        yield Row(f"policy.{name}.{tier}", "%", Figure(adaptive[tier], probe, adaptive[tier] / max(probe, 1e-9)))

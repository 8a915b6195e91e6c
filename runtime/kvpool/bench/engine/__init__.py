"""The engine's benchmarks: index, slots, ram and ssd tiers, the pool under pressure, the process, a model."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.engine import (
    generation,
    index,
    matching,
    policies,
    pressure,
    process,
    ram,
    slots,
    ssd,
    startup,
    traces,
)

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("match", "find and lease a prompt among 10,000 others", matching.run),
    Benchmark("lease", "hold a prompt and let it go", matching.run_leases),
    Benchmark("call", "the same through Model.match and Lease.close, by the form of the tokens", matching.run_calls),
    Benchmark("index", "memory per block; blocks inserted and evicted", index.run),
    Benchmark("slots", "the slab allocator: time per slot, share served from the pool", slots.run),
    Benchmark("ram", "store and copy out, beside memcpy", ram.run),
    Benchmark("ssd", "write and cold read, beside raw O_DIRECT", ssd.run),
    Benchmark("full", "store into a full pool, everything wanted on ssd", pressure.run_full),
    Benchmark("latency", "match and lease while two threads store", pressure.run_latency),
    Benchmark("startup", "open a pool that holds 100,000 blocks", startup.run),
    Benchmark("process", "memory beyond the capacities, CPU when idle", process.run),
    Benchmark("replay", "hit ratios of a trace, beside an exact LRU", traces.run_replay),
    Benchmark("policy", "hit ratios of a trace through a pool, by eviction policy", policies.run),
    Benchmark("wear", "bytes written to the disk for each byte saved, on a trace", traces.run_wear),
    Benchmark("model", "SmolLM2: first token of a repeated prompt, cost where nothing repeats", generation.run),
)

"""The engine's benchmarks: index, slots, ram and ssd tiers, the pool under pressure, the process, a model."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.engine import index, matching, ram, slots

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("match", "find and lease a prompt among 10,000 others", matching.run),
    Benchmark("lease", "hold a prompt and let it go", matching.run_leases),
    Benchmark("index", "memory per block; blocks inserted and evicted", index.run),
    Benchmark("slots", "the slab allocator: time per slot, share served from the pool", slots.run),
    Benchmark("ram", "store and copy out, beside memcpy", ram.run),
)

"""What each tier gives, alone and above the next: a chat workload that is larger than any of them, on real servers."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.waterfall import chat, latency

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("latency", "a prompt that one tier alone has, from match to loaded; beside it, its medium", latency.run),
    Benchmark("chat", "hits, latency and bytes, for each tier alone, and tier upon tier", chat.run),
)

"""What codecs cost a real model in quality: perplexity, greedy agreement, and how far keys and values are off."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.quality import smollm2

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("float32", "SmolLM2 in float32, its context's keys and values through each codec", smollm2.run_float32),
    Benchmark("bfloat16", "the same, of keys and values that were rounded to bfloat16", smollm2.run_bfloat16),
)

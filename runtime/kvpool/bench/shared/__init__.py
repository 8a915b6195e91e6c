"""What the shared tiers cost: Dragonfly, PostgreSQL, the vectors of prompts, and an engine that has them all."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.shared import catalog, dragonfly, engine, payloads, vectors

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("dragonfly", "records over loopback TCP, beside a copy between two processes", dragonfly.run),
    Benchmark("catalog", "rows into and out of the catalog, beside psycopg alone; the journal", catalog.run),
    Benchmark("payloads", "records in PostgreSQL, and from which prefill rate on reading them pays", payloads.run),
    Benchmark("encode", "embed a prompt without a model", vectors.run_encode),
    Benchmark("vectors", "find similar prompts among 100,000, beside comparing with them all", vectors.run_vectors),
    Benchmark("beside", "an engine's calls with shared tiers, beside the same without", engine.run),
)

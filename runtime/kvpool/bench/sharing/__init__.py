"""What prefix sharing is worth: seeded workloads in a real pool that is too small for them, with and without it."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.sharing import crowd, pressure

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("chatbot", "chats behind 60 system prompts; beside it, sharing switched off", pressure.run_chatbot),
    Benchmark(
        "agent", "tasks of many steps behind 24 sets of tools; beside it, sharing switched off", pressure.run_agent
    ),
    Benchmark(
        "varied", "one-off prompts, templates with documents, chats; beside it, sharing off", pressure.run_varied
    ),
    Benchmark("crowd", "10,000 shared prefixes of 5 models at once, and scans; beside it, sharing off", crowd.run),
)

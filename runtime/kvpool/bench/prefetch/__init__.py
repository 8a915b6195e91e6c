"""What prefetching by similar prompts brings, beside prefetching what is asked for most, and none at all.

A model of RAM over an SSD plays the requests; hits are in percent of the blocks asked for, gains in points of that. A
lead below 0: semantic prefetch does not win.
"""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.prefetch import evaluation

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("trace", "the recorded trace, or a made-up one", evaluation.run_trace),
    Benchmark("chatbot", "chats behind 60 system prompts", evaluation.run_chatbot),
    Benchmark("agent", "tasks of many steps behind 24 sets of tools", evaluation.run_agent),
    Benchmark("varied", "one-off prompts, templates with documents, chats", evaluation.run_varied),
    Benchmark("stages", "flows of stages, made for semantic prefetch: what can be won at all", evaluation.run_stages),
)

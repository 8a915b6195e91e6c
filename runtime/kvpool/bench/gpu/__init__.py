"""The gpu tier's benchmarks: slots, copies beside plain pinned ones, overlap with compute, codecs, first tokens."""

from collections.abc import Sequence

from kvpool.bench.area import Benchmark
from kvpool.bench.gpu import codecs, copies, first_token, overlap, slots

BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("slots", "a hit found, slots handed out and used again; on host memory where there is no GPU", slots.run),
    Benchmark("copies", "host to device and back, beside plain pinned copies of the same blocks", copies.run),
    Benchmark("overlap", "copies beside a running matrix product, and what that costs it", overlap.run),
    Benchmark("device-codecs", "encode and decode on the device, beside its memory copy", codecs.run),
    Benchmark("first-token", "a repeated prompt from the gpu tier, beside its cache left in memory", first_token.run),
)

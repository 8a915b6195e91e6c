"""The codecs' benchmarks: a benchmark for each, with what it is for; its rows are by the elements that it encodes."""

from collections.abc import Sequence
from functools import partial

from kvpool.api.codec import Codec
from kvpool.bench.area import Benchmark
from kvpool.bench.codecs import measuring

_WHAT_FOR = {
    Codec.FP16: "for float32 caches: half the bytes, next to nothing lost; saves nothing on 16-bit elements",
    Codec.INT8_SYMMETRIC: "the smallest of the int8: a quarter of float32, just over half of 16 bits",
    Codec.INT8_ASYMMETRIC: "int8 for models whose keys lie far from zero: less error than symmetric for 3 % more bytes",
    Codec.INT4_ASYMMETRIC: "for where bytes are short above all: under a third of 16 bits, at an error that shows",
}
BENCHMARKS: Sequence[Benchmark] = (
    *(Benchmark(codec.value, about, partial(measuring.run_codec, codec)) for codec, about in _WHAT_FOR.items()),
    Benchmark(
        "granularity", "what shares a scale: size and error, on bfloat16 with outliers", measuring.run_granularity
    ),
)

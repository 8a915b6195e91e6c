"""Size, speed and error of a codec. Speeds are of one thread, beside its memcpy of as many bytes as the payload has."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.codecs.payloads import Data, Floats, numbers, payload_of, planes, values_of
from kvpool.bench.probes import Memcpy, touched
from kvpool.bench.rounds import beside, bytes_per_second
from kvpool.bench.row import Figure, Row, Target, at_most, ratio_at_least
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import PayloadCodec, codec_for
from kvpool.codecs.cpu.kernels import kernels

DTYPES = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)
BLOCK_BYTES = 4 << 20
ARENA_BYTES = 64 << 20
"""Blocks are taken by turns, so that none is in a cache at its turn."""
MORE_ROUNDS = 3
_MB_PER_BYTE = 1e-6
_SPEED: dict[Codec, Target] = {
    Codec.FP16: ratio_at_least(0.8),
    Codec.INT8_SYMMETRIC: ratio_at_least(0.5),
    Codec.INT8_ASYMMETRIC: ratio_at_least(0.5),
}
_ERROR: dict[Codec, Target] = {
    Codec.INT8_SYMMETRIC: at_most(2),
    Codec.INT8_ASYMMETRIC: at_most(2),
}


def run_codec(codec: Codec, conditions: Conditions) -> Iterator[Row]:
    """Rows of a codec, by the dtype of the elements that it is for."""
    with _one_thread():
        for dtype in DTYPES:
            layout = _layout(dtype, conditions)
            made = codec_for(layout, codec)
            if made is None:
                continue
            name = f"{codec}.{dtype}"
            yield Row(f"{name}.ratio", "x", Figure(layout.payload_bytes / made.encoded_bytes))
            yield from _speeds(name, made, conditions, _SPEED.get(codec))
            for data in Data:
                yield from _errors(f"{name}.error.{data}", made, data, _ERROR.get(codec))


def run_granularity(conditions: Conditions) -> Iterator[Row]:
    """Rows of `granularity`."""
    layout = _layout(Dtype.BFLOAT16, conditions)
    with _one_thread():
        for codec in (Codec.INT8_SYMMETRIC, Codec.INT8_ASYMMETRIC, Codec.INT4_ASYMMETRIC):
            for granularity in Granularity:
                made = codec_for(layout, codec, granularity)
                if made is None:
                    continue
                name = f"granularity.{codec}.{granularity}"
                yield Row(f"{name}.ratio", "x", Figure(layout.payload_bytes / made.encoded_bytes))
                yield from _errors(f"{name}.error", made, Data.OUTLIERS, None)


def _layout(dtype: Dtype, conditions: Conditions) -> KVLayout:
    """8 heads of size 128 and 64 tokens, as many layers as make a block of 4 MiB."""
    of_layer = 2 * 8 * 128 * 64 * dtype.itemsize
    return KVLayout(layers=conditions.scaled(BLOCK_BYTES // of_layer), kv_heads=8, head_size=128, dtype=dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The kernels have one thread anyhow; torch, where it stands in for them, is told so, and told back."""
    if kernels() is not None:
        yield
        return
    try:
        import torch
    except ModuleNotFoundError:
        raise UnmeasurableError("neither the compiled kernels nor torch are installed") from None
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _speeds(name: str, codec: PayloadCodec, conditions: Conditions, target: Target | None) -> Iterator[Row]:
    layout = codec.layout
    blocks = max(2, conditions.scaled(ARENA_BYTES) // layout.payload_bytes)
    nbytes = blocks * layout.payload_bytes
    payload = payload_of(layout, numbers(layout, Data.NORMAL))
    payloads = touched(nbytes).reshape(blocks, layout.payload_bytes)
    encoded = touched(blocks * (codec.encoded_bytes + -codec.encoded_bytes % 4)).reshape(blocks, -1)
    encoded = encoded[:, : codec.encoded_bytes]
    for block in payloads:
        np.copyto(block, payload)

    def encode_all() -> None:
        for source, into in zip(payloads, encoded, strict=True):
            codec.encode(source, into)

    def decode_all() -> None:
        for source, into in zip(encoded, payloads, strict=True):
            codec.decode(source, into)

    memcpy = Memcpy(layout.payload_bytes, blocks)
    copying = bytes_per_second(lambda: memcpy.copy_some(blocks), nbytes)
    for verb, work in (("encode", encode_all), ("decode", decode_all)):
        work()
        figure = beside(bytes_per_second(work, nbytes), copying, MORE_ROUNDS * conditions.rounds)
        yield Row(f"{name}.{verb}", "MB/s", figure.in_unit(_MB_PER_BYTE), target)


def _errors(name: str, codec: PayloadCodec, data: Data, target: Target | None) -> Iterator[Row]:
    """Of keys and of values, relative to their norms (Frobenius), in percent."""
    layout = codec.layout
    payload = payload_of(layout, numbers(layout, data))
    encoded, back = np.empty(codec.encoded_bytes, np.uint8), np.empty_like(payload)
    codec.encode(payload, encoded)
    codec.decode(encoded, back)
    pairs = zip(planes(layout, values_of(layout, back)), planes(layout, values_of(layout, payload)), strict=True)
    for plane, (after, before) in zip(("keys", "values"), pairs, strict=True):
        yield Row(f"{name}.{plane}", "%", Figure(100 * _relative(after, before)), target)


def _relative(after: Floats, before: Floats) -> float:
    exact = before.astype(np.float64)
    return float(np.linalg.norm(after - exact) / np.linalg.norm(exact))

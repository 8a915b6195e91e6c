"""What no codec takes: payloads that it would ruin, buffers that do not fit, records that it does not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import NUMBERS, ClipLimits, Loss, UnknownCodecError, codec_for, codec_of
from kvpool.errors import InputError

from .payloads import FLOATS, INT_CODECS, LARGEST, encoded, made, normal, payload_of, there_and_back

LAYOUT = KVLayout(layers=3, kv_heads=2, head_size=64, dtype=Dtype.FLOAT32)


def layout_of(dtype: Dtype) -> KVLayout:
    return KVLayout(layers=3, kv_heads=2, head_size=64, dtype=dtype)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", INT_CODECS)
def test_what_is_not_finite_is_refused_wherever_it_is(codec: Codec, dtype: Dtype, wrong: float, place: str) -> None:
    layout = layout_of(dtype)
    values = normal(layout)
    values[{"first": 0, "middle": len(values) // 2, "last": -1}[place]] = wrong
    for limits in (None, limits_of(layout, 1.0)):
        assert refused(layout, codec, values, limits) is Loss.NOT_FINITE


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_fp16_refuses_what_is_not_finite(wrong: float) -> None:
    values = normal(LAYOUT)
    values[-1] = wrong
    values[0] = 1e6  # what is not finite is the reason, whatever else there is
    assert refused(LAYOUT, Codec.FP16, values) is Loss.NOT_FINITE


@pytest.mark.parametrize(("value", "loss"), [(65504, None), (65504.1, Loss.OUT_OF_RANGE), (-1e30, Loss.OUT_OF_RANGE)])
def test_fp16_refuses_what_a_half_cannot_hold(value: float, loss: Loss | None) -> None:
    values = normal(LAYOUT)
    values[7] = value
    assert refused(LAYOUT, Codec.FP16, values) is loss


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_a_range_that_overflows_float32_is_refused(dtype: Dtype) -> None:
    layout = layout_of(dtype)
    values = normal(layout)
    values[0], values[64] = LARGEST[dtype], -LARGEST[dtype]  # one channel of the keys
    assert refused(layout, Codec.INT8_ASYMMETRIC, values) is Loss.OUT_OF_RANGE
    assert refused(layout, Codec.INT4_ASYMMETRIC, values) is Loss.OUT_OF_RANGE


def test_limits_bring_a_range_back_that_would_overflow() -> None:
    values = normal(LAYOUT)
    values[0], values[64] = LARGEST[Dtype.FLOAT32], -LARGEST[Dtype.FLOAT32]
    back = there_and_back(made(LAYOUT, Codec.INT8_ASYMMETRIC), payload_of(LAYOUT, values), limits_of(LAYOUT, 4.0))
    assert 3.9 <= back[0] <= 4.1
    assert -4.1 <= back[64] <= -3.9


def refused(layout: KVLayout, codec: Codec, values: np.ndarray, limits: ClipLimits | None = None) -> Loss | None:
    codec_made = made(layout, codec)
    return codec_made.encode(payload_of(layout, values), np.zeros(codec_made.encoded_bytes, np.uint8), limits)


def limits_of(layout: KVLayout, limit: float) -> ClipLimits:
    shape = layout.layers, layout.kv_heads
    keys, values = ((*shape, dim) for dim in (layout.head_size, layout.value_dim))
    return ClipLimits(np.full(keys, limit, np.float32), np.full(values, limit, np.float32), 1, 99.0)


@pytest.mark.parametrize("codec", [Codec.FP16, *INT_CODECS])
def test_buffers_must_fit_exactly(codec: Codec) -> None:
    codec_made = made(LAYOUT, codec)
    payload = payload_of(LAYOUT, normal(LAYOUT))
    into, back = np.zeros(codec_made.encoded_bytes, np.uint8), np.zeros_like(payload)
    longer = np.zeros(len(payload) + 8, np.uint8)
    read_only = into.copy()
    read_only.flags.writeable = False
    for wrong in (payload[:-1], longer, longer[2 : 2 + len(payload)], longer[:-8][::-1], payload.view(np.int8)):
        with pytest.raises(InputError, match="payload"):
            codec_made.encode(wrong, into)
    others: list[Any] = [into[:-1], longer[: len(into) + 1], longer[1 : 1 + len(into)], read_only, bytes(len(into))]
    for other in others:
        with pytest.raises(InputError, match="into"):
            codec_made.encode(payload, other)
    for wrong in (into[:-1], longer[: len(into) + 1], longer[3 : 3 + len(into)]):
        with pytest.raises(InputError, match="encoded"):
            codec_made.decode(wrong, back)
    with pytest.raises(InputError, match="exactly"):
        codec_made.decode(into, back[:-4])
    codec_made.encode(longer[8:], into)  # of a multiple of 4
    read_only_payload = payload.copy()
    read_only_payload.flags.writeable = False
    codec_made.encode(read_only_payload, into)


def test_tensors_must_fit_exactly() -> None:
    codec = made(LAYOUT, Codec.INT8_ASYMMETRIC)
    payload, into = (
        torch.zeros(LAYOUT.payload_bytes, dtype=torch.uint8),
        torch.zeros(codec.encoded_bytes, dtype=torch.uint8),
    )
    for wrong in (payload[:-1], payload.view(torch.int8), payload.view(2, -1), payload.repeat(2)[::2]):
        with pytest.raises(InputError, match="read"):
            codec.encode_tensor(wrong, into)
    with pytest.raises(InputError, match="write"):
        codec.encode_tensor(payload, into[:-1])
    with pytest.raises(InputError, match="device"):
        codec.encode_tensor(payload, torch.zeros(codec.encoded_bytes, dtype=torch.uint8, device="meta"))


def test_limits_of_another_layout_are_refused() -> None:
    other = KVLayout(layers=3, kv_heads=2, head_size=32, dtype=Dtype.FLOAT32)
    for codec in (Codec.FP16, *INT_CODECS):
        codec_made = made(LAYOUT, codec)
        with pytest.raises(InputError, match="limits"):
            codec_made.encode(
                payload_of(LAYOUT, normal(LAYOUT)), np.zeros(codec_made.encoded_bytes, np.uint8), limits_of(other, 1.0)
            )


@pytest.mark.parametrize(
    ("number", "params"),
    [(0, b""), (0, b"\1"), (5, b"\1\0"), (65535, b"\1\0"), (2, b""), (2, b"\1"), (2, b"\1\3"), (2, b"\2\0"),
     (2, b"\1\0\0"), (1, b""), (1, b"\1\0"), (1, b"\2")],
)  # fmt: skip
def test_unknown_numbers_and_parameters_are_an_unknown_codec(number: int, params: bytes) -> None:
    with pytest.raises(UnknownCodecError):
        codec_of(LAYOUT, number, params)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT8_E4M3, Dtype.FLOAT8_E5M2, Dtype.UINT8])
def test_elements_of_one_byte_have_no_codec(dtype: Dtype) -> None:
    for codec in Codec:
        assert codec_for(layout_of(dtype), codec) is None
    with pytest.raises(UnknownCodecError):
        codec_of(layout_of(dtype), NUMBERS[Codec.INT8_SYMMETRIC], b"\1\0")


@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.BFLOAT16])
def test_fp16_saves_nothing_on_16_bits(dtype: Dtype) -> None:
    assert codec_for(layout_of(dtype), Codec.FP16) is None
    with pytest.raises(UnknownCodecError):
        codec_of(layout_of(dtype), NUMBERS[Codec.FP16], b"\1")


def test_there_is_no_codec_where_a_record_would_not_be_smaller() -> None:
    tiny = KVLayout(layers=1, kv_heads=1, head_size=8, dtype=Dtype.FLOAT32, block_tokens=4)
    lone = KVLayout(layers=8, kv_heads=8, head_size=64, dtype=Dtype.FLOAT32, block_tokens=1)
    assert codec_for(tiny, Codec.INT8_SYMMETRIC) is None  # one page either way
    assert codec_for(lone, Codec.INT8_SYMMETRIC) is not None
    assert codec_for(lone, Codec.INT8_ASYMMETRIC) is None  # a key has a zero and a scale of its own
    for layout in (tiny, lone, LAYOUT):
        for codec in Codec:
            for granularity in Granularity:
                codec_made = codec_for(layout, codec, granularity)
                assert codec_made is None or codec_made.record_bytes < layout.record_bytes
    assert codec_for(LAYOUT, Codec.NONE) is None


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("codec", list(Codec)[1:])
def test_a_records_number_and_parameters_name_the_codec_that_made_it(codec: Codec, granularity: Granularity) -> None:
    codec_made = codec_for(LAYOUT, codec, granularity)
    assert codec_made is not None
    again = codec_of(LAYOUT, codec_made.number, codec_made.params)
    assert (again.codec, again.number, again.params) == (codec, NUMBERS[codec], codec_made.params)
    assert again.encoded_bytes == codec_made.encoded_bytes == len(encoded(again, payload_of(LAYOUT, normal(LAYOUT))))


def test_codecs_are_imported_without_torch_and_say_what_to_install_where_neither_torch_nor_kernels_are() -> None:
    program = """
import sys
import kvpool.codecs
assert "torch" not in sys.modules
import numpy as np
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import payload
payload.kernels = lambda: None
sys.modules["torch"] = None
layout = KVLayout(layers=3, kv_heads=2, head_size=64, dtype=Dtype.FLOAT32)
codec = kvpool.codecs.codec_for(layout, Codec.INT8_SYMMETRIC)
try:
    codec.encode(np.zeros(layout.payload_bytes, np.uint8), np.zeros(codec.encoded_bytes, np.uint8))
except kvpool.errors.ConfigError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "pip install 'kvpool[codecs]'" in ended.stdout


def test_opening_a_pool_without_codecs_imports_no_torch(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from kvpool import Pool
from kvpool.config import RamConfig, RuntimeConfig
config = RuntimeConfig(name="a", ram=RamConfig(capacity_bytes=1 << 24, index_bytes=1 << 22))
with Pool.open(config, directory=Path({str(tmp_path)!r}) / "pool"):
    print("torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ended.stdout == "False\n"

"""Fixed bytes. If one of these fails, blocks of pools that exist could no longer be read: raise `FORMAT_VERSION`."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import NUMBERS, ClipLimits

from .payloads import FLOATS, Bytes, decoded, encoded, made, payload_of, values_of

BLOCKS = {
    ("float32", "fp16"): (
        "00c0003580bd008000ba403e00b040bf0038c0bc803c80b8003f002c80be003e00bc403d003ec03f0034003e003b80ba"
        "003e00b280bf003700bd403c"
    ),
    ("float32", "int8-symmetric"): (
        "823c6a3c4a3c423c7a3c2a3c1a3c623c523c423c723c223c82169000cb7ff881297fbe7e7f7f187f39b28278d77f05817ff0811e826b"
    ),
    ("float32", "int8-asymmetric"): (
        "000000c00000e8bf0000b0bf0000c03f000080bf000050bf000098bf000010bf0000d0bf000040be0000f0bf0000a0bf"
        "013c093c3d3c80003d3c093c153c153cd93bd93b153c153c00fe00fe7fffee00a30000fe00ff7f00a30000fe00feff00"
        "ff0000fe00fe"
    ),
    ("float32", "int4-asymmetric"): (
        "000000c00000e8bf0000b0bf0000c03f000080bf000050bf000098bf000010bf0000d0bf000040be0000f0bf0000a0bf"
        "093e123e493e8000493e123e1e3e1e3ee73de73d1e3e1e3ef0ef00af077000af000ff0ff00ff00f0"
    ),
    ("float16", "int8-symmetric"): (
        "823c6a3c4a3c423c7a3c2a3c1a3c623c523c423c723c223c82169000cb7ff881297fbe7e7f7f187f39b28278d77f05817ff0811e826b"
    ),
    ("float16", "int8-asymmetric"): (
        "00c040bf80bd003e00bc80bac0bc80b880be00b280bf00bd013c093c3d3c80003d3c093c153c153cd93bd93b153c153c"
        "00fe00fe7fffee00a30000fe00ff7f00a30000fe00feff00ff0000fe00fe"
    ),
    ("float16", "int4-asymmetric"): (
        "00c040bf80bd003e00bc80bac0bc80b880be00b280bf00bd093e123e493e8000493e123e1e3e1e3ee73de73d1e3e1e3e"
        "f0ef00af077000af000ff0ff00ff00f0"
    ),
    ("bfloat16", "int8-symmetric"): (
        "823c6a3c4a3c423c7a3c2a3c1a3c623c523c423c723c223c82169000cb7ff881297fbe7e7f7f187f39b28278d77f05817ff0811e826b"
    ),
    ("bfloat16", "int8-asymmetric"): (
        "00c0e8bfb0bfc03f80bf50bf98bf10bfd0bf40bef0bfa0bf013c093c3d3c80003d3c093c153c153cd93bd93b153c153c"
        "00fe00fe7fffee00a30000fe00ff7f00a30000fe00feff00ff0000fe00fe"
    ),
    ("bfloat16", "int4-asymmetric"): (
        "00c0e8bfb0bfc03f80bf50bf98bf10bfd0bf40bef0bfa0bf093e123e493e8000493e123e1e3e1e3ee73de73d1e3e1e3e"
        "f0ef00af077000af000ff0ff00ff00f0"
    ),
}
LIMITS = (
    "6b76706f6f6c434c0100000001000000010000000200000001000000e80300008fc2f5285cff5840"
    "0000803f000020400000807f76513befa45d8551"
)


def layout_of(dtype: Dtype) -> KVLayout:
    """Two layers, one head, three tokens; keys of three, values of two channels: halves of int4 are odd."""
    return KVLayout(layers=2, kv_heads=1, head_size=3, dtype=dtype, block_tokens=3, value_head_size=2)


def payload(dtype: Dtype) -> Bytes:
    """Numbers that every dtype holds exactly, a negative zero and a constant channel among them."""
    numbers = [(at * 37 % 64 - 32) / 16 for at in range(30)]
    numbers[3] = -0.0
    numbers[15] = numbers[18] = numbers[21] = 1.5
    return payload_of(layout_of(dtype), np.array(numbers, np.float32))


@pytest.mark.parametrize(("dtype", "codec"), BLOCKS)
def test_an_encoded_block_has_these_bytes(dtype: str, codec: str) -> None:
    made_codec = made(layout_of(Dtype(dtype)), Codec(codec))
    assert encoded(made_codec, payload(Dtype(dtype))).tobytes().hex() == BLOCKS[dtype, codec]


@pytest.mark.parametrize(("dtype", "codec"), BLOCKS)
def test_these_bytes_are_decoded_to_numbers_within_a_step(dtype: str, codec: str) -> None:
    layout = layout_of(Dtype(dtype))
    back = values_of(
        layout, decoded(made(layout, Codec(codec)), np.frombuffer(bytearray.fromhex(BLOCKS[dtype, codec]), np.uint8))
    )
    step = 4 / 15 if codec == "int4-asymmetric" else 4 / 127
    assert np.abs(back - values_of(layout, payload(Dtype(dtype)))).max() <= 0.51 * step


def test_clip_limits_have_these_bytes() -> None:
    limits = ClipLimits(np.array([[[1, 2.5]]], np.float32), np.array([[[np.inf]]], np.float32), 1000, 99.99)
    assert limits.to_bytes().hex() == LIMITS


def test_numbers_are_never_given_to_another_codec() -> None:
    assert [(codec.value, number) for codec, number in NUMBERS.items()] == [
        ("none", 0), ("fp16", 1), ("int8-symmetric", 2), ("int8-asymmetric", 3), ("int4-asymmetric", 4)
    ]  # fmt: skip


def test_every_codec_of_every_dtype_has_a_block_here() -> None:
    codecs = [codec for codec in Codec if codec is not Codec.NONE]
    wanted = {(dtype, codec) for dtype in FLOATS for codec in codecs if codec is not Codec.FP16 or dtype == "float32"}
    assert set(BLOCKS) == wanted

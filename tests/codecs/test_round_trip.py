"""What comes back of an encoded payload."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs import codec_for, codec_of


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("codec", [Codec.INT8_SYMMETRIC, Codec.INT8_ASYMMETRIC])
def test_a_payload_comes_back_nearly_as_it_was(codec: Codec, granularity: Granularity) -> None:
    layout = KVLayout(layers=3, kv_heads=2, head_size=64, dtype=Dtype.FLOAT32)
    values = np.random.default_rng(1).standard_normal(layout.payload_bytes // 4, np.float32)
    made = codec_for(layout, codec, granularity)
    assert made is not None
    encoded, back = np.zeros(made.encoded_bytes, np.uint8), np.zeros_like(values)
    assert made.encode(values.view(np.uint8), encoded) is None
    codec_of(layout, made.number, made.params).decode(encoded, back.view(np.uint8))
    assert np.linalg.norm(back - values) <= 0.02 * np.linalg.norm(values)

"""Codecs on the device: encode and decode of one block, in bytes of the payload, beside a copy within its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvpool.api.codec import Codec
from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.rounds import beside
from kvpool.bench.row import Row, ratio_at_least
from kvpool.blocks.layout import Dtype, KVLayout

if TYPE_CHECKING:
    from torch import Tensor

    from kvpool.bench.gpu.machine import Machine

LAYERS = 32
REPEATS = 20
_DTYPES = (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16)
_GIB_PER_BYTE = 1 / (1 << 30)


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `device-codecs`."""
    try:
        from kvpool.bench.gpu.machine import Machine
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed") from None
    yield from measure(Machine.with_cuda(), conditions)


def measure(machine: Machine, conditions: Conditions) -> Iterator[Row]:
    """All rows, on any device."""
    from kvpool.codecs import codec_for

    for dtype in _DTYPES:
        layout = KVLayout(layers=conditions.scaled(LAYERS), kv_heads=8, head_size=128, dtype=dtype)
        payload, decoded = _payload(machine, layout), machine.device.allocate(layout.payload_bytes)
        repeats = conditions.scaled(REPEATS)
        nbytes = layout.payload_bytes * repeats

        def copy(payload: Tensor = payload, decoded: Tensor = decoded, repeats: int = repeats) -> None:
            for _ in range(repeats):
                decoded.copy_(payload)

        for codec in Codec:
            chosen = codec_for(layout, codec)
            if chosen is None:
                continue
            encoded = machine.device.allocate(chosen.encoded_bytes)
            if chosen.encode_tensor(payload, encoded) is not None:
                raise UnmeasurableError(f"{codec} refused plain normal values")

            def encode(chosen=chosen, payload=payload, encoded=encoded, repeats=repeats) -> None:  # type: ignore[no-untyped-def]
                for _ in range(repeats):
                    chosen.encode_tensor(payload, encoded)

            def decode(chosen=chosen, decoded=decoded, encoded=encoded, repeats=repeats) -> None:  # type: ignore[no-untyped-def]
                for _ in range(repeats):
                    chosen.decode_tensor(encoded, decoded)

            for name, work in (("encode", encode), ("decode", decode)):
                work()
                copy()
                figure = beside(machine.rate(work, nbytes), machine.rate(copy, nbytes), conditions.rounds)
                row = f"device-codecs.{name}.{codec}.{dtype}"
                yield Row(row, "GiB/s", figure.in_unit(_GIB_PER_BYTE), ratio_at_least(0.5))


def _payload(machine: Machine, layout: KVLayout) -> Tensor:
    """Normal values, with a few channels ten times as large, as keys have."""
    import torch

    dtype = getattr(torch, layout.dtype)
    numbers = layout.payload_bytes // layout.dtype.itemsize
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(numbers // layout.head_size, layout.head_size, generator=generator)
    values[:, :2] *= 10
    return values.to(dtype).view(torch.uint8).reshape(-1).to(machine.name)

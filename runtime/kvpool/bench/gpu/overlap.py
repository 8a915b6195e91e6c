"""Copies beside compute: a running matrix product, what it hides of them, and what they cost it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.row import Figure, Row
from kvpool.blocks.layout import PAGE_BYTES

if TYPE_CHECKING:
    from kvpool.bench.gpu.machine import Machine

SIDE = 8_192
PRODUCTS = 40
BLOCK_BYTES = 2 << 20
COPIED_BYTES = 512 << 20
_DEADLINE_S = 60.0
_MS = 1e3


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `overlap`."""
    try:
        from kvpool.bench.gpu.machine import Machine
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed") from None
    yield from measure(Machine.with_cuda(), conditions)


def measure(machine: Machine, conditions: Conditions) -> Iterator[Row]:
    """All rows, on any device."""
    import torch

    from kvpool.tiers.gpu.tier import GpuTier

    side = conditions.scaled(SIDE, least=64)
    dtype = torch.float16 if machine.is_cuda else torch.float32
    left = torch.ones((side, side), dtype=dtype, device=machine.name)
    product = torch.empty_like(left)
    blocks = conditions.scaled(COPIED_BYTES // BLOCK_BYTES, least=2)
    capacity_bytes = (BLOCK_BYTES + PAGE_BYTES) * (blocks + 1)
    arena = machine.device.allocate_staging(BLOCK_BYTES * blocks).view(blocks, BLOCK_BYTES)
    hosts = list(arena.numpy())

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, left, out=product)

    with closing(GpuTier(capacity_bytes, device=machine.device, extent_bytes=capacity_bytes, margin_bytes=0)) as tier:
        places = tier.allocate_many(BLOCK_BYTES + PAGE_BYTES, blocks, "bench")
        if len(places) < blocks:
            raise UnmeasurableError(f"the device has no {capacity_bytes >> 20} MiB to give")

        def finish(ended: bool) -> None:
            if not ended:
                raise UnmeasurableError(f"copies took more than {_DEADLINE_S:g} s")

        def copy_up() -> None:
            finish(tier.upload(places, hosts).wait(_DEADLINE_S))

        def copy_down() -> None:
            finish(tier.download(places, hosts).wait(_DEADLINE_S))

        def both_up() -> None:
            multiply()  # queued, not done: the upload does not wait for it
            copy_up()

        def both_down() -> None:
            transfer = tier.download(places, hosts)  # queued before: it waits for what was computed so far
            multiply()
            finish(transfer.wait(_DEADLINE_S))

        for way, copy, both in (("host-to-device", copy_up, both_up), ("device-to-host", copy_down, both_down)):
            copy()
            multiply()
            times = [
                (machine.timed(multiply), machine.timed(copy), machine.timed(both)) for _ in range(conditions.rounds)
            ]
            yield from _rows(way, times)


def _rows(way: str, times: list[tuple[float, float, float]]) -> Iterator[Row]:
    """Of (product alone, copies alone, both at once), in seconds.

    Hidden is the share of the shorter of the two that the other one covered: 100 % where both at once take as long as
    the longer one alone.
    """
    compute_s, copy_s, both_s = (median(column) for column in zip(*times, strict=True))
    slowdown = median(both / max(compute, copy) for compute, copy, both in times)
    hidden = median((compute + copy - both) / min(compute, copy) for compute, copy, both in times)
    yield Row(f"overlap.{way}.both", "ms", Figure(both_s * _MS, max(compute_s, copy_s) * _MS, slowdown))
    yield Row(f"overlap.{way}.product-alone", "ms", Figure(compute_s * _MS))
    yield Row(f"overlap.{way}.copies-alone", "ms", Figure(copy_s * _MS))
    yield Row(f"overlap.{way}.hidden", "%", Figure(100 * hidden))

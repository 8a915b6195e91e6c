"""Copies between host and device through the gpu tier, beside plain pinned copies of the same blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.rounds import beside
from kvpool.bench.row import Row, Target, ratio_at_least
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.extents import Bytes

if TYPE_CHECKING:
    from kvpool.bench.gpu.machine import Machine, PlainCopies
    from kvpool.tiers.gpu.tier import GpuTier

ARENA_BYTES = 256 << 20
"""So many bytes go at a time, in blocks."""
SIZES: tuple[tuple[int, str, Target | None], ...] = (
    (256 << 10, "256KiB", None),
    (1 << 20, "1MiB", ratio_at_least(0.9)),
    (2 << 20, "2MiB", ratio_at_least(0.9)),
    (8 << 20, "8MiB", ratio_at_least(0.9)),
)
STREAMS = (1, 2, 4, 8)
_DEADLINE_S = 60.0
_GIB_PER_BYTE = 1 / (1 << 30)


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `copies`."""
    try:
        from kvpool.bench.gpu.machine import Machine
    except ModuleNotFoundError as error:
        raise UnmeasurableError(f"{error.name} is not installed") from None
    yield from measure(Machine.with_cuda(), conditions)


def measure(machine: Machine, conditions: Conditions) -> Iterator[Row]:
    """All rows, on any device."""
    from kvpool.bench.gpu.machine import PlainCopies

    for block_bytes, name, target in SIZES:
        blocks = 2 * max(1, conditions.scaled(ARENA_BYTES) // block_bytes // 2)
        plain = PlainCopies(machine, block_bytes, blocks)
        with closing(_tier(machine, block_bytes, blocks, streams=8)) as tier:
            trips = _Trips(tier, [block.numpy() for block in plain.host])
            yield from _one_size(machine, plain, trips, name, target, conditions.rounds)
        if name == "2MiB":
            yield from _pageable(machine, plain, conditions.rounds)
            yield from _streams(machine, plain, conditions.rounds)


def _one_size(
    machine: Machine, plain: PlainCopies, trips: _Trips, name: str, target: Target | None, rounds: int
) -> Iterator[Row]:
    for way, ours, theirs in (
        ("host-to-device", trips.up, plain.up),
        ("device-to-host", trips.down, plain.down),
        ("both-ways", trips.half_each_way, plain.half_each_way),
    ):
        ours()  # once unmeasured: streams, events and pages are warm
        theirs()
        figure = beside(machine.rate(ours, trips.nbytes), machine.rate(theirs, trips.nbytes), rounds)
        yield Row(f"copies.{way}.{name}", "GiB/s", figure.in_unit(_GIB_PER_BYTE), target)


def _streams(machine: Machine, plain: PlainCopies, rounds: int) -> Iterator[Row]:
    """The same blocks on fewer streams, half of them up and half down at once."""
    hosts = [block.numpy() for block in plain.host]
    for streams in STREAMS:
        with closing(_tier(machine, hosts[0].nbytes, len(hosts), streams=streams)) as tier:
            trips = _Trips(tier, hosts)
            trips.half_each_way()
            ours, theirs = trips.half_each_way, plain.half_each_way
            figure = beside(machine.rate(ours, trips.nbytes), machine.rate(theirs, trips.nbytes), rounds)
            yield Row(f"copies.both-ways-by-streams.{streams}", "GiB/s", figure.in_unit(_GIB_PER_BYTE))


def _pageable(machine: Machine, plain: PlainCopies, rounds: int) -> Iterator[Row]:
    """Memory that is not page-locked, through staging buffers, beside page-locked memory."""
    hosts = [block.numpy().copy() for block in plain.host]
    with closing(_tier(machine, hosts[0].nbytes, len(hosts), streams=8)) as tier:
        trips = _Trips(tier, hosts)
        for way, ours, theirs in (("host-to-device", trips.up, plain.up), ("device-to-host", trips.down, plain.down)):
            ours()
            figure = beside(machine.rate(ours, trips.nbytes), machine.rate(theirs, trips.nbytes), rounds)
            yield Row(f"copies.pageable.{way}.2MiB", "GiB/s", figure.in_unit(_GIB_PER_BYTE))


def _tier(machine: Machine, block_bytes: int, blocks: int, *, streams: int) -> GpuTier:
    from kvpool.tiers.gpu.tier import GpuTier

    capacity_bytes = (block_bytes + PAGE_BYTES) * (blocks + 1)
    return GpuTier(capacity_bytes, device=machine.device, streams=streams, extent_bytes=capacity_bytes, margin_bytes=0)


class _Trips:
    """Blocks of host memory, and a place in the tier for each."""

    def __init__(self, tier: GpuTier, hosts: Sequence[Bytes]) -> None:
        self._tier = tier
        self._hosts = hosts
        self._places = tier.allocate_many(hosts[0].nbytes + PAGE_BYTES, len(hosts), "bench")
        self.nbytes = sum(host.nbytes for host in hosts)
        if len(self._places) < len(hosts):
            raise UnmeasurableError(f"the device has no {self.nbytes >> 20} MiB to give")

    def up(self) -> None:
        """All blocks, host to device."""
        _finish(self._tier.upload(self._places, self._hosts).wait(_DEADLINE_S))

    def down(self) -> None:
        """All blocks, device to host."""
        _finish(self._tier.download(self._places, self._hosts).wait(_DEADLINE_S))

    def half_each_way(self) -> None:
        """The first half up and the second half down, at once."""
        half = len(self._hosts) // 2
        up = self._tier.upload(self._places[:half], self._hosts[:half])
        down = self._tier.download(self._places[half:], self._hosts[half:])
        _finish(up.wait(_DEADLINE_S) and down.wait(_DEADLINE_S))


def _finish(ended: bool) -> None:
    if not ended:
        raise UnmeasurableError(f"copies took more than {_DEADLINE_S:g} s")

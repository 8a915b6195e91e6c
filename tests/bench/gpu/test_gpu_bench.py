"""`kvpool bench gpu` runs everywhere: what needs CUDA says so, and all of it is tried out on host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvpool.bench.area import Conditions, benchmarks_of
from kvpool.bench.gpu import codecs, copies, first_token, overlap, slots
from kvpool.bench.gpu.machine import Machine
from kvpool.bench.row import Row
from kvpool.tiers.gpu.cpu import CpuDevice
from tests.cli.command import kvpool

NEED_CUDA = ["copies", "overlap", "device-codecs", "first-token"]


@pytest.fixture
def conditions(tmp_path: Path) -> Conditions:
    return Conditions(directory=tmp_path, scale=0.01, rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_each_benchmark_that_needs_it_is_a_row_with_the_reason(tmp_path: Path) -> None:
    ended = kvpool("bench", "gpu", "--quick", "--directory", tmp_path, "--json")
    assert ended.code == 0
    assert [row["name"] for row in ended.objects if row["value"] is None] == NEED_CUDA
    assert all("CUDA" in line for line in ended.err.splitlines())
    assert [benchmark.name for benchmark in benchmarks_of("gpu")] == ["slots", *NEED_CUDA]


def test_slots_are_measured_on_any_machine(conditions: Conditions) -> None:
    rows = {row.name: row for row in slots.run(conditions)}
    assert rows.keys() == {"slots.hit-found", "slots.handed-out-and-taken-back", "slots.reused", "slots.cleared"}
    reused = rows["slots.reused"].figure
    assert reused is not None
    assert 0 < reused.value <= 100


@pytest.mark.parametrize(
    ("measure", "names"),
    [
        (copies.measure, {f"copies.both-ways.{size}" for size in ("256KiB", "1MiB", "2MiB", "8MiB")}),
        (copies.measure, {"copies.pageable.host-to-device.2MiB", "copies.both-ways-by-streams.8"}),
        (overlap.measure, {"overlap.host-to-device.hidden", "overlap.device-to-host.both"}),
        (codecs.measure, {"device-codecs.decode.int8-symmetric.bfloat16", "device-codecs.encode.fp16.float32"}),
    ],
)
def test_what_is_measured_on_cuda_runs_on_host_memory_too(
    measure: Callable[[Machine, Conditions], Iterator[Row]], names: set[str], conditions: Conditions
) -> None:
    rows = list(measure(Machine(CpuDevice()), conditions))
    assert names <= {row.name for row in rows}
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.figure is not None for row in rows)


def test_a_repeated_prompt_gives_the_same_token_from_the_tier_as_from_memory(conditions: Conditions) -> None:
    model = first_token.random_llama(first_token.Shape(layers=2, hidden=64, heads=4, kv_heads=2))
    rows = list(first_token.measure(Machine(CpuDevice()), "tiny", model, conditions))
    assert [row.name for row in rows] == [
        "first-token.tiny.again", "first-token.tiny.cold", "first-token.tiny.sooner-than-cold"
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("benchmark", benchmarks_of("gpu"), ids=lambda benchmark: str(benchmark.name))
def test_every_benchmark_runs_on_cuda(benchmark: object, conditions: Conditions) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    [found] = [each for each in benchmarks_of("gpu") if each is benchmark]
    assert all(row.figure is not None for row in found.run(conditions))

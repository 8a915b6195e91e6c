"""The ram tier through the public face: storing and copying out, beside one thread's memcpy of the same blocks."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle

from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import KIB, MIB, EngineMemory, InPlace, OpenModel, Prompts, open_model, pool_config
from kvpool.bench.probes import Memcpy
from kvpool.bench.rounds import beside, bytes_per_second, seconds_per_call
from kvpool.bench.row import Row, Target, ratio_at_least, ratio_at_most
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model

RAM_BYTES = 512 * MIB
PROMPT_BYTES = 64 * MIB
"""What is stored or loaded at once: with blocks of 2 MiB, a prompt of 2,000 tokens."""
ARENA_PROMPTS = 2
"""So many prompts' blocks are copied by turns, on both sides: more than a last-level cache holds."""
MORE_ROUNDS = 5
_GIB_PER_BYTE = 1 / (1 << 30)
_US = 1e6
_SIZES: tuple[tuple[int, str, Target], ...] = (
    (256 * KIB, "256KiB", ratio_at_least(0.6)),
    (2 * MIB, "2MiB", ratio_at_least(0.9)),
    (8 * MIB, "8MiB", ratio_at_least(0.9)),
)


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `ram`."""
    for payload_bytes, name, target in _SIZES:
        config = pool_config(ram_bytes=conditions.scaled(RAM_BYTES, least=8 * payload_bytes))
        opened = open_model(config, conditions.directory / name, payload_bytes)
        with opened.pool:
            yield from _rows(opened, payload_bytes, name, target, conditions)


def _rows(opened: OpenModel, payload_bytes: int, name: str, target: Target, conditions: Conditions) -> Iterator[Row]:
    rounds = MORE_ROUNDS * conditions.rounds
    blocks = conditions.scaled(PROMPT_BYTES // payload_bytes, least=2)
    nbytes = payload_bytes * blocks
    arena_blocks = blocks * ARENA_PROMPTS
    memory, memcpy = EngineMemory(payload_bytes, arena_blocks), Memcpy(payload_bytes, arena_blocks)
    copying = bytes_per_second(lambda: memcpy.copy_some(blocks), nbytes)
    model, prompts = opened.model, Prompts()

    def store() -> None:
        model.store(prompts.next(blocks), memory)

    for _ in range(2 + opened.pool.config.ram.capacity_bytes // nbytes):
        store()  # until the tier is full, and every page of it warm
    figure = beside(bytes_per_second(store, nbytes), copying, rounds)
    yield Row(f"ram.store.{name}", "GiB/s", figure.in_unit(_GIB_PER_BYTE), target)
    with ExitStack() as leases:
        held = cycle([leases.enter_context(_stored(model, prompts.next(blocks), memory)) for _ in range(ARENA_PROMPTS)])
        figure = beside(bytes_per_second(lambda: next(held).load(memory), nbytes), copying, rounds)
        yield Row(f"ram.copy-out.{name}", "GiB/s", figure.in_unit(_GIB_PER_BYTE), target)
        look = seconds_per_call(lambda: next(held).load(InPlace()), 1)
        copy = seconds_per_call(lambda: memcpy.copy_some(blocks), 1)
        figure = beside(look, copy, rounds).in_unit(_US / blocks)
        yield Row(f"ram.read-in-place.{name}", "us/block", figure, ratio_at_most(0.1) if payload_bytes >= MIB else None)


def _stored(model: Model, prompt: bytes, memory: EngineMemory) -> Lease:
    model.store(prompt, memory)
    return model.match(prompt)

"""Opening a pool whose directory holds 100,000 blocks: records are found again, and the tree is built from them."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.engine.pools import GIB, KIB, MIB, EngineMemory, Prompts, open_model, pool_config
from kvpool.bench.row import Figure, Row, at_most
from kvpool.config import RuntimeConfig
from kvpool.pool.pool import Pool

RECORDS = 100_000
PAYLOAD_BYTES = 4 * KIB
PROMPT_BLOCKS = 50


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `startup`."""
    prompts = conditions.scaled(RECORDS // PROMPT_BLOCKS)
    config = pool_config(ram_bytes=64 * MIB, ssd_bytes=conditions.scaled(GIB, least=64 * MIB))
    directory = conditions.directory / "pool"
    _fill(config, directory, prompts)
    opened = [_open(config, directory) for _ in range(min(conditions.rounds, 5))]
    blocks = min(restored for _, restored in opened)
    if blocks < prompts * PROMPT_BLOCKS * 0.99:
        raise UnmeasurableError(f"only {blocks} of {prompts * PROMPT_BLOCKS} blocks were found again")
    seconds = median(seconds for seconds, _ in opened)
    yield Row("startup.seconds", "s", Figure(seconds), at_most(2))
    yield Row("startup.restored", "blocks/s", Figure(blocks / seconds))


def _fill(config: RuntimeConfig, directory: Path, prompts: int) -> None:
    pool, model = open_model(config, directory, PAYLOAD_BYTES)
    memory, tokens = EngineMemory(PAYLOAD_BYTES, PROMPT_BLOCKS), Prompts()
    with pool:
        for number in range(prompts):
            model.store(tokens.next(PROMPT_BLOCKS), memory)
            if number % 64 == 63:
                pool.flush(60)


def _open(config: RuntimeConfig, directory: Path) -> tuple[float, int]:
    """Seconds until the pool is open, and how many blocks it then has."""
    began_s = perf_counter()
    pool = Pool.open(config, directory=directory)
    seconds = perf_counter() - began_s
    with pool:
        return seconds, pool.stats().restored.blocks

"""The process around a pool: its memory beyond what is configured, and what it does when nobody asks anything.

Both are measured in a process of their own, which imports neither torch nor the bench's other parts' arenas.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import process_time, sleep
from typing import NamedTuple

from kvpool.bench.area import Conditions, UnmeasurableError
from kvpool.bench.engine.pools import GIB, KIB, MIB, EngineMemory, OpenModel, Prompts, open_model, pool_config
from kvpool.bench.row import Figure, Row, at_most

RAM_BYTES = 512 * MIB
SSD_BYTES = GIB
PAYLOAD_BYTES = 256 * KIB
PROMPT_BLOCKS = 32
IDLE_S = 10.0
_TIMEOUT_S = 300


class Measured(NamedTuple):
    """What the process says of itself. `peak_bytes` and `index_bytes` when it was full and had read from ssd."""

    peak_bytes: int
    index_bytes: int
    arena_bytes: int
    ram_bytes: int
    idle_share: float


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `process`."""
    measured = _in_a_process(conditions.directory, conditions.scale)
    configured = measured.ram_bytes + measured.index_bytes + measured.arena_bytes
    over = (measured.peak_bytes - configured) / MIB
    yield Row("process.memory-over-capacities", "MiB", Figure(over), at_most(150))
    yield Row("process.idle-cpu", "%", Figure(100 * measured.idle_share), at_most(0.5))


def measure(directory: Path, scale: float) -> Measured:
    """Fill a pool well beyond its capacities, read some of it back, then leave it alone."""
    ram_bytes = max(int(RAM_BYTES * scale), 16 * MIB)
    config = pool_config(ram_bytes=ram_bytes, ssd_bytes=max(int(SSD_BYTES * scale), 64 * MIB))
    opened = open_model(config, directory, PAYLOAD_BYTES)
    with opened.pool:
        arena_bytes = _use(opened, 4 * ram_bytes // (PROMPT_BLOCKS * PAYLOAD_BYTES))
        peak_bytes, index_bytes = _status_bytes("VmHWM"), opened.pool.stats().index.bytes
        began_s = process_time()
        sleep(IDLE_S * min(scale, 1))
        idle_share = (process_time() - began_s) / (IDLE_S * min(scale, 1))
    return Measured(peak_bytes, index_bytes, arena_bytes, ram_bytes, idle_share)


def _use(opened: OpenModel, prompts: int) -> int:
    """Store and load; returns what the memory that stands for an engine's takes."""
    memory, tokens = EngineMemory(PAYLOAD_BYTES, PROMPT_BLOCKS), Prompts()
    stored = [tokens.next(PROMPT_BLOCKS) for _ in range(prompts)]
    for prompt in stored:
        opened.model.store(prompt, memory)
    opened.pool.flush(60)
    for prompt in stored[:: max(1, prompts // 16)]:
        with opened.model.match(prompt) as lease:
            lease.load(memory)
    return PAYLOAD_BYTES * PROMPT_BLOCKS


def _status_bytes(field: str) -> int:
    """A size from this process's status, as the kernel gives it in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * KIB


def _in_a_process(directory: Path, scale: float) -> Measured:
    command = [sys.executable, "-m", __name__, str(directory / "pool"), str(scale)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    if ended.returncode:
        raise UnmeasurableError(f"the measured process failed: {ended.stderr.strip().splitlines()[-1:]}")
    return Measured(**json.loads(ended.stdout))


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), float(sys.argv[2]))._asdict()))

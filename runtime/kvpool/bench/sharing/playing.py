"""Plays requests through a pool as an engine would: match, load, store what is new; and what that came to."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvpool.bench.engine.pools import BLOCK_TOKENS, KIB, MIB, EngineMemory, InPlace, layout_of
from kvpool.bench.sharing.workloads import Request
from kvpool.blocks.identity import ModelIdentity
from kvpool.config import RamConfig, RuntimeConfig, SharingConfig
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec

PAYLOAD_BYTES = 4 * KIB
RECORD_BYTES = 8 * KIB
"""Blocks are small, so that a run takes seconds: shares do not depend on it."""
PREFILL_TOKENS_PER_SECOND = 8_000.0
"""What is assumed to turn tokens into time: an 8B model on one GPU."""
SHARED_SHARE = 0.5
"""How much of ram shared prefixes may take before they are evicted like all others."""


@dataclass(slots=True)
class Played:
    """Sums over requests, in whole blocks."""

    requests: int = 0
    asked: int = 0
    matched: int = 0
    common_matched: int = 0
    """Matched blocks of what requests have in common, by how they were made: known with sharing switched off too."""

    def add(self, request: Request, matched: int) -> None:
        """Count one request."""
        self.requests += 1
        self.asked += len(request.prompt) // (4 * BLOCK_TOKENS)
        self.matched += matched
        self.common_matched += min(matched, request.common_tokens // BLOCK_TOKENS)


@contextmanager
def small_pool(directory: Path, ram_blocks: int, *, sharing: bool) -> Iterator[Pool]:
    """A pool of ram alone with room for so many blocks; `sharing` is `spec.sharing.enabled`."""
    ram_bytes = ram_blocks * RECORD_BYTES
    config = RuntimeConfig(
        name="bench",
        ram=RamConfig(capacity_bytes=ram_bytes, index_bytes=256 * MIB),
        sharing=SharingConfig(enabled=sharing, max_shared_bytes=int(ram_bytes * SHARED_SHARE)),
    )
    with Pool.open(config, directory=directory) as pool:
        yield pool


def registered(pool: Pool, name: str = "bench") -> Model:
    """A model with small blocks."""
    identity = ModelIdentity(name=name, weights="none", layout=layout_of(PAYLOAD_BYTES))
    return pool.register(ModelSpec(identity=identity, prefill_tokens_per_second=PREFILL_TOKENS_PER_SECOND))


def play(model: Model, requests: Iterable[Request]) -> Played:
    """Play these requests, one after the other."""
    played = Played()
    memory, sink = EngineMemory(PAYLOAD_BYTES, 64), InPlace()
    for request in requests:
        with model.match(request.prompt) as lease:
            played.add(request, lease.blocks)
            lease.load(sink)
            model.store(request.prompt + request.answer, memory)
    return played

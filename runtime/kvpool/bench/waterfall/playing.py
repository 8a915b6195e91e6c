"""Plays chats as an engine would: match, wait, load, store what is new. What that came to, by tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from kvpool.bench.area import UnmeasurableError
from kvpool.bench.engine.pools import BLOCK_TOKENS, OpenModel
from kvpool.bench.sharing.workloads import Request
from kvpool.bench.waterfall.memory import EngineNumbers
from kvpool.bench.waterfall.nodes import BUDGET_S, vacuum
from kvpool.tiers.tier import TierName

FLUSH_S = 120.0
VACUUMS_PER_CAPACITY = 4


@dataclass(slots=True)
class Played:
    """Sums over requests, in whole blocks."""

    asked: int = 0
    served: Counter[TierName] = field(default_factory=Counter)
    loading_s: float = 0.0
    """From match to loaded."""
    stored: int = 0
    storing_s: float = 0.0
    """Until it was in every tier that takes it."""

    @property
    def hits(self) -> float:
        """Percent of the blocks asked for."""
        return self.share(*self.served)

    def share(self, *tiers: TierName) -> float:
        """Percent of the blocks asked for that came from these tiers."""
        return 100 * sum(self.served[tier] for tier in tiers) / max(self.asked, 1)

    @property
    def seconds_per_served_block(self) -> float:
        """From match to loaded, over all blocks that came: weighted by where they came from."""
        return self.loading_s / max(self.served.total(), 1)

    def seconds_per_asked_block(self, prefill_tokens_per_second: float) -> float:
        """The same with what did not come, which an engine of this speed computes."""
        computed_s = (self.asked - self.served.total()) * BLOCK_TOKENS / prefill_tokens_per_second
        return (self.loading_s + computed_s) / max(self.asked, 1)

    @property
    def stored_tokens_per_second(self) -> float:
        """Of what was new, down to the last tier."""
        return self.stored * BLOCK_TOKENS / max(self.storing_s, 1e-9)


def play(opened: OpenModel, requests: Sequence[Request], memory: EngineNumbers) -> Played:
    """Play these requests, one after the other.

    Each waits for what the one before it has stored, as if its prefill had taken that long: so what is hit depends on
    the tiers' sizes, and not on how busy the machine is.
    """
    pool, model = opened
    played = Played()
    database, since_vacuum_bytes = pool.config.database, 0
    for request in requests:
        began_s = perf_counter()
        with model.match(request.prompt) as lease:
            lease.wait(BUDGET_S)
            lease.load(memory)
            played.loading_s += perf_counter() - began_s
            played.asked += len(request.prompt) // (4 * BLOCK_TOKENS)
            played.served.update(lease.served)
        began_s = perf_counter()
        stored = model.store(request.prompt + request.answer, memory).stored
        if not pool.flush(FLUSH_S):
            raise UnmeasurableError("what is stored does not come down in time")
        played.storing_s += perf_counter() - began_s
        played.stored += stored
        since_vacuum_bytes += stored * model.layout.record_bytes
        if database is not None and since_vacuum_bytes > database.inline_bytes // VACUUMS_PER_CAPACITY:
            vacuum(pool)
            since_vacuum_bytes = 0
    return played

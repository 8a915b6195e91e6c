"""A workload in a ram that holds a part of it, with sharing on; the same with sharing off stands beside it."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvpool.bench.area import Conditions
from kvpool.bench.engine.pools import BLOCK_TOKENS
from kvpool.bench.row import Figure, Row, Target, at_least
from kvpool.bench.sharing.playing import PREFILL_TOKENS_PER_SECOND, Played, play, registered, small_pool
from kvpool.bench.sharing.workloads import Request, agent, chatbot, distinct_blocks, varied
from kvpool.pool.stats import PoolStats

REQUESTS = 6_000
RAM_SHARES = (0.02, 0.05, 0.20)
"""How much of the working set ram holds."""
LEAST_BLOCKS = 256
"""So that a quick run has room for a prompt."""


class Run(NamedTuple):
    """One play, and the pool's own counters after it."""

    played: Played
    stats: PoolStats

    @property
    def hits(self) -> float:
        """Percent of the blocks asked for."""
        return self._percent(self.played.matched)

    @property
    def common_hits(self) -> float:
        """The same, of what requests have in common by construction."""
        return self._percent(self.played.common_matched)

    @property
    def shared_hits(self) -> float:
        """The same, as the pool counts it: what it knows to be shared."""
        return self._percent(self.stats.shared_hit_blocks)

    @property
    def bytes_saved(self) -> float:
        """Percent of the bytes that requests would have stored, had each kept its own."""
        stats = self.stats
        return 100 * stats.already_there_bytes / max(stats.already_there_bytes + stats.stored_bytes, 1)

    @property
    def prefill_saved(self) -> float:
        """Percent of the time that all whole blocks of all prompts take to compute."""
        seconds = self.played.asked * BLOCK_TOKENS / PREFILL_TOKENS_PER_SECOND
        return 100 * self.stats.saved_prefill_seconds / max(seconds, 1e-9)

    def _percent(self, blocks: int) -> float:
        return 100 * blocks / max(self.played.asked, 1)


def run_chatbot(conditions: Conditions) -> Iterator[Row]:
    """Rows of `chatbot`."""
    targets = {"shared-hits": at_least(50), "prefill-saved": at_least(30)}
    yield from _rows("chatbot", chatbot, conditions, targets)


def run_agent(conditions: Conditions) -> Iterator[Row]:
    """Rows of `agent`."""
    yield from _rows("agent", agent, conditions, {"prefill-saved": at_least(30)})


def run_varied(conditions: Conditions) -> Iterator[Row]:
    """Rows of `varied`."""
    yield from _rows("varied", varied, conditions, {})


def _rows(
    name: str, make: Callable[[int], Iterator[Request]], conditions: Conditions, targets: dict[str, Target]
) -> Iterator[Row]:
    requests = list(make(conditions.scaled(REQUESTS, least=50)))
    working_set = distinct_blocks(requests, BLOCK_TOKENS)
    yield Row(f"{name}.working-set", "blocks", Figure(working_set))
    for share in RAM_SHARES:
        blocks = max(LEAST_BLOCKS, int(working_set * share))
        on, off = (_run(conditions, requests, blocks, sharing=sharing) for sharing in (True, False))
        at = f"ram-{share:.0%}"
        for figure, value, beside in (
            ("hits", on.hits, off.hits),
            ("common-hits", on.common_hits, off.common_hits),
            ("bytes-saved", on.bytes_saved, off.bytes_saved),
            ("prefill-saved", on.prefill_saved, off.prefill_saved),
        ):
            found = Figure(value, beside, value / max(beside, 1e-9))
            yield Row(f"{name}.{figure}.{at}", "%", found, targets.get(figure))
        yield Row(f"{name}.shared-hits.{at}", "%", Figure(on.shared_hits), targets.get("shared-hits"))


def _run(conditions: Conditions, requests: Sequence[Request], blocks: int, *, sharing: bool) -> Run:
    with conditions.place("pool") as place, small_pool(place / "pool", blocks, sharing=sharing) as pool:
        played = play(registered(pool), requests)
        return Run(played, pool.stats())

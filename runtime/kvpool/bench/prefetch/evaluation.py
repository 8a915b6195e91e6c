"""What each predictor brings, with the same memory and the same budget of bytes for all."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from kvpool.bench.area import Conditions
from kvpool.bench.engine.traces import trace_of
from kvpool.bench.prefetch.playing import play
from kvpool.bench.prefetch.predictors import Predictor, followed, frequent, nearest, similar
from kvpool.bench.prefetch.requests import Asked, asked_of_trace, asked_of_workload, distinct, stages
from kvpool.bench.row import Figure, Row, at_least
from kvpool.bench.sharing.workloads import Request, agent, chatbot, varied
from kvpool.catalog.embedding import HashedNgrams

REQUESTS = 4_000
RAM_SHARES = (0.05, 0.20)
"""How much of all blocks RAM holds."""
PREFETCH_SHARE = 0.25
"""How much of RAM may hold what was prefetched and not asked for yet."""
BLOCKS_AT_ONCE = 16
LEAST_BLOCKS = 64
"""So that a quick run has room for a prompt."""


def run_trace(conditions: Conditions) -> Iterator[Row]:
    """Rows of `trace`."""
    yield from _rows("trace", asked_of_trace(trace_of(conditions)))


def workload(name: str, make: Callable[[int], Iterable[Request]]) -> Callable[[Conditions], Iterator[Row]]:
    """Rows of a generated workload."""

    def run(conditions: Conditions) -> Iterator[Row]:
        yield from _rows(name, asked_of_workload(make(conditions.scaled(REQUESTS, least=50))))

    return run


run_chatbot, run_agent = workload("chatbot", chatbot), workload("agent", agent)
run_varied, run_stages = workload("varied", varied), workload("stages", stages)


def _rows(name: str, asked: Sequence[Asked]) -> Iterator[Row]:
    neighbours = nearest(asked, HashedNgrams())
    blocks = distinct(asked)
    for share in RAM_SHARES:
        capacity = max(LEAST_BLOCKS, int(blocks * share))
        at = f"ram-{share:.0%}"
        without = play(asked, capacity_blocks=capacity)
        yield Row(f"{name}.hits.none.{at}", "%", Figure(without.hit_percent))
        predictors: dict[str, Predictor] = {
            "frequent": frequent(asked),
            "similar": similar(asked, neighbours),
            "followed": followed(asked, neighbours),
        }
        gains: dict[str, float] = {}
        for kind, predictor in predictors.items():
            played = play(
                asked,
                capacity_blocks=capacity,
                prefetch_blocks=int(capacity * PREFETCH_SHARE),
                predictor=predictor,
                blocks_at_once=BLOCKS_AT_ONCE,
            )
            gains[kind] = played.hit_percent - without.hit_percent
            yield Row(f"{name}.precision.{kind}.{at}", "%", Figure(played.precision_percent))
            yield Row(f"{name}.recall.{kind}.{at}", "%", Figure(played.recall_percent))
            yield Row(f"{name}.gain.{kind}.{at}", "points", Figure(gains[kind]))
        lead = max(gains["similar"], gains["followed"]) - max(gains["frequent"], 0.0)
        yield Row(f"{name}.lead.{at}", "points", Figure(lead), at_least(0))

"""Many shared prefixes of several models at once, each on a thread of its own, and scans among their requests."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter
from typing import NamedTuple

from kvpool.bench.area import Conditions
from kvpool.bench.row import Figure, Row, at_least
from kvpool.bench.sharing.playing import Played, play, registered, small_pool
from kvpool.bench.sharing.workloads import Request, Text
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool

MODELS = 5
PREFIXES = 2_000
"""Of each model: 10,000 in all."""
PREFIX_TOKENS = 192
REQUESTS = 6_000
"""Of each model, after each of its prefixes was asked for twice."""
SCAN_EVERY = 10
SCAN_TOKENS = 6_400
RAM_BLOCKS_PER_PREFIX = 6
"""Twice what the prefixes take: shared prefixes may have half."""
LEAST_BLOCKS = 2_048
TOP = 10


class Crowd(NamedTuple):
    """One play: what each model's requests came to, and what was held afterwards."""

    models: Sequence[Played]
    shared_prefixes: int
    match_us: float
    top_ms: float
    used_most: int
    """Requests that the most used shared prefix served."""


def run(conditions: Conditions) -> Iterator[Row]:
    """Rows of `crowd`."""
    prefixes = conditions.scaled(PREFIXES, least=10)
    requests = conditions.scaled(REQUESTS, least=50)
    on, off = (_crowd(conditions, prefixes, requests, sharing=sharing) for sharing in (True, False))
    yield Row("crowd.shared-prefixes", "held", Figure(on.shared_prefixes), at_least(MODELS * prefixes))
    yield _beside("crowd.hits", _percent(on.models), _percent(off.models))
    least_on, least_off = (min(_percent([one]) for one in crowd.models) for crowd in (on, off))
    yield _beside("crowd.hits.least-of-5-models", least_on, least_off)
    yield _beside("crowd.common-hits", _common(on.models), _common(off.models))
    yield Row("crowd.match", "us", Figure(on.match_us, off.match_us, on.match_us / off.match_us))
    yield Row("crowd.top-10-shared", "ms", Figure(on.top_ms))
    yield Row("crowd.used-most", "requests", Figure(on.used_most))


def _crowd(conditions: Conditions, prefixes: int, requests: int, *, sharing: bool) -> Crowd:
    blocks = max(LEAST_BLOCKS, MODELS * prefixes * RAM_BLOCKS_PER_PREFIX)
    with conditions.place("pool") as place, small_pool(place / "pool", blocks, sharing=sharing) as pool:
        models = [registered(pool, f"model-{number}") for number in range(MODELS)]
        with ThreadPoolExecutor(MODELS) as threads:
            list(threads.map(lambda one: play(one[1], _first(one[0], prefixes)), enumerate(models)))
            played = list(threads.map(lambda one: play(one[1], _later(one[0], prefixes, requests)), enumerate(models)))
        return Crowd(played, *_held(pool, models[0], prefixes))


def _held(pool: Pool, model: Model, prefixes: int) -> tuple[int, float, float, int]:
    began_s = perf_counter()
    top = pool.shared_prefixes(TOP)
    top_ms = 1e3 * (perf_counter() - began_s)
    timed = []
    for prompt in _prefixes(0, prefixes)[:200]:
        began_s = perf_counter()
        model.match(prompt).close()
        timed.append(1e6 * (perf_counter() - began_s))
    held = len(pool.shared_prefixes(2 * MODELS * prefixes))
    return held, median(timed), top_ms, top[0].hits if top else 0


def _prefixes(model: int, count: int) -> list[bytes]:
    text = Text(100 + model)
    return [text.of(PREFIX_TOKENS, PREFIX_TOKENS) for _ in range(count)]


def _first(model: int, count: int) -> Iterator[Request]:
    """Each prefix twice, so that requests part after it."""
    text = Text(200 + model)
    for _ in range(2):
        for prefix in _prefixes(model, count):
            yield Request(prefix + text.of(64, 64), b"", PREFIX_TOKENS)


def _later(model: int, count: int, requests: int) -> Iterator[Request]:
    """Prefixes at random, all as likely, each with a question of its own; every tenth time a long one-off prompt."""
    text = Text(300 + model)
    prefixes = _prefixes(model, count)
    for number in range(requests):
        if number % SCAN_EVERY == SCAN_EVERY - 1:
            yield Request(text.of(SCAN_TOKENS, SCAN_TOKENS), b"", 0)
        else:
            yield Request(text.rng.choice(prefixes) + text.of(64, 128), text.of(64, 128), PREFIX_TOKENS)


def _percent(played: Sequence[Played]) -> float:
    return 100 * sum(one.matched for one in played) / max(sum(one.asked for one in played), 1)


def _common(played: Sequence[Played]) -> float:
    """Of the common blocks asked for, how many were there; scans have none."""
    wanted = sum((one.requests - one.requests // SCAN_EVERY) * (PREFIX_TOKENS // 64) for one in played)
    return 100 * sum(one.common_matched for one in played) / max(wanted, 1)


def _beside(name: str, on: float, off: float) -> Row:
    return Row(name, "%", Figure(on, off, on / max(off, 1e-9)))

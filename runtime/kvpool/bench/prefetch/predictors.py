"""Decide what to prefetch, from the requests up to now. Each predictor is a pure function of the stream.

`frequent` knows nothing but how often blocks were asked for lately. The two others know past prompts that are like the
current one: what those had, and what was asked for after them. The search for them is exact here, so that no index is
to blame for what it brings.
"""

from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np

from kvpool.bench.prefetch.requests import Asked
from kvpool.catalog.embedding import PromptEncoder
from kvpool.catalog.vectors.votes import LEAST_SUPPORT, ranked

K = 10
"""Similar prompts that are looked at."""
FOLLOWERS = 5
"""Requests after each of them."""
LEAST_SCORE = 0.05
WINDOW_REQUESTS = 2_000
_RANKED_EVERY = 50

Predictor: TypeAlias = Callable[[int, Container[int], int], list[int]]
"""After request number ..., with this in RAM: at most so many blocks to prefetch, the likeliest first."""


class Neighbour(NamedTuple):
    """A past request whose prompt is like the current one's."""

    number: int
    score: float


Neighbours: TypeAlias = Sequence[Sequence[Neighbour]]
"""For each request, those before it that are most like it, best first."""


def nearest(asked: Sequence[Asked], encoder: PromptEncoder) -> Neighbours:
    """Compare every prompt with all before it."""
    vectors = np.stack([encoder.encode(request.tokens) for request in asked])
    return [_nearest_of(vectors[:number] @ vectors[number]) for number in range(len(asked))]


def frequent(asked: Sequence[Asked]) -> Predictor:
    """The blocks that were asked for most often in the last 2,000 requests."""
    counts: Counter[int] = Counter()
    window: deque[Asked] = deque()
    order: list[int] = []

    def predict(number: int, held: Container[int], most: int) -> list[int]:
        nonlocal order
        window.append(asked[number])
        counts.update(asked[number].blocks)
        if len(window) > WINDOW_REQUESTS:
            counts.subtract(window.popleft().blocks)
        if number % _RANKED_EVERY == 0:
            order = [block for block, times in counts.most_common() if times >= LEAST_SUPPORT]
        return list(islice((block for block in order if block not in held), most))

    return predict


def similar(asked: Sequence[Asked], neighbours: Neighbours) -> Predictor:
    """The blocks of similar past prompts themselves."""
    return _voted(lambda number, neighbour: iter([asked[neighbour.number]]), neighbours)


def followed(asked: Sequence[Asked], neighbours: Neighbours) -> Predictor:
    """The blocks of what was asked for after similar past prompts."""

    def after(number: int, neighbour: Neighbour) -> Iterator[Asked]:
        return iter(asked[neighbour.number + 1 : min(neighbour.number + 1 + FOLLOWERS, number + 1)])

    return _voted(after, neighbours)


def _voted(requests: Callable[[int, Neighbour], Iterator[Asked]], neighbours: Neighbours) -> Predictor:
    def predict(number: int, held: Container[int], most: int) -> list[int]:
        voices = (
            (neighbour.score, (block for request in requests(number, neighbour) for block in request.blocks))
            for neighbour in neighbours[number]
        )
        return [block for block in ranked(voices) if block not in held][:most]

    return predict


def _nearest_of(scores: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> list[Neighbour]:
    if not len(scores):
        return []
    best = np.argsort(-scores, kind="stable")[:K] if len(scores) <= K else np.argpartition(-scores, K)[:K]
    found = [Neighbour(int(number), float(scores[number])) for number in best if scores[number] >= LEAST_SCORE]
    return sorted(found, key=lambda neighbour: (-neighbour.score, neighbour.number))

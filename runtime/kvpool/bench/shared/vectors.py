"""Prompts as vectors: how long they take to encode, and how quickly and how well similar ones are found."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvpool.bench.area import Benchmark, Conditions, UnmeasurableError
from kvpool.bench.rounds import alone, percentile, seconds_per_call
from kvpool.bench.row import Figure, Row, at_least, at_most
from kvpool.bench.sharing.workloads import Text, chatbot
from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding import DIMENSIONS, HashedNgrams
from kvpool.catalog.vectors.contract import Hit, Point, VectorsUnavailableError, point_id
from kvpool.catalog.vectors.embedded import EmbeddedVectors

PROMPTS, QUERIES = 100_000, 500
K = 10
TOKENS = (1_000, 8_000, 128_000)
DEADLINE_S = 10.0
BUILD_LIMIT_S = 1_800.0
_BUILD_POLL_S = 0.5
_STORED_AT_ONCE = 5_000
_TREE = TreeId(Fingerprint(bytes(32)), TenantDigest(bytes(16)), 0)

Vectors = npt.NDArray[np.float32]
_Found = TypeVar("_Found")


def run_encode(conditions: Conditions) -> Iterator[Row]:
    """Rows of `encode`."""
    encoder, text = HashedNgrams(), Text(1)
    for tokens in TOKENS:
        prompt = text.of(tokens, tokens)
        measure = seconds_per_call(partial(encoder.encode, prompt), conditions.scaled(2_000_000 // tokens))
        per_thousand = alone(measure, conditions.rounds).in_unit(1e6 * 1_000 / tokens)
        yield Row(f"encode.{tokens // 1_000}k-tokens", "us/1k tokens", per_thousand, at_most(100))


def run_vectors(conditions: Conditions) -> Iterator[Row]:
    """Rows of `vectors`: chat prompts in the embedded engine; beside it, comparing with all of them in numpy."""
    prompts = conditions.scaled(PROMPTS, least=2_000)
    stored, queries = _chats(prompts, 2 * conditions.scaled(QUERIES, least=20))
    try:
        with (
            conditions.place("vectors") as place,
            closing(EmbeddedVectors(place, max_points=prompts, budget_s=60, index_after=prompts)) as vectors,
        ):
            yield from _rows(vectors, place, stored, queries)
    except VectorsUnavailableError as error:
        raise UnmeasurableError(error.reason) from None


def _rows(vectors: EmbeddedVectors, place: Path, stored: Vectors, queries: Vectors) -> Iterator[Row]:
    def search(query: Vectors) -> list[Hit]:
        return vectors.search(query, _TREE, K, deadline_s=DEADLINE_S)

    began_s = time.perf_counter()
    for begin in range(0, len(stored), _STORED_AT_ONCE):
        vectors.upsert(
            [_point(number, stored[number]) for number in range(begin, min(len(stored), begin + _STORED_AT_ONCE))]
        )
    yield Row("vectors.upsert", "prompts/s", Figure(len(stored) / (time.perf_counter() - began_s)))
    began_s = time.perf_counter()
    while vectors.outside_graph():
        if time.perf_counter() - began_s > BUILD_LIMIT_S:
            raise UnmeasurableError(f"the graph was not built within {BUILD_LIMIT_S:g} s")
        time.sleep(_BUILD_POLL_S)
    yield Row("vectors.build", "s", Figure(time.perf_counter() - began_s))
    first, queries = queries[: len(queries) // 2], queries[len(queries) // 2 :]
    for query in first:
        search(query)  # pages that were never read have to be mapped
    ours, found = _timed(search, queries)
    brute, _ = _timed(lambda query: np.argpartition(stored @ query, -K)[-K:], queries)
    figure = Figure(percentile(ours, 50), percentile(brute, 50), percentile(ours, 50) / percentile(brute, 50))
    yield Row("vectors.search", "ms", figure.in_unit(1e3), at_most(3))
    yield Row("vectors.search-p99", "ms", Figure(percentile(ours, 99)).in_unit(1e3))
    yield Row("vectors.recall-at-10", "share", Figure(float(_recall(stored, queries, found))), at_least(0.95))
    nbytes = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    yield Row("vectors.disk", "bytes/prompt", Figure(nbytes / len(stored)))


def _chats(prompts: int, queries: int) -> tuple[Vectors, Vectors]:
    """Vectors of so many prompts of chats, and of those that came next."""
    encoder = HashedNgrams()
    encoded = np.empty((prompts + queries, DIMENSIONS), np.float32)
    for number, request in enumerate(islice(chatbot(prompts + queries), prompts + queries)):
        encoded[number] = encoder.encode(request.prompt)
    return encoded[:prompts], encoded[prompts:]


def _point(number: int, vector: Vectors) -> Point:
    leaf = BlockKey(number.to_bytes(16, "little"))
    return Point(id=point_id(leaf), vector=vector, tree=_TREE, leaf=leaf, blocks=1, tokens=64, at_ms=number)


def _timed(search: Callable[[Vectors], _Found], queries: Vectors) -> tuple[list[float], list[_Found]]:
    seconds: list[float] = []
    found: list[_Found] = []
    for query in queries:
        began_s = time.perf_counter()
        found.append(search(query))
        seconds.append(time.perf_counter() - began_s)
    return seconds, found


def _recall(stored: Vectors, queries: Vectors, found: Sequence[Sequence[Hit]]) -> float:
    """Share of the true `K` nearest that were found; one that is as near as the last of them counts too."""
    right = 0
    for query, hits in zip(queries, found, strict=True):
        scores = stored @ query
        least = np.partition(scores, -K)[-K] - 1e-5
        right += sum(scores[int.from_bytes(hit.leaf, "little")] >= least for hit in hits)
    return right / (K * len(queries))


BENCHMARKS: Sequence[Benchmark] = (
    Benchmark("encode", "a prompt as a vector of 512 numbers", run_encode),
    Benchmark("vectors", "similar ones among 100,000 chat prompts; beside it, comparing with all", run_vectors),
)

"""The collection in Qdrant's engine. Runs in the process that serves it, and in the one that builds its graph."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import qdrant_edge as qdrant

from kvpool.catalog.vectors import layout
from kvpool.catalog.vectors.layout import AT, EPOCH, MODEL, TENANT, TREE

_INDEXED_KB = 2_000
"""Segments of more than so many kilobytes of vectors get a graph when one is built."""
_SEGMENTS = 2
"""One with the graph, and one for what has come since."""
_INDEXES: Mapping[str, qdrant.UuidIndexParams | qdrant.KeywordIndexParams | qdrant.IntegerIndexParams] = {
    TREE: qdrant.UuidIndexParams(is_tenant=True),
    MODEL: qdrant.KeywordIndexParams(),
    TENANT: qdrant.KeywordIndexParams(),
    EPOCH: qdrant.IntegerIndexParams(lookup=True, range=True),
    AT: qdrant.IntegerIndexParams(lookup=False, range=True),
}
_SEARCH = qdrant.SearchParams(
    hnsw_ef=layout.HNSW_SEARCH_CANDIDATES,
    quantization=qdrant.QuantizationSearchParams(rescore=True, oversampling=layout.RESCORED),
)


class Stored(NamedTuple):
    """A point, as it is stored."""

    id: uuid.UUID
    vector: Sequence[float]
    payload: Mapping[str, Any]


class Shard:
    """An open collection. Not safe for several threads."""

    def __init__(self, engine: qdrant.EdgeShard) -> None:
        self._engine = engine

    @classmethod
    def create(cls, directory: Path) -> Self:
        """An empty one, in a directory that is there."""
        engine = qdrant.EdgeShard.create(str(directory), _config())
        _index(engine)
        engine.flush()
        return cls(engine)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The one that is there; what was written to its log since the last flush is applied."""
        engine = qdrant.EdgeShard.load(str(directory), _config())
        _index(engine)
        return cls(engine)

    def upsert(self, points: Iterable[Stored]) -> None:
        """Store these, in place of those of the same ids."""
        stored = [qdrant.Point(point.id, list(point.vector), dict(point.payload)) for point in points]
        self._engine.update(qdrant.UpdateOperation.upsert_points(stored))

    def search(self, vector: Sequence[float], tree: str, k: int) -> list[list[Any]]:
        """Score and payload of the `k` nearest of a tree, by its digest."""
        found = self._engine.search(
            qdrant.SearchRequest(
                qdrant.Query.Nearest(list(vector)),
                k,
                filter=_matching(TREE, tree),
                params=_SEARCH,
                with_payload=True,
            )
        )
        return [[point.score, point.payload] for point in found]

    def erase(self, tenant: str, before_epoch: int) -> int:
        """Remove a tenant's points of earlier epochs; how many those were."""
        earlier = qdrant.FieldCondition(EPOCH, range=qdrant.RangeFloat(lt=before_epoch))
        return self._remove(qdrant.Filter(must=[_equal(TENANT, tenant), earlier]))

    def forget_model(self, model: str) -> int:
        """Remove a model's points; how many those were."""
        return self._remove(_matching(MODEL, model))

    def remove_oldest(self, number: int) -> None:
        """Remove so many points of the earliest times."""
        oldest, _ = self._engine.scroll(
            qdrant.ScrollRequest(
                limit=number,
                with_payload=False,
                with_vector=False,
                order_by=qdrant.OrderBy(AT, qdrant.Direction.Asc),
            )
        )
        self._engine.update(qdrant.UpdateOperation.delete_points([point.id for point in oldest]))

    def count(self) -> int:
        """How many points there are."""
        return self._engine.count(qdrant.CountRequest())

    def outside_graph(self) -> int:
        """About how many points are in no graph yet, and so are compared one by one."""
        info = self._engine.info()
        return max(0, info.points_count - info.indexed_vectors_count)

    def build_graph(self) -> None:
        """Put every point into a graph, and give back the room of those that were removed. Takes its time."""
        while self._engine.optimize():
            pass

    def flush(self) -> None:
        """Bring to the disk what is only in the log until now; the log gets shorter."""
        self._engine.flush()

    def close(self) -> None:
        """Flush, and close the files."""
        self._engine.flush()
        self._engine.close()

    def abandon(self) -> None:
        """Close the files of a copy that is removed next."""
        self._engine.close()

    def _remove(self, matching: qdrant.Filter) -> int:
        number = self._engine.count(qdrant.CountRequest(filter=matching))
        if number:
            self._engine.update(qdrant.UpdateOperation.delete_points_by_filter(matching))
        return number


def _index(engine: qdrant.EdgeShard) -> None:
    """Index what is not, or was by an earlier version of this program in another way."""
    there = engine.info().payload_schema
    for name, index in _INDEXES.items():
        if name not in there or type(there[name].params) is not type(index):
            engine.update(qdrant.UpdateOperation.create_field_index(name, index))


def _config() -> qdrant.EdgeConfig:
    return qdrant.EdgeConfig(
        vectors=qdrant.EdgeVectorParams(
            layout.SIZE,
            qdrant.Distance.Cosine,
            datatype=qdrant.VectorStorageDatatype.Float16,
            quantization_config=qdrant.ScalarQuantizationConfig(
                qdrant.ScalarType.Int8, quantile=layout.INT8_QUANTILE, always_ram=True
            ),
        ),
        hnsw_config=qdrant.HnswIndexConfig(
            layout.HNSW_EDGES,
            layout.HNSW_BUILD_CANDIDATES,
            layout.FULL_SCAN_KB,
            max_indexing_threads=1,
        ),
        optimizers=qdrant.EdgeOptimizersConfig(
            deleted_threshold=0.05, default_segment_number=_SEGMENTS, indexing_threshold=_INDEXED_KB
        ),
        max_search_threads=1,
    )


def _matching(name: str, value: str) -> qdrant.Filter:
    return qdrant.Filter(must=[_equal(name, value)])


def _equal(name: str, value: Any) -> qdrant.FieldCondition:
    return qdrant.FieldCondition(name, match=qdrant.MatchValue(value))

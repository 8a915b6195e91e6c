"""Prompts' vectors on a Qdrant server, which several processes may share."""

from collections.abc import Callable, Sequence
from functools import partial

from qdrant_client import QdrantClient, models

from kvpool.blocks.identity import Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding.encoder import Vector
from kvpool.catalog.vectors import layout
from kvpool.catalog.vectors.collection import checked, hit_of, payload_of, tree_digest
from kvpool.catalog.vectors.contract import BATCH_POINTS, MAX_POINTS, Hit, Point
from kvpool.catalog.vectors.session import Session, server_timeout
from kvpool.config.service import ServiceAddress

_REMOVED_AT_ONCE = 1_000
_SEARCH = models.SearchParams(
    hnsw_ef=layout.HNSW_SEARCH_CANDIDATES,
    quantization=models.QuantizationSearchParams(rescore=True, oversampling=layout.RESCORED),
)


class RemoteVectors:
    """`PromptVectors` on a server. Searches and updates have a connection each, and do not wait for each other.

    The server holds at most `max_points` points, and one in a hundred more for each process that adds some: each looks
    after so many of its own, and removes the oldest. `budget_s` is how long a batch, or a call other than a search, may
    take. The password file is the API key.
    """

    def __init__(
        self,
        address: Callable[[], ServiceAddress],
        *,
        tls: bool = False,
        budget_s: float = 2.0,
        max_points: int = MAX_POINTS,
    ) -> None:
        self._searches = Session(address, tls=tls)
        self._updates = Session(address, tls=tls)
        self._budget_s = budget_s
        self._max_points = max_points
        self._unchecked = max_points
        """Points added since their number was checked; at first it is."""

    def upsert(self, points: Sequence[Point]) -> None:
        """As `PromptVectors` says."""
        for begin in range(0, len(points), BATCH_POINTS):
            batch = points[begin : begin + BATCH_POINTS]
            stored = [
                models.PointStruct(id=str(point.id), vector=checked(point.vector).tolist(), payload=payload_of(point))
                for point in batch
            ]
            self._updates.call(partial(_put, stored=stored), self._budget_s)
            self._unchecked += len(batch)
            if self._unchecked > self._max_points // 100:
                self._updates.call(self._remove_oldest, self._budget_s)
                self._unchecked = 0

    def search(self, vector: Vector, tree: TreeId, k: int = 10, *, deadline_s: float) -> list[Hit]:
        """As `PromptVectors` says."""
        asked = checked(vector).tolist()

        def search(client: QdrantClient) -> list[models.ScoredPoint]:
            return client.query_points(
                layout.NAME,
                query=asked,
                query_filter=models.Filter(must=[_equal(layout.TREE, tree_digest(tree))]),
                search_params=_SEARCH,
                limit=k,
                with_payload=True,
                timeout=server_timeout(deadline_s),
            ).points

        found = self._searches.call(search, deadline_s)
        hits = (hit_of(point.score, point.payload, tree) for point in found)
        return [hit for hit in hits if hit is not None][:k]

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """As `PromptVectors` says."""
        earlier = models.FieldCondition(key=layout.EPOCH, range=models.Range(lt=before_epoch))
        return self._remove(models.Filter(must=[_equal(layout.TENANT, tenant.hex()), earlier]))

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """As `PromptVectors` says."""
        return self._remove(models.Filter(must=[_equal(layout.MODEL, fingerprint.hex())]))

    def count(self) -> int:
        """As `PromptVectors` says."""
        return self._searches.call(lambda client: client.count(layout.NAME).count, self._budget_s)

    def close(self) -> None:
        """As `PromptVectors` says."""
        self._searches.close()
        self._updates.close()

    def _remove_oldest(self, client: QdrantClient) -> None:
        while (excess := client.count(layout.NAME).count - self._max_points) > 0:
            oldest, _ = client.scroll(
                layout.NAME,
                limit=min(excess, _REMOVED_AT_ONCE),
                order_by=models.OrderBy(key=layout.AT, direction=models.Direction.ASC),
                with_payload=False,
                with_vectors=False,
            )
            client.delete(layout.NAME, models.PointIdsList(points=[point.id for point in oldest]))

    def _remove(self, matching: models.Filter) -> int:
        def remove(client: QdrantClient) -> int:
            number = client.count(layout.NAME, count_filter=matching).count
            client.delete(layout.NAME, models.FilterSelector(filter=matching))
            return number

        return self._updates.call(remove, self._budget_s)


def _put(client: QdrantClient, stored: list[models.PointStruct]) -> None:
    client.upsert(layout.NAME, stored)


def _equal(name: str, value: str | int) -> models.FieldCondition:
    return models.FieldCondition(key=name, match=models.MatchValue(value=value))

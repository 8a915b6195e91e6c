"""What everything that remembers prompts' vectors must do. A subclass has the fixture `make_vectors`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import pytest

from kvpool.catalog.embedding import DIMENSIONS, HashedNgrams, Vector
from kvpool.catalog.vectors.contract import PromptVectors, VectorsUnavailableError
from kvpool.errors import InputError
from tests.catalog.vectors.points import TREE, leaf_of, near, point, points, tree_of, vector_of

DEADLINE_S = 20.0
MakeVectors: TypeAlias = "Callable[[int], PromptVectors]"
"""Opens the same collection, again and again, with room for so many points."""


class VectorsConformance:
    """The rules of `PromptVectors`."""

    @pytest.fixture
    def vectors(self, make_vectors: MakeVectors) -> PromptVectors:
        return make_vectors(10_000)

    def test_a_prompt_is_found_by_its_own_vector_with_all_that_was_said_of_it(self, vectors: PromptVectors) -> None:
        vectors.upsert(points(range(20)))
        hit, *others = vectors.search(vector_of(8), TREE, deadline_s=DEADLINE_S)
        assert hit[1:] == (leaf_of(8), 9, 64 * 8 + 70, 1_700_000_000_008, (leaf_of(9), leaf_of(10)))
        assert hit.score == pytest.approx(1.0, abs=1e-4)
        assert len(others) == 9
        assert all(other.score < 0.5 for other in others)

    def test_hits_come_best_first_and_no_more_than_asked_for(self, vectors: PromptVectors) -> None:
        asked = vector_of(1)
        vectors.upsert([point(number, vector=near(asked, number, number / 10)) for number in range(1, 9)])
        hits = vectors.search(asked, TREE, 5, deadline_s=DEADLINE_S)
        assert [hit.leaf for hit in hits] == [leaf_of(number) for number in range(1, 6)]
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    def test_an_empty_collection_finds_nothing(self, vectors: PromptVectors) -> None:
        assert vectors.search(vector_of(1), TREE, deadline_s=DEADLINE_S) == []
        assert vectors.count() == 0

    @pytest.mark.parametrize("other", [tree_of(model=1), tree_of(tenant=1), tree_of(epoch=1)])
    def test_nothing_of_another_model_tenant_or_epoch_is_ever_found(
        self, vectors: PromptVectors, other: object
    ) -> None:
        assert isinstance(other, type(TREE))
        vectors.upsert(points(range(30), other))
        vectors.upsert(points([50]))
        assert [hit.leaf for hit in vectors.search(vector_of(3), TREE, 40, deadline_s=DEADLINE_S)] == [leaf_of(50)]
        assert len(vectors.search(vector_of(3), other, 40, deadline_s=DEADLINE_S)) == 30

    def test_a_point_of_the_same_id_is_replaced(self, vectors: PromptVectors) -> None:
        vectors.upsert([point(1)])
        vectors.upsert([dataclasses.replace(point(1, vector=vector_of(2)), tokens=5)])
        assert vectors.count() == 1
        (hit,) = vectors.search(vector_of(2), TREE, deadline_s=DEADLINE_S)
        assert (hit.leaf, hit.tokens) == (leaf_of(1), 5)
        assert hit.score == pytest.approx(1.0, abs=1e-4)

    def test_many_points_are_sent_in_batches(self, vectors: PromptVectors) -> None:
        vectors.upsert(points(range(700)))
        vectors.upsert([])
        assert vectors.count() == 700

    def test_erasing_a_tenant_takes_its_earlier_epochs_and_nothing_else(self, vectors: PromptVectors) -> None:
        for tree in (tree_of(epoch=0), tree_of(epoch=1), tree_of(epoch=2), tree_of(model=1), tree_of(tenant=1)):
            vectors.upsert(points(range(10), tree))
        assert vectors.erase(TREE.tenant, 2) == 30
        assert vectors.count() == 20
        for tree in (tree_of(epoch=0), tree_of(epoch=1), tree_of(model=1)):
            assert vectors.search(vector_of(3), tree, deadline_s=DEADLINE_S) == []
        for tree in (tree_of(epoch=2), tree_of(tenant=1)):
            assert len(vectors.search(vector_of(3), tree, deadline_s=DEADLINE_S)) == 10
        assert vectors.erase(TREE.tenant, 2) == 0

    def test_forgetting_a_model_takes_all_of_it_and_nothing_else(self, vectors: PromptVectors) -> None:
        for tree in (tree_of(model=1), tree_of(model=1, tenant=1, epoch=3), tree_of(model=2)):
            vectors.upsert(points(range(10), tree))
        assert vectors.forget_model(tree_of(model=1).fingerprint) == 20
        assert vectors.count() == 10
        assert vectors.forget_model(tree_of(model=1).fingerprint) == 0

    def test_there_are_never_many_more_than_the_most_and_the_oldest_go(self, make_vectors: MakeVectors) -> None:
        vectors = make_vectors(1_000)
        for begin in range(0, 3_000, 100):
            vectors.upsert(points(range(begin, begin + 100)))
            assert vectors.count() <= 1_000 + 100
        assert 900 <= vectors.count() <= 1_000
        assert vectors.search(vector_of(100), TREE, deadline_s=DEADLINE_S)[0].score < 0.5
        for number in (2_200, 2_999):
            assert vectors.search(vector_of(number), TREE, deadline_s=DEADLINE_S)[0].leaf == leaf_of(number)

    def test_more_than_the_most_at_once_leaves_the_latest(self, make_vectors: MakeVectors) -> None:
        vectors = make_vectors(100)
        vectors.upsert(points(range(500)))
        assert 90 <= vectors.count() <= 100
        assert vectors.search(vector_of(499), TREE, deadline_s=DEADLINE_S)[0].leaf == leaf_of(499)

    def test_what_was_remembered_is_there_when_it_is_opened_again(self, make_vectors: MakeVectors) -> None:
        first = make_vectors(10_000)
        first.upsert(points(range(100)))
        first.close()
        again = make_vectors(10_000)
        assert again.count() == 100
        assert again.search(vector_of(42), TREE, deadline_s=DEADLINE_S)[0].leaf == leaf_of(42)

    def test_it_is_closed_for_good_and_closing_twice_is_no_fault(self, vectors: PromptVectors) -> None:
        vectors.close()
        vectors.close()
        with pytest.raises(VectorsUnavailableError, match="closed"):
            vectors.search(vector_of(1), TREE, deadline_s=DEADLINE_S)
        with pytest.raises(VectorsUnavailableError, match="closed"):
            vectors.upsert([point(1)])

    def test_a_deadline_that_has_passed_is_told(self, vectors: PromptVectors) -> None:
        with pytest.raises(VectorsUnavailableError):
            vectors.search(vector_of(1), TREE, deadline_s=0.0)
        assert vectors.search(vector_of(1), TREE, deadline_s=DEADLINE_S) == []

    def test_an_empty_prompt_harms_nothing(self, vectors: PromptVectors) -> None:
        nothing = HashedNgrams().encode(b"")
        vectors.upsert([point(1, vector=nothing), point(2)])
        assert vectors.search(vector_of(2), TREE, 1, deadline_s=DEADLINE_S)[0].leaf == leaf_of(2)
        hits = vectors.search(nothing, TREE, deadline_s=DEADLINE_S)
        assert all(np.isfinite(hit.score) for hit in hits)
        assert nothing.shape == (DIMENSIONS,)

    @pytest.mark.parametrize("wrong", [np.zeros(256, np.float32), np.full(DIMENSIONS, np.nan, np.float32)])
    def test_what_is_no_vector_is_refused_and_harms_nothing(self, vectors: PromptVectors, wrong: Vector) -> None:
        vectors.upsert([point(1)])
        with pytest.raises(InputError, match="must have 512 finite numbers"):
            vectors.upsert([point(2), point(3, vector=wrong)])
        with pytest.raises(InputError, match="must have 512 finite numbers"):
            vectors.search(wrong, TREE, deadline_s=DEADLINE_S)
        assert vectors.count() == 1

    def test_several_threads_search_while_others_add(self, vectors: PromptVectors) -> None:
        vectors.upsert(points(range(200)))

        def add(thread: int) -> None:
            for begin in range(0, 200, 20):
                vectors.upsert(points(range(begin, begin + 20), tree_of(tenant=thread)))

        def search(thread: int) -> None:
            for number in range(40):
                hits = vectors.search(vector_of(number), TREE, 3, deadline_s=DEADLINE_S)
                assert hits[0].leaf == leaf_of(number)

        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(work, thread) for thread in (1, 2) for work in (add, search)]
            for job in jobs:
                job.result()
        assert vectors.count() == 600

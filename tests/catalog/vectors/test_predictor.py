"""What is observed is remembered with what followed it, found again by likeness, and never holds anybody up."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kvpool.blocks.identity import BlockKey, KeyChain, TreeId
from kvpool.catalog.embedding import DIMENSIONS, Vector
from kvpool.catalog.vectors.contract import PromptVectors
from kvpool.catalog.vectors.embedded import EmbeddedVectors
from kvpool.catalog.vectors.followers import FOLLOWERS
from kvpool.catalog.vectors.predictor import MAX_QUEUED_BYTES, SemanticPredictor
from kvpool.catalog.vectors.remote import RemoteVectors
from kvpool.catalog.vectors.session import SCHEMES
from kvpool.config.service import read_service
from kvpool.resilience import BreakerState
from tests.catalog.vectors.points import TREE, VECTORS_S, tree_of
from tests.catalog.vectors.qdrant_server import QdrantServer, qdrant_server, service_folder
from tests.waiting import eventually

BLOCK_BYTES = 64 * 4
FLUSH_S = 30.0
SEARCH_S = 20.0


def text(seed: int, tokens: int) -> bytes:
    rng = Random(seed)
    return array("i", [rng.randrange(128_000) for _ in range(tokens)]).tobytes()


def leaf_of(tokens: bytes, tree: TreeId = TREE) -> BlockKey:
    return KeyChain(bytes(32), *tree).keys(tokens, BLOCK_BYTES)[-1]


def observe(predictor: SemanticPredictor, tokens: bytes, tree: TreeId = TREE) -> None:
    predictor.observe(tokens, tree, leaf_of(tokens, tree), len(tokens) // BLOCK_BYTES)


def state_of(predictor: SemanticPredictor) -> BreakerState:
    return predictor.breaker.state


@pytest.fixture
def vectors(tmp_path: Path) -> Iterator[PromptVectors]:
    with closing(EmbeddedVectors(tmp_path / "vectors")) as opened:
        yield opened


@pytest.fixture
def predictor(vectors: PromptVectors) -> Iterator[SemanticPredictor]:
    with closing(SemanticPredictor(vectors)) as running:
        yield running


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with qdrant_server() as running:
        yield running


@pytest.fixture
def remote(server: QdrantServer, tmp_path: Path) -> Iterator[SemanticPredictor]:
    folder = service_folder(tmp_path / "qdrant", server.port)
    with (
        closing(RemoteVectors(lambda: read_service(folder, schemes=SCHEMES), budget_s=20)) as vectors,
        closing(SemanticPredictor(vectors)) as running,
    ):
        yield running


def test_a_prompt_is_like_those_that_share_much_with_it_the_most_alike_first(predictor: SemanticPredictor) -> None:
    head, other = text(1, 640), text(2, 640)
    prompts = [head + text(10 + number, 64 + 32 * number) for number in range(5)]
    for tokens in (*prompts, other):
        observe(predictor, tokens)
    assert predictor.flush(FLUSH_S)
    hits = predictor.similar(head + text(99, 64), TREE, deadline_s=SEARCH_S)
    assert {hit.leaf for hit in hits[:5]} == {leaf_of(tokens) for tokens in prompts}
    assert hits[5].leaf == leaf_of(other)
    assert hits[0].blocks == len(prompts[0]) // BLOCK_BYTES
    assert hits[4].score > 2 * hits[5].score


def test_a_hit_says_which_prompts_followed_in_their_order(predictor: SemanticPredictor) -> None:
    prompts = [text(number, 128) for number in range(FOLLOWERS + 4)]
    for tokens in prompts:
        observe(predictor, tokens)
        observe(predictor, tokens, tree_of(tenant=1))
    assert predictor.flush(FLUSH_S)
    leaves = [leaf_of(tokens) for tokens in prompts]
    for number, tokens in enumerate(prompts):
        (hit,) = predictor.similar(tokens, TREE, 1, deadline_s=SEARCH_S)
        assert hit.leaf == leaves[number]
        assert list(hit.followers) == leaves[number + 1 : number + 1 + FOLLOWERS]


def test_a_prompt_asked_for_again_and_again_does_not_follow_itself(predictor: SemanticPredictor) -> None:
    for _ in range(3):
        observe(predictor, text(1, 128))
    observe(predictor, text(2, 128))
    assert predictor.flush(FLUSH_S)
    (hit,) = predictor.similar(text(1, 128), TREE, 1, deadline_s=SEARCH_S)
    assert hit.followers == (leaf_of(text(2, 128)),)
    assert predictor.stats().stored == 4


def test_nothing_of_another_tree_is_like_anything(predictor: SemanticPredictor) -> None:
    observe(predictor, text(1, 128), tree_of(tenant=1))
    assert predictor.flush(FLUSH_S)
    assert predictor.similar(text(1, 128), TREE, deadline_s=SEARCH_S) == []


def test_what_waits_for_followers_is_stored_when_it_is_closed(vectors: PromptVectors) -> None:
    with closing(SemanticPredictor(vectors)) as predictor:
        observe(predictor, text(1, 128))
    assert vectors.count() == 1
    observe(predictor, text(2, 128))
    assert predictor.stats().observed == 1, "it is closed"


def test_a_prompt_that_nobody_follows_is_stored_after_a_while(vectors: PromptVectors) -> None:
    now_s = 1_000.0
    with closing(SemanticPredictor(vectors, clock=lambda: now_s)) as predictor:
        observe(predictor, text(1, 128))
        eventually(lambda: predictor.stats().waiting == 1, deadline_s=VECTORS_S)
        now_s += 61
        eventually(lambda: predictor.stats().stored == 1, deadline_s=VECTORS_S)


def test_another_encoder_can_be_plugged_in(vectors: PromptVectors) -> None:
    class ByLength:
        def encode(self, tokens: bytes) -> Vector:
            vector = np.zeros(DIMENSIONS, np.float32)
            vector[min(len(tokens) // 4, DIMENSIONS - 1)] = 1.0
            return vector

    with closing(SemanticPredictor(vectors, encoder=ByLength())) as predictor:
        for tokens in (100, 200):
            observe(predictor, text(tokens, tokens))
        assert predictor.flush(FLUSH_S)
        (hit,) = predictor.similar(text(9, 200), TREE, 1, deadline_s=SEARCH_S)
        assert hit.tokens == 200
        assert hit.score == pytest.approx(1.0)


def test_an_encoder_that_raises_costs_its_prompts_and_nothing_else(
    vectors: PromptVectors, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(SemanticPredictor(vectors)) as predictor:
        predictor.observe(b"123", TREE, leaf_of(text(1, 128)), 2)
        eventually(lambda: predictor.stats().dropped == 1, deadline_s=VECTORS_S)
        observe(predictor, text(2, 128))
        assert predictor.flush(FLUSH_S)
        assert "could not be remembered" in caplog.text
    assert vectors.count() == 1


def test_erasing_a_tenant_takes_what_is_stored_what_waits_and_what_comes_late(
    vectors: PromptVectors, predictor: SemanticPredictor
) -> None:
    observe(predictor, text(1, 128))
    assert predictor.flush(FLUSH_S)
    for number in range(2, 10):
        observe(predictor, text(number, 128))
        observe(predictor, text(number, 128), tree_of(tenant=1))
    assert predictor.erase(TREE.tenant, 1) >= 1
    observe(predictor, text(10, 128))
    observe(predictor, text(11, 128), tree_of(epoch=1))
    assert predictor.flush(FLUSH_S)
    assert vectors.count() == 8 + 1
    assert predictor.similar(text(3, 128), TREE, deadline_s=SEARCH_S) == []
    assert len(predictor.similar(text(3, 128), tree_of(epoch=1), deadline_s=SEARCH_S)) == 1


def test_forgetting_a_model_takes_what_is_stored_and_what_waits(
    vectors: PromptVectors, predictor: SemanticPredictor
) -> None:
    for number in range(200):
        observe(predictor, text(number, 128))
        observe(predictor, text(number, 128), tree_of(model=1))
    predictor.forget_model(TREE.fingerprint)
    assert predictor.flush(FLUSH_S)
    assert predictor.similar(text(3, 128), TREE, deadline_s=SEARCH_S) == []
    assert vectors.count() == 200


def test_a_store_that_hangs_costs_one_deadline_and_then_nothing(
    remote: SemanticPredictor, server: QdrantServer
) -> None:
    observe(remote, text(1, 128))
    assert remote.flush(FLUSH_S)
    server.go_on.clear()
    assert remote.similar(text(1, 128), TREE, deadline_s=0.1) == []
    assert state_of(remote) is BreakerState.OPEN
    server.go_on.set()
    eventually(lambda: remote.similar(text(1, 128), TREE, deadline_s=SEARCH_S), deadline_s=VECTORS_S)
    assert state_of(remote) is BreakerState.CLOSED
    assert remote.stats().failed >= 1


def test_what_could_not_be_stored_is_stored_when_the_store_is_back(
    remote: SemanticPredictor, server: QdrantServer
) -> None:
    server.api_key = "another"
    for number in range(20):
        observe(remote, text(number, 128))
    assert not remote.flush(1.5)
    assert remote.stats().stored == 0
    server.api_key = None
    assert remote.flush(FLUSH_S)
    assert remote.stats()[:3] == (20, 20, 0)


def test_observing_never_waits_and_is_bounded_while_nothing_can_be_stored(
    remote: SemanticPredictor, server: QdrantServer
) -> None:
    server.go_on.clear()
    tokens = text(1, 128) * 512  # 256 KiB
    leaf = leaf_of(text(1, 128))
    slowest_s = 0.0
    for _ in range(3 * MAX_QUEUED_BYTES // len(tokens)):
        began_s = time.perf_counter()
        remote.observe(tokens, TREE, leaf, 1_024)
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
    assert slowest_s < 0.5
    stats = remote.stats()
    assert stats.dropped > 0
    assert stats.waiting * len(tokens) <= 2 * MAX_QUEUED_BYTES
    server.go_on.set()


def test_several_threads_observe_and_ask(predictor: SemanticPredictor, vectors: PromptVectors) -> None:
    def serve(thread: int) -> None:
        tree = tree_of(tenant=thread)
        for number in range(50):
            observe(predictor, text(100 * thread + number, 128), tree)
            predictor.similar(text(100 * thread + number, 128), tree, deadline_s=SEARCH_S)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert predictor.flush(FLUSH_S)
    stats = predictor.stats()
    assert (stats.observed, stats.stored, stats.dropped, stats.waiting) == (200, 200, 0, 0)
    assert vectors.count() == 200

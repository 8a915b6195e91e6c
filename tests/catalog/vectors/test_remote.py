"""Vectors on a server that is away, slow, wrong or hostile: deadlines hold, and nothing that is not ours is touched."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models

from kvpool.catalog.vectors.contract import VectorsMismatchError, VectorsUnavailableError
from kvpool.catalog.vectors.deadline_transport import MAX_ANSWER_BYTES
from kvpool.catalog.vectors.layout import AT, EPOCH, MODEL, NAME, TENANT
from kvpool.catalog.vectors.layout import TREE as TREE_FIELD
from kvpool.catalog.vectors.remote import RemoteVectors
from kvpool.catalog.vectors.session import SCHEMES
from kvpool.config.service import read_service
from tests.catalog.vectors.points import TREE, VECTORS_S, leaf_of, point, vector_of
from tests.catalog.vectors.qdrant_server import QdrantServer, qdrant_server, service_folder
from tests.footprint import footprint, holds_no_more_than
from tests.waiting import eventually

SEARCH_S = 20.0
SHORT_S = 0.1
PATIENCE_S = 1.0
"""A deadline of 0.1 s is held within this, on a machine that does much else."""


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with qdrant_server() as running:
        yield running


@pytest.fixture
def folder(server: QdrantServer, tmp_path: Path) -> Path:
    return service_folder(tmp_path / "qdrant", server.port)


@pytest.fixture
def vectors(folder: Path) -> Iterator[RemoteVectors]:
    with closing(vectors_of(folder)) as opened:
        yield opened


def vectors_of(folder: Path, *, budget_s: float = 20.0, tls: bool = False) -> RemoteVectors:
    return RemoteVectors(lambda: read_service(folder, schemes=SCHEMES), budget_s=budget_s, tls=tls)


def search(vectors: RemoteVectors, deadline_s: float = SEARCH_S) -> list[bytes]:
    return [hit.leaf for hit in vectors.search(vector_of(7), TREE, 1, deadline_s=deadline_s)]


def test_the_collection_is_made_as_it_is_documented(vectors: RemoteVectors, server: QdrantServer) -> None:
    assert search(vectors) == []
    indexes = server.indexes(NAME)
    assert {name: index["params"]["type"] for name, index in indexes.items()} == {
        TREE_FIELD: "uuid",
        MODEL: "keyword",
        TENANT: "keyword",
        EPOCH: "integer",
        AT: "integer",
    }
    assert indexes[TREE_FIELD]["params"]["is_tenant"] is True


def test_an_index_that_is_missing_is_made(vectors: RemoteVectors, server: QdrantServer) -> None:
    server.create(NAME, 512)
    vectors.upsert([point(7)])
    assert set(server.indexes(NAME)) == {TREE_FIELD, MODEL, TENANT, EPOCH, AT}


def test_an_index_of_another_kind_is_made_anew(vectors: RemoteVectors, server: QdrantServer) -> None:
    server.create(NAME, 512)
    with closing(QdrantClient(url=f"http://127.0.0.1:{server.port}", check_compatibility=False)) as client:
        client.create_payload_index(NAME, TREE_FIELD, models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD))
    vectors.upsert([point(7)])
    assert server.indexes(NAME)[TREE_FIELD]["params"]["type"] == "uuid"
    assert search(vectors) == [leaf_of(7)]


@pytest.mark.parametrize(("size", "distance"), [(256, models.Distance.COSINE), (512, models.Distance.EUCLID)])
def test_a_collection_of_another_kind_is_refused_and_nothing_is_written(
    vectors: RemoteVectors, server: QdrantServer, size: int, distance: models.Distance
) -> None:
    server.create(NAME, size, distance)
    for call in (
        lambda: vectors.upsert([point(1)]),
        lambda: search(vectors),
        lambda: vectors.erase(TREE.tenant, 1),
        lambda: vectors.forget_model(TREE.fingerprint),
    ):
        with pytest.raises(VectorsMismatchError, match=f"another kind: .*{size}.*; needed are 512"):
            call()
    assert set(server.asked) == {f"GET /collections/{NAME}"}


def test_a_collection_that_two_processes_make_at_once_is_one(folder: Path) -> None:
    with ExitStack() as opened:
        several = [opened.enter_context(closing(vectors_of(folder))) for _ in range(6)]
        threads = [threading.Thread(target=each.upsert, args=([point(7)],)) for each in several]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert several[0].count() == 1


def test_a_collection_that_was_lost_is_made_again(vectors: RemoteVectors, server: QdrantServer) -> None:
    vectors.upsert([point(7)])
    assert search(vectors) == [leaf_of(7)]
    server.drop_all()
    with pytest.raises(VectorsUnavailableError, match="404"):
        search(vectors)
    assert search(vectors) == []


def test_a_key_is_the_password_file_and_a_rotated_one_is_used(folder: Path, server: QdrantServer) -> None:
    server.api_key = "s3cret"
    service_folder(folder, server.port, "wrong-one")
    with closing(vectors_of(folder)) as vectors:
        with pytest.raises(VectorsUnavailableError, match="401") as refused:
            search(vectors)
        assert "wrong-one" not in str(refused.value)
        service_folder(folder, server.port, "s3cret")
        assert search(vectors) == []


def test_a_key_that_no_header_can_hold_is_not_shown(folder: Path, server: QdrantServer) -> None:
    for number, key in enumerate(("s3cret\x00", "s3cr\u00e9t", "s3cret\nx-header: 1")):
        service_folder(folder, server.port, key)
        with closing(vectors_of(folder)) as vectors, pytest.raises(VectorsUnavailableError) as refused:
            search(vectors)
        assert "s3cr" not in str(refused.value), number
    assert server.asked == []


def test_a_folder_without_an_address_is_told(tmp_path: Path) -> None:
    with (
        closing(vectors_of(tmp_path)) as vectors,
        pytest.raises(VectorsUnavailableError, match="there is no such file"),
    ):
        search(vectors)


def test_a_server_that_hangs_costs_the_deadline_and_is_used_again_when_it_goes_on(
    vectors: RemoteVectors, server: QdrantServer
) -> None:
    vectors.upsert([point(7)])
    server.go_on.clear()
    for _ in range(3):
        assert seconds(lambda: refused(lambda: search(vectors, SHORT_S))) < PATIENCE_S
    server.go_on.set()
    assert search(vectors) == [leaf_of(7)]


def test_a_search_does_not_wait_for_an_update_that_hangs(vectors: RemoteVectors, server: QdrantServer) -> None:
    vectors.upsert([point(7)])
    server.hanging = "PUT"
    server.go_on.clear()
    thread = threading.Thread(target=vectors.upsert, args=([point(8)],))
    thread.start()
    assert search(vectors) == [leaf_of(7)]
    assert thread.is_alive()
    server.go_on.set()
    thread.join()
    assert vectors.count() == 2


def test_nobody_there_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    with closing(vectors_of(service_folder(tmp_path / "none", port))) as vectors:
        assert seconds(lambda: refused(lambda: search(vectors))) < PATIENCE_S


def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    with qdrant_server() as first, closing(vectors_of(service_folder(tmp_path / "one", first.port))) as vectors:
        vectors.upsert([point(7)])
        first.stop()
        with qdrant_server() as second:
            service_folder(tmp_path / "one", second.port)
            eventually(lambda: succeeded(lambda: vectors.upsert([point(7)])), deadline_s=VECTORS_S)
            eventually(lambda: succeeded(lambda: search(vectors)), deadline_s=VECTORS_S)
            assert search(vectors) == [leaf_of(7)]


@pytest.mark.parametrize("tls", [False, True])
def test_a_byte_now_and_then_does_not_keep_a_call_beyond_its_deadline(tmp_path: Path, tls: bool) -> None:
    def drip(client: socket.socket, over: threading.Event) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not over.wait(0.01):
            client.sendall(b"a")

    with hostile_server(drip) as port, closing(vectors_of(service_folder(tmp_path / "d", port), tls=tls)) as vectors:
        assert seconds(lambda: refused(lambda: search(vectors, SHORT_S))) < PATIENCE_S


def test_an_answer_without_end_is_not_taken_into_memory(tmp_path: Path) -> None:
    sent = 0

    def flood(client: socket.socket, over: threading.Event) -> None:
        nonlocal sent
        client.sendall(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"result": [')
        while not over.is_set():
            sent += client.send(b"0," * 32_768)

    with hostile_server(flood) as port, closing(vectors_of(service_folder(tmp_path / "d", port))) as vectors:
        refused(lambda: search(vectors))
    assert sent < 4 * MAX_ANSWER_BYTES


def test_a_small_answer_that_unpacks_to_a_large_one_is_refused(tmp_path: Path) -> None:
    body = gzip.compress(b" " * (64 << 20) + b"{}")
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        hostile_server(lambda client, _: client.sendall(head + body)) as port,
        closing(vectors_of(service_folder(tmp_path / "d", port))) as vectors,
        pytest.raises(VectorsUnavailableError, match="compressed"),
    ):
        search(vectors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.booleans())
def test_nonsense_ends_in_unavailable_and_nothing_else(tmp_path: Path, nonsense: bytes, as_json: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(nonsense) if as_json else b""
    with (
        hostile_server(lambda client, _: client.sendall(head + nonsense)) as port,
        closing(vectors_of(service_folder(tmp_path / "d", port), budget_s=2)) as vectors,
    ):
        refused(lambda: search(vectors, 2))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_JSON, st.sampled_from(["payload", "score", "points", "result"]))
def test_an_answer_of_another_shape_is_no_hit(tmp_path: Path, thing: object, where: str) -> None:
    found: dict[str, object] = {"id": 1, "version": 0, "score": 0.5, "payload": {}}
    result: object = {"points": [found]}
    if where in found:
        found[where] = thing
    elif where == "points":
        result = {"points": thing}
    else:
        result = thing
    with (
        answering(result) as port,
        closing(vectors_of(service_folder(tmp_path / "d", port), budget_s=2)) as vectors,
        suppress(VectorsUnavailableError),
    ):
        assert search(vectors, 5) == []


def test_a_hit_of_another_tree_is_not_believed_even_if_the_server_says_so(tmp_path: Path) -> None:
    ours = {"model": TREE.fingerprint.hex(), "tenant": TREE.tenant.hex(), "epoch": 0}
    rest = {"at": 1, "leaf": leaf_of(1).hex(), "blocks": 1, "tokens": 64, "next": []}
    assert _searched({**ours, **rest}, tmp_path) == [leaf_of(1)]
    others: list[dict[str, object]] = [
        {"model": "00"},
        {"tenant": "11" * 16},
        {"epoch": 1},
        {"leaf": "00"},
        {"leaf": None},
        {"next": ["00"]},
    ]
    for change in others:
        assert _searched({**ours, **rest, **change}, tmp_path) == [], change


def _searched(payload: dict[str, object], tmp_path: Path) -> list[bytes]:
    """What a search finds where the server answers with this payload."""
    found = {"points": [{"id": 1, "version": 0, "score": 1.0, "payload": payload}]}
    with answering(found) as port, closing(vectors_of(service_folder(tmp_path / "d", port))) as vectors:
        return search(vectors)


def test_many_calls_that_fail_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    with silent_server() as port, closing(vectors_of(service_folder(tmp_path / "d", port))) as vectors:
        refused(lambda: search(vectors, SHORT_S))
        before = footprint()
        for _ in range(20):
            refused(lambda: search(vectors, 0.02))
        holds_no_more_than(before._replace(descriptors=before.descriptors + 20))  # the server keeps its own ends
        assert threading.active_count() <= before.threads
    holds_no_more_than(before)


def seconds(work: Callable[[], object]) -> float:
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s


def refused(work: Callable[[], object]) -> None:
    with pytest.raises(VectorsUnavailableError):
        work()


def succeeded(work: Callable[[], object]) -> bool:
    try:
        work()
    except VectorsUnavailableError:
        return False
    return True


@contextmanager
def hostile_server(speak: Callable[[socket.socket, threading.Event], object]) -> Iterator[int]:
    """A server that reads a request and then says what it likes; its port."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.02)

        def serve() -> None:
            while not over.is_set():
                with suppress(OSError):
                    client, _ = listener.accept()
                    with client:
                        client.settimeout(1)
                        client.recv(1 << 16)
                        speak(client, over)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            over.set()
            thread.join()


@contextmanager
def silent_server() -> Iterator[int]:
    """A server that takes connections and never says anything; its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield int(listener.getsockname()[1])


@contextmanager
def answering(result: object) -> Iterator[int]:
    """A server whose collection is as it should be, and that answers every search with `result`."""
    with qdrant_server() as real:
        as_asked = real.answer

        def answer(method: str, path: str, key: str | None, body: object) -> tuple[int, object]:
            if "/points/query" in path:
                return 200, json.loads(json.dumps(result))
            return as_asked(method, path, key, body)

        real.answer = answer  # type: ignore[method-assign]
        yield real.port

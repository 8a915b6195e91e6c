"""A server that speaks as much of Qdrant's REST interface as is used here, on what qdrant-client keeps in memory.

It is no Qdrant: what it proves is that requests are well formed, arrive, and are answered, over real HTTP, and what
becomes of faults. The engine's own behaviour is tested with `EmbeddedVectors`.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from qdrant_client import QdrantClient, models

_POINTS = re.compile(r"/collections/([^/]+)/points(/query|/count|/scroll|/delete|)$")
Answer = tuple[int, Any]


class QdrantServer:
    """Its collections, and what it was asked. While `go_on` is not set, it hangs where `hanging` is in the request."""

    def __init__(self) -> None:
        self.api_key: str | None = None
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.hanging = ""
        self.connections: list[socket.socket] = []
        self._memory = QdrantClient(":memory:")
        self._indexes: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def serve_forever(self) -> None:
        self._http.serve_forever(0.02)

    def stop(self) -> None:
        self.go_on.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in self.connections:
            with suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)

    def create(self, name: str, size: int, distance: models.Distance = models.Distance.COSINE) -> None:
        """A collection that somebody else made."""
        self._memory.create_collection(name, vectors_config=models.VectorParams(size=size, distance=distance))

    def drop_all(self) -> None:
        """As after the loss of its disk."""
        with self._lock:
            for collection in self._memory.get_collections().collections:
                self._memory.delete_collection(collection.name)
            self._indexes.clear()

    def indexes(self, name: str) -> dict[str, Any]:
        return dict(self._indexes.get(name, {}))

    def answer(self, method: str, path: str, key: str | None, body: Any) -> Answer:
        self.asked.append(f"{method} {path}")
        if self.hanging in self.asked[-1]:
            self.go_on.wait(60)
        if self.api_key is not None and key != self.api_key:
            return 401, {"status": {"error": "Invalid API key or JWT"}}
        with self._lock:
            return self._answer(method, path.split("?")[0], body)

    def _answer(self, method: str, path: str, body: Any) -> Answer:
        name = path.split("/")[2]
        if (method, path) == ("PUT", f"/collections/{name}"):
            return self._create(name, body)
        if not self._memory.collection_exists(name):
            return 404, {"status": {"error": f"Not found: Collection `{name}` doesn't exist!"}}
        if (method, path) == ("GET", f"/collections/{name}"):
            return 200, self._info(name)
        if (method, path) == ("PUT", f"/collections/{name}/index"):
            schema = body["field_schema"]
            self._indexes.setdefault(name, {})[body["field_name"]] = {
                "data_type": schema["type"], "params": schema, "points": 0
            }  # fmt: skip
            return 200, {"operation_id": 1, "status": "completed"}
        if found := _POINTS.match(path):
            return 200, _DO[method, found[2]](self._memory, name, body)
        return 404, {"status": {"error": "no such path"}}

    def _create(self, name: str, body: Any) -> Answer:
        if self._memory.collection_exists(name):
            return 409, {"status": {"error": f"Wrong input: Collection `{name}` already exists!"}}
        self._memory.create_collection(name, vectors_config=models.VectorParams(**body["vectors"]))
        return 200, True

    def _info(self, name: str) -> Any:
        info = json.loads(self._memory.get_collection(name).model_dump_json())
        return {**info, "payload_schema": self._indexes.get(name, {})}


def _query(memory: QdrantClient, name: str, body: Any) -> Any:
    return memory.query_points(
        name,
        query=body["query"]["nearest"],
        query_filter=models.Filter(**body["filter"]),
        limit=body["limit"],
        with_payload=body["with_payload"],
    )


def _count(memory: QdrantClient, name: str, body: Any) -> Any:
    asked = body.get("filter")
    return memory.count(name, count_filter=models.Filter(**asked) if asked else None)


def _scroll(memory: QdrantClient, name: str, body: Any) -> Any:
    found, _ = memory.scroll(
        name, limit=body["limit"], order_by=models.OrderBy(**body["order_by"]), with_payload=False, with_vectors=False
    )
    return {"points": [json.loads(point.model_dump_json()) for point in found], "next_page_offset": None}


def _put(memory: QdrantClient, name: str, body: Any) -> Any:
    return memory.upsert(name, [models.PointStruct(**point) for point in body["points"]])


def _delete(memory: QdrantClient, name: str, body: Any) -> Any:
    selector: Any = TypeAdapter(models.PointsSelector).validate_python(body)
    return memory.delete(name, selector)


_DO: dict[tuple[str, str], Callable[[QdrantClient, str, Any], Any]] = {
    ("POST", "/query"): _query,
    ("POST", "/count"): _count,
    ("POST", "/scroll"): _scroll,
    ("PUT", ""): _put,
    ("POST", "/delete"): _delete,
}


def _handler(server: QdrantServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            server.connections.append(self.connection)

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = json.loads(body) if body else None
            status, result = server.answer(self.command, self.path, self.headers.get("api-key"), asked)
            if isinstance(result, BaseModel):
                result = json.loads(result.model_dump_json())
            said = {"time": 0.0, **(result if status != 200 else {"status": "ok", "result": result})}
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = _serve  # noqa: N815 - the base class's names

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            """Nothing: a test says what went wrong."""

    return Handler


@contextmanager
def qdrant_server() -> Iterator[QdrantServer]:
    """One that runs, and is stopped afterwards."""
    warnings.filterwarnings("ignore", "Payload indexes have no effect in the local Qdrant")
    server = QdrantServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def service_folder(folder: Path, port: int, password: str | None = None) -> Path:
    """A folder that `read_service` reads."""
    folder.mkdir(exist_ok=True)
    (folder / "url").write_text(f"http://127.0.0.1:{port}\n")
    if password is not None:
        (folder / "password").write_text(password)
    return folder

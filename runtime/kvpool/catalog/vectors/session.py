"""A client of a Qdrant server for one call at a time, with deadlines that hold; the only module that talks to one."""

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from threading import Lock
from typing import TypeVar

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from kvpool.catalog.vectors import layout
from kvpool.catalog.vectors.contract import VectorsMismatchError, VectorsUnavailableError
from kvpool.catalog.vectors.deadline_transport import Deadline, DeadlineTransport
from kvpool.config.service import ServiceAddress
from kvpool.errors import ConfigError

SCHEMES = ("http", "https")
_CONFLICT, _NOT_FOUND = 409, 404
_REASON_CHARS = 300
_INDEXES: dict[str, models.UuidIndexParams | models.KeywordIndexParams | models.IntegerIndexParams] = {
    layout.TREE: models.UuidIndexParams(type=models.UuidIndexType.UUID, is_tenant=True),
    layout.MODEL: models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD),
    layout.TENANT: models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD),
    layout.EPOCH: models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, lookup=True, range=True),
    layout.AT: models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, lookup=False, range=True),
}

_Result = TypeVar("_Result")


class Session:
    """Makes calls, one after the other, on one connection. Safe from any thread.

    After a call that failed there is a new connection, for which address and password are read anew.
    """

    def __init__(self, address: Callable[[], ServiceAddress], *, tls: bool) -> None:
        self._address = address
        self._tls = tls
        self._lock = Lock()
        self._deadline = Deadline()
        self._client: QdrantClient | None = None
        self._closed = False

    def call(self, work: Callable[[QdrantClient], _Result], deadline_s: float) -> _Result:
        """The result of `work`, with the collection there. Raises `VectorsUnavailableError` by the deadline at last."""
        until = time.monotonic() + deadline_s
        if not self._lock.acquire(timeout=max(0.0, deadline_s)):
            raise VectorsUnavailableError("another call takes too long")
        try:
            self._deadline.start(until - time.monotonic())
            with self._failures():
                return work(self._ready())
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the connection, after the call that uses it."""
        with self._lock:
            self._closed = True
            self._drop()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except VectorsUnavailableError:
            self._drop()
            raise
        except UnexpectedResponse as error:
            self._drop()
            text = error.content.decode(errors="replace")[:_REASON_CHARS]
            raise VectorsUnavailableError(f"HTTP {error.status_code} {error.reason_phrase}: {text}") from None
        except Exception as error:  # the client trusts what it is answered: nonsense ends in whatever it ends in
            self._drop()
            cause = error.source if isinstance(error, ResponseHandlingException) else error
            raise VectorsUnavailableError(f"{type(cause).__name__}: {cause}"[:_REASON_CHARS]) from None

    def _ready(self) -> QdrantClient:
        """A client, whose collection is there and is one of ours."""
        if self._closed:
            raise VectorsUnavailableError("it was closed")
        if self._client is None:
            self._client = _connected(self._address(), self._deadline, tls=self._tls)
            _check_collection(self._client)
        return self._client

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


def server_timeout(deadline_s: float) -> int:
    """What the server is told, in its whole seconds: it need not work on what nobody waits for."""
    return max(1, ceil(deadline_s))


def _connected(address: ServiceAddress, deadline: Deadline, *, tls: bool) -> QdrantClient:
    password = address.password or ""
    if not (password.isascii() and password.isprintable()):
        raise ConfigError("the password holds characters that no HTTP header can")
    url = address.parts._replace(scheme="https").geturl() if tls else address.url
    trusted = ssl.create_default_context(cafile=address.ca_file) if url.startswith("https:") else None
    return QdrantClient(
        url=url,
        headers={"api-key": password} if password else None,
        check_compatibility=False,
        transport=DeadlineTransport(deadline, trusted),
        trust_env=False,
    )


def _check_collection(client: QdrantClient) -> None:
    """Make the collection where there is none. Raises `VectorsMismatchError` where it is none of ours."""
    info = _info(client)
    if info is None:
        _create(client)
        info = client.get_collection(layout.NAME)
    vectors = info.config.params.vectors
    if not (
        isinstance(vectors, models.VectorParams)
        and (vectors.size, vectors.distance) == (layout.SIZE, models.Distance.COSINE)
    ):
        raise VectorsMismatchError(
            f"the collection {layout.NAME} holds vectors of another kind: {str(vectors)[:_REASON_CHARS]}; needed are "
            f"{layout.SIZE} dimensions compared by {layout.DISTANCE}: remove it, or rename it"
        )
    for name, index in _INDEXES.items():
        there = info.payload_schema.get(name)
        if there is None or there.data_type.value != index.type.value:
            client.create_payload_index(layout.NAME, name, index)


def _info(client: QdrantClient) -> models.CollectionInfo | None:
    try:
        return client.get_collection(layout.NAME)
    except UnexpectedResponse as error:
        if error.status_code == _NOT_FOUND:
            return None
        raise


def _create(client: QdrantClient) -> None:
    try:
        client.create_collection(
            layout.NAME,
            vectors_config=models.VectorParams(
                size=layout.SIZE, distance=models.Distance.COSINE, datatype=models.Datatype.FLOAT16
            ),
            hnsw_config=models.HnswConfigDiff(
                m=layout.HNSW_EDGES,
                ef_construct=layout.HNSW_BUILD_CANDIDATES,
                full_scan_threshold=layout.FULL_SCAN_KB,
            ),
            quantization_config=models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(
                    type=models.ScalarType.INT8, quantile=layout.INT8_QUANTILE, always_ram=True
                )
            ),
        )
    except UnexpectedResponse as error:
        if error.status_code != _CONFLICT:  # another process made it at the same time
            raise

"""HTTP whose deadlines hold whatever the server does.

httpx's timeouts are for one read or write: a server that sends a byte now and then keeps a call for ever. Here each
read and write gets what is left of the whole call's time, and an answer may have so many bytes and no more.
"""

import ssl
import time
from collections.abc import Iterable, Iterator, Sequence

import httpcore
import httpx

MAX_ANSWER_BYTES = 8 << 20
_WRITE_BYTES = 64 << 10
_ACCEPT_ENCODING = b"accept-encoding"


class Deadline:
    """What the current call may still use. Not safe for several threads."""

    def __init__(self) -> None:
        self._until = 0.0
        self._bytes_left = 0

    def start(self, seconds: float) -> None:
        """A call begins, which may take so long."""
        self._until = time.monotonic() + seconds
        self._bytes_left = MAX_ANSWER_BYTES

    def remaining_s(self) -> float:
        """Seconds that are left. Raises `httpcore.ReadTimeout` where none are."""
        remaining_s = self._until - time.monotonic()
        if remaining_s <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return remaining_s

    def arrived(self, nbytes: int) -> None:
        """So many bytes came. Raises `httpcore.ReadError` where those are too many."""
        self._bytes_left -= nbytes
        if self._bytes_left < 0:
            raise httpcore.ReadError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")


class DeadlineTransport(httpx.BaseTransport):
    """One connection, kept open between calls. Not safe for several threads."""

    def __init__(self, deadline: Deadline, tls: ssl.SSLContext | None) -> None:
        self._deadline = deadline
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls, max_connections=1, network_backend=_Backend(deadline), keepalive_expiry=30.0
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it, and read the answer whole. Raises `httpx.TransportError`."""
        url = request.url
        headers = [(name, value) for name, value in request.headers.raw if name.lower() != _ACCEPT_ENCODING]
        try:
            with self._pool.stream(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=[*headers, (_ACCEPT_ENCODING, b"identity")],
                content=request.read(),
            ) as answer:
                return httpx.Response(answer.status, headers=_plain(answer.headers), content=answer.read())
        except httpcore.TimeoutException as error:
            raise httpx.ReadTimeout(f"the deadline has passed ({error})", request=request) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            raise httpx.NetworkError(str(error) or type(error).__name__, request=request) from None

    def close(self) -> None:
        """Close the connection."""
        self._pool.close()


class _Backend(httpcore.SyncBackend):
    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        remaining_s = self._deadline.remaining_s()
        stream = super().connect_tcp(host, port, remaining_s, local_address, socket_options)
        return _Stream(stream, self._deadline)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._deadline.remaining_s())
        self._deadline.arrived(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for piece in _pieces(buffer):
            self._stream.write(piece, self._deadline.remaining_s())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._deadline.remaining_s())
        return _Stream(stream, self._deadline)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def _plain(headers: Sequence[tuple[bytes, bytes]]) -> Sequence[tuple[bytes, bytes]]:
    """Raise for an answer that is compressed, which was not asked for: a small one can unpack to any size."""
    if any(name.lower() == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
        raise httpcore.RemoteProtocolError("a compressed answer")
    return headers


def _pieces(buffer: bytes) -> Iterator[bytes]:
    for begin in range(0, len(buffer), _WRITE_BYTES):
        yield buffer[begin : begin + _WRITE_BYTES]

"""One connection to PostgreSQL whose waits have a deadline: psycopg's own have none, and libpq's are whole seconds.

A wait ends when the socket is ready, or after the connection's budget without that; then the connection is closed, for
what the server still sends would be taken for the answer to something else. So a server that is stopped, or a network
that swallows packets, costs one budget; a long answer that keeps coming costs as long as it takes.
"""

import ipaddress
import select
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import pq
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import TupleRow
from psycopg.waiting import Ready, Wait

from kvpool.catalog.host_lookup import HostLookup
from kvpool.config.service import ServiceAddress

T = TypeVar("T")

APPLICATION_NAME = "kvpool"
STATEMENT_TIMEOUT_S = 60
"""After this long the server itself gives a statement up, whatever became of the client that asked."""
IDLE_TRANSACTION_TIMEOUT_S = 30
"""After this long the server frees the locks of a client that stopped in the middle of a transaction."""
_SESSION = {
    "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
    "idle_in_transaction_session_timeout": f"{IDLE_TRANSACTION_TIMEOUT_S}s",
    "client_connection_check_interval": "1s",  # a statement whose client has given up ends soon, and so do its locks
    "default_transaction_isolation": "read\\ committed",
    "timezone": "UTC",
    "client_min_messages": "warning",
}
_KEEPALIVE = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_READ_ONLY = b"default_transaction_read_only"
_SYSTEM_CA = "system"
_READABLE, _WRITABLE = int(Ready.R), int(Ready.W)
_EVENTS = {Wait.R: select.POLLIN, Wait.W: select.POLLOUT, Wait.RW: select.POLLIN | select.POLLOUT}
_READY = {int(ready): ready for ready in Ready}
_ERROR = select.POLLERR | select.POLLHUP | select.POLLNVAL
_INPUT = select.POLLIN | _ERROR
_OUTPUT = select.POLLOUT | _ERROR


class StalledError(psycopg.OperationalError):
    """The server, or the way to it, did nothing for a whole budget. The connection is closed."""


class BoundedConnection(psycopg.Connection[TupleRow]):
    """A psycopg connection, in autocommit, that waits no longer than `budget_s` without progress. Made by `connect`.

    For one thread at a time. `budget_s` may be changed between statements.
    """

    budget_s: float
    _poll: select.poll
    _fd: int
    _events: int

    def __init__(self, pgconn: pq.abc.PGconn, row_factory: Any = psycopg.rows.tuple_row) -> None:
        super().__init__(pgconn, row_factory)
        self.budget_s = 1.0
        self.began_s: float | None = None
        """Since when, on the monotonic clock, the budget of the next wait counts; None: since it begins."""
        self.stalled = False
        self.prepared: set[bytes] = set()
        """Names of statements that were prepared by hand on this connection."""
        self._fd = pgconn.socket
        self._events = select.POLLIN
        self._poll = select.poll()
        self._poll.register(self._fd, self._events)

    @property
    def is_at_rest(self) -> bool:
        """Whether it is open, and neither a statement nor a transaction is under way."""
        return self.pgconn.transaction_status == pq.TransactionStatus.IDLE

    @property
    def is_usable(self) -> bool:
        """Whether it is at rest, and the server has said nothing meanwhile: that it goes away, as a rule."""
        return self.is_at_rest and not self._look(select.POLLIN, 0.0)

    @property
    def is_read_only(self) -> bool:
        """Whether the server said that it takes no writes: a standby, or told so by its administrator."""
        told = (self.pgconn.parameter_status(b"in_hot_standby"), self.pgconn.parameter_status(_READ_ONLY))
        return b"on" in told

    def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        """Consume one of psycopg's generators; it calls this for all that it waits for.

        Raises `StalledError` once nothing happened for `budget_s`. `interval` is not needed: a signal ends a wait.
        """
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            wanted = next(gen)
            while True:
                seen = self._look(_EVENTS[wanted], self._left_s)
                if not seen:
                    self._stall()
                ready = (_READABLE if seen & _INPUT else 0) | (_WRITABLE if seen & _OUTPUT else 0)
                wanted = gen.send(_READY[ready & wanted])
        except StopIteration as end:
            answer: T = end.value
            return answer

    @property
    def _left_s(self) -> float:
        if self.began_s is None:
            return self.budget_s
        began_s, self.began_s = self.began_s, None  # whatever comes is progress
        return max(0.0, began_s + self.budget_s - time.monotonic())

    def _stall(self) -> NoReturn:
        self.stalled = True
        self.pgconn.finish()
        raise StalledError(f"no answer within {in_words(self.budget_s)}")

    def _look(self, events: int, seconds: float) -> int:
        """What happened on the socket within this time; 0: nothing."""
        if events != self._events:
            self._poll.modify(self._fd, events)
            self._events = events
        return _first_event(self._poll, seconds)


def connect(address: ServiceAddress, *, budget_s: float, tls: bool, lookup: HostLookup) -> BoundedConnection:
    """Connect to the first of the address's hosts that answers and fits, each within its share of `budget_s`.

    The budget is time without progress here too. Raises `psycopg.Error`.
    """
    began = time.monotonic()
    parameters = _parameters(address, tls=tls)
    attempts = _attempts(parameters, budget_s, lookup)
    left_s = max(budget_s - (time.monotonic() - began), budget_s / 10)
    faults: list[psycopg.OperationalError] = []
    for attempt in attempts:
        try:
            return _connect(make_conninfo(**attempt), left_s / len(attempts), budget_s)
        except psycopg.OperationalError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    kind = StalledError if isinstance(faults[-1], StalledError) else psycopg.OperationalError
    raise kind("; ".join(str(fault).strip() for fault in faults)) from faults[-1]


def _connect(conninfo: str, connect_budget_s: float, budget_s: float) -> BoundedConnection:
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    try:
        _finish_connecting(pgconn, connect_budget_s)
        pgconn.nonblocking = 1
        connection = BoundedConnection(pgconn)
    except BaseException:
        pgconn.finish()
        raise
    connection.budget_s = budget_s
    connection.autocommit = True
    return connection


def _finish_connecting(pgconn: pq.abc.PGconn, budget_s: float) -> None:
    while pgconn.status != pq.ConnStatus.BAD:
        status = pgconn.connect_poll()
        if status == pq.PollingStatus.OK:
            return
        if status == pq.PollingStatus.FAILED:
            break
        poll = select.poll()  # the socket may be another one after each step
        poll.register(pgconn.socket, select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT)
        if not _first_event(poll, budget_s):
            raise StalledError(f"connecting: no answer within {in_words(budget_s)}")
    raise psycopg.OperationalError(pgconn.get_error_message())


def in_words(seconds: float) -> str:
    """A time as people say it: `100 ms`, `2.5 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{round(seconds, 1):g} s"


def _first_event(poll: select.poll, seconds: float) -> int:
    seen = poll.poll(seconds * 1000)
    return seen[0][1] if seen else 0


def _parameters(address: ServiceAddress, *, tls: bool) -> dict[str, Any]:
    """What libpq is to know. With `tls` the server must prove its name, whatever the url says."""
    parameters: dict[str, Any] = conninfo_to_dict(address.url)
    parameters |= {"application_name": APPLICATION_NAME, "client_encoding": "utf8", **_KEEPALIVE}
    parameters |= {"user": address.username or parameters.get("user"), "password": address.password}
    options = [parameters.get("options") or "", *(f"-c {name}={value}" for name, value in _SESSION.items())]
    parameters["options"] = " ".join(options).strip()
    parameters.setdefault("gssencmode", "disable")  # Kerberos' library waits as it likes
    if tls:
        parameters |= {"sslmode": "verify-full", "sslrootcert": _root_certificate(address.ca_file)}
    else:
        parameters.setdefault("sslmode", "disable")
    return parameters


def _root_certificate(ca_file: Path | None) -> str:
    return _SYSTEM_CA if ca_file is None else str(ca_file)


def _attempts(parameters: dict[str, Any], budget_s: float, lookup: HostLookup) -> list[dict[str, Any]]:
    """One set of parameters for each address of each host: libpq itself would look names up, and wait for that."""
    hosts = str(parameters.get("host") or "").split(",")
    ports = str(parameters.get("port") or "").split(",")
    if parameters.get("hostaddr") or hosts == [""]:
        return [parameters]
    if len(ports) not in (1, len(hosts)):
        raise psycopg.OperationalError(f"the url names {len(hosts)} hosts, but {len(ports)} ports")
    attempts: list[dict[str, Any]] = []
    fault: psycopg.OperationalError | None = None
    for number, host in enumerate(hosts):
        place = {**parameters, "host": host, "port": ports[number % len(ports)] or None}
        try:
            addresses = _addresses(host, budget_s / len(hosts), lookup)
        except psycopg.OperationalError as error:
            fault = error
        else:
            attempts += [{**place, "hostaddr": address} for address in addresses]
    if fault is not None and not attempts:
        raise fault
    return attempts


def _needs_no_lookup(host: str) -> bool:
    """Whether it is an address already, or the directory of a socket."""
    if host.startswith(("/", "@")):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _addresses(host: str, budget_s: float, lookup: HostLookup) -> Sequence[str | None]:
    """What `host` stands for; None: itself."""
    if _needs_no_lookup(host):
        return [None]
    try:
        return lookup.addresses(host, budget_s)
    except TimeoutError:
        raise StalledError(f"the name {host!r} was not resolved within {in_words(budget_s)}") from None
    except OSError as error:
        raise psycopg.OperationalError(f"the name {host!r} cannot be resolved: {error.strerror or error}") from None

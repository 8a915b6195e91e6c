"""Asks PostgreSQL which records there are, and leaves the waiting for later: with libpq's own calls.

psycopg's cursors wait where they send, and take longer for one row than the server does. What goes and comes is binary.
"""

import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import psycopg
from psycopg import pq
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

from kvpool.blocks.identity import BlockKey
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.catalog import payload_statements as sql
from kvpool.catalog.arrays import BYTEA_ARRAY, INT2_ARRAY, int2_array, key_array
from kvpool.catalog.bounded_connection import BoundedConnection
from kvpool.catalog.sessions import Sessions
from kvpool.tiers.tier import Found

_STATEMENT = sql.FIND.replace(b"%(keys)b", b"$1").replace(b"%(codecs)b", b"$2")
_NAME = b"kvpool_find"
_BINARY = 1
_TYPES, _FORMATS = (BYTEA_ARRAY, INT2_ARRAY), (_BINARY, _BINARY)
_Done = TypeVar("_Done")
_INT2_VALUE, _INT4_VALUE = struct.Struct(">h"), struct.Struct(">i")


class RecordInquiry:
    """Which of these blocks have a record: one statement, on a connection that is borrowed until `close`.

    The connection's budget counts from the beginning. Raises `TierUnavailableError`.
    """

    def __init__(self, sessions: Sessions, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        self._keys, self._codecs = keys, codecs
        self._lent: AbstractContextManager[BoundedConnection] | None = sessions.borrow()
        self._connection = self._lent.__enter__()
        self._or_give_back(self._begin)

    def answer(self) -> list[Found | None]:
        """As `Inquiry` says."""
        there = self._or_give_back(self._await)
        self._give_back()
        if not there:
            return [None] * len(self._keys)
        return [_first(there, key, self._codecs) for key in self._keys]

    def close(self) -> None:
        """As `Inquiry` says. A connection whose answer has not been read is closed."""
        self._give_back()

    def _begin(self) -> None:
        _send(self._connection, (key_array(self._keys), int2_array(self._codecs)))
        self._connection.began_s = time.monotonic()

    def _await(self) -> dict[tuple[bytes, int], int]:
        there = _rows(self._connection.wait(_result(self._connection.pgconn)))
        self._connection.began_s = None  # where nothing had to be waited for, it is still set
        return there

    def _or_give_back(self, work: Callable[[], _Done]) -> _Done:
        """What the work returns. What it raises is raised where the connection was borrowed, which closes it."""
        try:
            return work()
        except BaseException as fault:
            self._give_back(fault)
            raise

    def _give_back(self, fault: BaseException | None = None) -> None:
        lent, self._lent = self._lent, None
        if lent is None:
            return
        if fault is None:
            lent.__exit__(None, None, None)
        else:
            lent.__exit__(type(fault), fault, fault.__traceback__)


def _send(connection: BoundedConnection, parameters: tuple[bytes, bytes]) -> None:
    """Send the statement, as far as that needs no waiting."""
    pgconn = connection.pgconn
    if connection.prepare_threshold is None:
        pgconn.send_query_params(_STATEMENT, parameters, _TYPES, _FORMATS, _BINARY)
    else:
        if _NAME not in connection.prepared:
            pgconn.send_prepare(_NAME, _STATEMENT, _TYPES)
            connection.wait(_result(pgconn))
            connection.prepared.add(_NAME)
        pgconn.send_query_prepared(_NAME, parameters, _FORMATS, _BINARY)
    pgconn.flush()


def _result(pgconn: pq.abc.PGconn) -> PQGen[pq.abc.PGresult]:
    """What the statement that was sent brought. Raises `psycopg.Error`."""
    while pgconn.flush():
        ready = yield Wait.RW
        if ready & Ready.R:
            pgconn.consume_input()
    results: list[pq.abc.PGresult] = []
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            break
        results.append(result)
    if not results:
        raise psycopg.OperationalError(pgconn.get_error_message())
    result = results[0]
    if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
        state = result.error_field(pq.DiagnosticField.SQLSTATE) or b""
        message = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message
        raise _error_of(state.decode())(message.decode(errors="replace"))
    return result


def _error_of(sqlstate: str) -> type[psycopg.Error]:
    try:
        return psycopg.errors.lookup(sqlstate)
    except KeyError:
        return psycopg.OperationalError


def _rows(result: pq.abc.PGresult) -> dict[tuple[bytes, int], int]:
    """The length of each record that there is, by its key and codec."""
    there: dict[tuple[bytes, int], int] = {}
    for row in range(result.ntuples):
        key, codec, nbytes = (result.get_value(row, column) or b"" for column in range(3))
        length = _INT4_VALUE.unpack(nbytes)[0]
        if length >= PAGE_BYTES and not length % PAGE_BYTES:
            there[key, _INT2_VALUE.unpack(codec)[0]] = length
    return there


def _first(there: dict[tuple[bytes, int], int], key: BlockKey, codecs: Sequence[int]) -> Found | None:
    for codec in codecs:
        nbytes = there.get((key, codec))
        if nbytes is not None:
            return Found(key, codec, nbytes)
    return None

"""Reads records out of PostgreSQL straight into buffers: COPY in its binary format, a row at a time.

A row is in memory once, as libpq hands it out, and is copied once, without the interpreter's lock; as the result of a
query it would be copied by psycopg too, with the lock, which takes twice as long for records of 2 MiB.

    the first message   "PGCOPY\\n\\xff\\r\\n\\0", flags (4), length of what follows (4), that, and the first row
    a row               3 (2); 8 (4), its place from 1 on (8); 1 (4), whether it is stale (1); length (4), the record
    the end             -1 (2)
"""

import struct
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import psycopg

from kvpool.catalog import payload_statements as sql
from kvpool.catalog.bounded_connection import BoundedConnection
from kvpool.tiers.tier import Found

_COPY = b"copy (%b) to stdout (format binary)" % sql.GET
_SIGNATURE = b"PGCOPY\n\xff\r\n\0"
_HEADER = struct.Struct(f">{len(_SIGNATURE)}siI")
_ROW = struct.Struct(">hiqi?i")
_FIELDS = (3, 8, 1)
_END = b"\xff\xff"


def read_records(
    connection: BoundedConnection,
    wanted: Sequence[Found],
    views: Sequence[Any],
    done: list[bool],
    refresh: timedelta,
) -> bool:
    """Copy what is there into the arrays, which have its length, and note it as done as it arrives.

    Returns whether one of them was last used longer than `refresh` ago. Raises `psycopg.Error`.
    """
    parameters = {
        "keys": [found.key for found in wanted],
        "codecs": [found.codec for found in wanted],
        "lengths": [found.record_bytes for found in wanted],
        "refresh": refresh,
    }
    stale = False
    with connection.cursor().copy(_COPY, parameters) as rows:
        while message := rows.read():
            start = _start(message)
            if message[start : start + len(_END)] == _END:
                continue
            fields, place_bytes, place, stale_bytes, is_stale, nbytes = _ROW.unpack_from(message, start)
            if (fields, place_bytes, stale_bytes) != _FIELDS or nbytes != views[place - 1].nbytes:
                raise psycopg.DataError("a row came back in another form than it was asked for")
            np.copyto(views[place - 1], np.frombuffer(message, np.uint8, nbytes, start + _ROW.size))
            done[place - 1] = True
            stale = stale or is_stale
    return stale


def _start(message: Any) -> int:
    """Where the row begins."""
    if message[: len(_SIGNATURE)] != _SIGNATURE:
        return 0
    *_, more = _HEADER.unpack_from(message)
    return _HEADER.size + int(more)

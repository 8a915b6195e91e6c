"""Arrays as PostgreSQL takes them in binary, of values that all have one length.

psycopg looks at each element by itself, which takes four times as long for the keys of many blocks.

    an array    dimensions: 1 (4), whether there are nulls: 0 (4), type (4), length (4), first index: 1 (4), elements
    an element  length (4), bytes
"""

import struct
from collections.abc import Sequence

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

from kvpool.blocks.identity import KEY_BYTES, BlockKey

BYTEA_ARRAY, INT2_ARRAY = 1001, 1005
_BYTEA, _INT2 = 17, 21
_HEAD = struct.Struct(">iiIii")
_KEY_LENGTH = struct.pack(">i", KEY_BYTES)
_INT2_ELEMENT = struct.Struct(">ih")


class KeyArray(tuple[BlockKey, ...]):
    """Keys of blocks, as the parameter of a statement: `%(keys)b::bytea[]`."""

    __slots__ = ()


class _KeyArrayDumper(Dumper):
    format = Format.BINARY
    oid = BYTEA_ARRAY

    def dump(self, obj: KeyArray) -> bytes:
        return key_array(obj)


psycopg.adapters.register_dumper(KeyArray, _KeyArrayDumper)


def key_array(keys: Sequence[BlockKey]) -> bytes:
    """`bytea[]` of keys of blocks."""
    return _head(_BYTEA, len(keys)) + b"".join([_KEY_LENGTH + key for key in keys])


def int2_array(values: Sequence[int]) -> bytes:
    """`smallint[]`."""
    return _head(_INT2, len(values)) + b"".join([_INT2_ELEMENT.pack(2, value) for value in values])


def _head(element: int, length: int) -> bytes:
    return _HEAD.pack(1, 0, element, length, 1)

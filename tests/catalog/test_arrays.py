"""Arrays that we pack ourselves are what the server takes them for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.adapt import PyFormat, Transformer
from psycopg.types.numeric import Int2

from kvpool.blocks.identity import KEY_BYTES, BlockKey
from kvpool.catalog.arrays import BYTEA_ARRAY, INT2_ARRAY, KeyArray, int2_array, key_array
from kvpool.catalog.statement import Statement
from tests.catalog.samples import Database

KEYS = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES).map(BlockKey), min_size=1, max_size=40)


def by_psycopg(values: Sequence[object], oid: int) -> bytes:
    array = list(values)
    dumper = Transformer().get_dumper(array, PyFormat.BINARY)
    assert dumper.oid == oid
    packed = dumper.dump(array)
    assert packed is not None
    return bytes(packed)


@given(KEYS)
def test_keys_are_packed_as_psycopg_packs_them(keys: list[BlockKey]) -> None:
    assert key_array(keys) == by_psycopg(keys, BYTEA_ARRAY)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_codecs_are_packed_as_psycopg_packs_them(codecs: list[int]) -> None:
    assert int2_array(codecs) == by_psycopg([Int2(codec) for codec in codecs], INT2_ARRAY)


@pytest.mark.parametrize("number", [0, 1, 300])
def test_the_server_gets_as_many_keys_as_there_are(catalog: Database, number: int) -> None:
    keys = [BlockKey(at.to_bytes(KEY_BYTES, "little")) for at in range(number)]
    answer = catalog.connection.execute(Statement("select %(keys)b::bytea[]"), {"keys": KeyArray(keys)}, binary=True)
    assert answer.fetchone() == (keys,)

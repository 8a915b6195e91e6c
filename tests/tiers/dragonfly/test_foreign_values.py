"""What other programs put under our keys is a miss, and costs neither memory nor anybody's buffer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.blocks.record import CODEC_NONE
from kvpool.tiers.dragonfly.names import Names
from kvpool.tiers.dragonfly.tier import DragonflyTier
from kvpool.tiers.tier import Moved
from tests.tiers.dragonfly.servers import tier_of
from tests.tiers.keyed_conformance import chain, found_of, holds, keys_of, put, tree_of

TREE = tree_of()
PATTERN = 0x33
FOREIGN: dict[str, Callable[[Any, bytes], object]] = {
    "a short string": lambda client, name: client.set(name, "hello"),
    "an empty string": lambda client, name: client.set(name, ""),
    "a head alone": lambda client, name: client.set(name, bytes(PAGE_BYTES)),
    "a string that ends within a page": lambda client, name: client.set(name, bytes(3 * PAGE_BYTES + 1)),
    "a number": lambda client, name: client.set(name, 7),
    "a hash": lambda client, name: client.hset(name, "field", "value"),
    "a list": lambda client, name: client.rpush(name, "value"),
    "a sorted set": lambda client, name: client.zadd(name, {"member": 1}),
    "a stream": lambda client, name: client.xadd(name, {"field": "value"}),
}


@pytest.fixture
def tier(folder: Path) -> Iterator[DragonflyTier]:
    tier = tier_of(folder)
    yield tier
    tier.close()


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_value_that_can_be_no_record_is_not_there_and_is_written_over(
    tier: DragonflyTier, client: Any, foreign: Callable[[Any, bytes], object]
) -> None:
    records = chain(3)
    put(tier, TREE, records)
    name = Names(TREE).of(records[1].key, CODEC_NONE)
    client.delete(name)
    foreign(client, name)
    found = tier.find(TREE, keys_of(records), [CODEC_NONE])
    assert [block is not None for block in found] == [True, False, True]
    buffers = [np.full(sealed.record.nbytes, PATTERN, np.uint8) for sealed in records]
    moved = tier.get(TREE, [found_of(sealed) for sealed in records], buffers)
    assert moved == Moved([True, False, True])
    assert (buffers[1] == PATTERN).all()
    tier.touch(TREE, keys_of(records), [CODEC_NONE])
    put(tier, TREE, records)
    assert all(holds(tier, TREE, sealed) for sealed in records)
    assert client.pttl(name) > 0


@pytest.mark.parametrize("payload_bytes", [5000, 1 << 20])
@pytest.mark.parametrize("longer_bytes", [1, PAGE_BYTES, 200 << 20])
def test_a_value_that_is_too_long_does_not_come_and_takes_no_memory(
    tier: DragonflyTier, client: Any, payload_bytes: int, longer_bytes: int
) -> None:
    records = chain(3, payload_bytes)
    put(tier, TREE, records)
    nbytes = records[1].record.nbytes
    client.setrange(Names(TREE).of(records[1].key, CODEC_NONE), nbytes + longer_bytes - 1, "x")
    memory = bytearray([PATTERN]) * (nbytes + 2 * PAGE_BYTES)
    inner = memoryview(memory)[PAGE_BYTES : PAGE_BYTES + nbytes]
    first, last = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    tracemalloc.start()
    moved = tier.get(TREE, [found_of(sealed) for sealed in records], [first, inner, last])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert moved == Moved([True, False, True])
    assert peak_bytes < 200_000
    assert memory[:PAGE_BYTES] == memory[-PAGE_BYTES:] == bytearray([PATTERN]) * PAGE_BYTES
    assert np.array_equal(first, records[0].record)
    assert np.array_equal(last, records[2].record)


def test_bytes_that_were_flipped_on_the_server_come_as_they_are(tier: DragonflyTier, client: Any) -> None:
    [sealed] = chain(1)
    put(tier, TREE, [sealed])
    client.setrange(Names(TREE).of(sealed.key, CODEC_NONE), 4321, b"\xff\x00\xff")
    buffer = np.empty(sealed.record.nbytes, np.uint8)
    assert tier.get(TREE, [found_of(sealed)], [buffer]) == Moved([True])
    wrong = np.flatnonzero(buffer != sealed.record)
    assert wrong.size > 0
    assert set(wrong) <= {4321, 4322, 4323}

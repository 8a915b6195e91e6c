"""Answers by key: where blocks lie, as far as the catalog was told, and why copies of them went."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import psycopg

from kvpool.blocks.identity import BlockKey
from kvpool.catalog.arrays import KeyArray
from kvpool.catalog.statement import Statement
from kvpool.tiers.tier import TierName

Connection: TypeAlias = psycopg.Connection[Any]

_TIERS = {tier.value: tier for tier in TierName}
_AT_ONCE = 64
"""Rows that are objects at a time: with 256 of them the garbage collector came at each call, and took a fifth of it."""

LOCATE = Statement("""
    select key, tier, uuid_send(node), codec, nbytes, date_part('epoch', since)
    from kvpool.locations where key = any(%(keys)b::bytea[])
""")

LOCATE_ONE = Statement("""
    select key, tier, uuid_send(node), codec, nbytes, date_part('epoch', since)
    from kvpool.locations where key = %(key)b
""")

TRAIL = Statement("""
    select wanted.key, last.tier, last.node, last.reason, date_part('epoch', last.at)
    from unnest(%(keys)b::bytea[]) wanted (key)
         cross join lateral (
             select tier, node, reason, at from kvpool.evictions e where e.key = wanted.key order by id desc limit 1
         ) last
""")


class Location(NamedTuple):
    """A copy of a block."""

    tier: TierName
    node: UUID
    """Zero where all nodes share the tier."""
    codec: int
    nbytes: int
    since_s: float
    """When it was written, in seconds since the epoch."""


class Eviction(NamedTuple):
    """How the last copy that went did so."""

    tier: TierName
    node: UUID
    reason: str
    at_s: float


def locate(connection: Connection, keys: Sequence[BlockKey]) -> Mapping[BlockKey, list[Location]]:
    """Where these blocks lie, each one's oldest copy first; no entry where it lies nowhere, as far as is known."""
    found: dict[BlockKey, list[Location]] = {}
    if len(keys) == 1:
        rows = connection.execute(LOCATE_ONE, {"key": keys[0]}, binary=True)
    else:
        rows = connection.execute(LOCATE, {"keys": KeyArray(keys)}, binary=True)
    while some := rows.fetchmany(_AT_ONCE):
        for key, tier, node, codec, nbytes, since_s in some:
            found.setdefault(key, []).append(Location(_TIERS[tier], _node(node), codec, nbytes, since_s))
    for copies in found.values():
        if len(copies) > 1:
            copies.sort(key=attrgetter("since_s"))
    return found


@lru_cache(1_024)
def _node(raw: bytes) -> UUID:
    return UUID(bytes=raw)


def trail(connection: Connection, keys: Sequence[BlockKey]) -> Mapping[BlockKey, Eviction]:
    """How a copy of each of these blocks went last; no entry where none did, or so long ago that it is forgotten."""
    rows = connection.execute(TRAIL, {"keys": KeyArray(keys)}, binary=True).fetchall()
    return {key: Eviction(_TIERS[tier], node, reason, at_s) for key, tier, node, reason, at_s in rows}

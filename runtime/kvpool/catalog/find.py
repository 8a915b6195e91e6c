"""Finds blocks and prompts by what the catalog knows of them, a page at a time, in the order of their last use.

A statement is put together from parts that are written here; all that a caller says goes into parameters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

import psycopg

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest
from kvpool.catalog.statement import Statement
from kvpool.errors import InputError

Connection: TypeAlias = psycopg.Connection[Any]
Row = TypeVar("Row")

MAX_PAGE = 10_000
MAX_DESCENDANTS = 100_000
"""Of so many blocks after a prefix is known that they come after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What is looked for: all that is given must hold. Times are in seconds since the epoch."""

    fingerprint: Fingerprint
    tenant: TenantDigest | None = None
    epoch: int = 0
    """Rows of earlier epochs are not found; of use with a tenant only."""
    under: BlockKey | None = None
    """The key of a prefix's last block: that block, and all that come after it."""
    keys: Sequence[BlockKey] | None = None
    """Blocks of these keys, or prompts whose last blocks they are."""
    used_before_s: float | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    """What the metadata must contain: JSON values, objects and lists by containment, everything else by equality."""
    limit: int = 1_000
    after: "Cursor | None" = None
    """Where the page before ended."""

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= MAX_PAGE:
            raise InputError(f"limit is {self.limit}; it must be 1 to {MAX_PAGE}")
        try:
            json.dumps(dict(self.where), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"where can hold only what JSON can: {error}") from None


class Cursor(NamedTuple):
    """The last row of a page: what follows it is the next page."""

    tenant: TenantDigest
    used_us: int
    """In microseconds since the epoch: exactly what the database has."""
    last: bytes | int


class FoundBlock(NamedTuple):
    """A block that the catalog knows; where it lies, `locate` says."""

    key: BlockKey
    tenant: TenantDigest
    epoch: int
    parent: BlockKey
    depth: int
    tokens: int
    created_s: float
    last_used_s: float
    hits: int
    metadata: dict[str, Any]
    version: int


class FoundPrompt(NamedTuple):
    """A prompt that was asked for."""

    id: int
    tenant: TenantDigest
    epoch: int
    leaf: BlockKey
    tokens: int
    first_asked_s: float
    last_asked_s: float
    asks: int
    embedding: UUID | None
    metadata: dict[str, Any]
    version: int


class Page(NamedTuple, Generic[Row]):
    """Some of what was found, used longest ago first; of all tenants, tenant by tenant."""

    rows: list[Row]
    next: Cursor | None
    """`Filters.after` of the next page; None: there is none."""


class Shape(NamedTuple):
    """Which filters a statement has."""

    tenant: bool
    under: bool
    keys: bool
    used_before: bool
    where: bool
    after: bool


_BLOCK_COLUMNS = """key, tenant, epoch, parent, depth, tokens, extract(epoch from created_at)::float8,
        extract(epoch from last_used_at)::float8, hits, metadata, version,
        (extract(epoch from last_used_at) * 1000000)::bigint, key"""
_PROMPT_COLUMNS = """id, tenant, epoch, leaf, tokens, extract(epoch from first_asked_at)::float8,
        extract(epoch from last_asked_at)::float8, asks, embedding, metadata, version,
        (extract(epoch from last_asked_at) * 1000000)::bigint, id"""
_DESCENDANTS = f"""
    with recursive below (key) as (
        select %(under)b::bytea
        union all
        select child.key from below cross join lateral (
            select b.key from kvpool.blocks b where b.parent = below.key offset 0) child
    ), wanted (member) as materialized (select key from below limit {MAX_DESCENDANTS})"""  # noqa: S608 - a constant
_MICROSECONDS = "timestamptz 'epoch' + %(used_us)s * interval '1 microsecond'"


def find_blocks(connection: Connection, filters: Filters) -> Page[FoundBlock]:
    """The blocks of which all that is asked holds."""
    rows = connection.execute(blocks_statement(_shape(filters)), _parameters(filters), binary=True).fetchall()
    return _page(rows, filters.limit, FoundBlock)


def find_prompts(connection: Connection, filters: Filters) -> Page[FoundPrompt]:
    """The prompts of which all that is asked holds."""
    rows = connection.execute(prompts_statement(_shape(filters)), _parameters(filters), binary=True).fetchall()
    return _page(rows, filters.limit, FoundPrompt)


@cache
def blocks_statement(shape: Shape) -> Statement:
    """The statement that finds blocks by these filters."""
    return _statement(shape, "kvpool.blocks", _BLOCK_COLUMNS, key="key", used="last_used_at", last="key", cast="bytea")


@cache
def prompts_statement(shape: Shape) -> Statement:
    """The statement that finds prompts by these filters."""
    return _statement(
        shape, "kvpool.prompts", _PROMPT_COLUMNS, key="leaf", used="last_asked_at", last="id", cast="bigint"
    )


def all_shapes() -> Sequence[Shape]:
    """Every combination of filters: what can be sent at all."""
    return [Shape(*flags) for flags in product((False, True), repeat=len(Shape._fields))]


def _statement(shape: Shape, table: str, columns: str, *, key: str, used: str, last: str, cast: str) -> Statement:
    conditions = ["found.fingerprint = %(fingerprint)b"]
    if shape.tenant:
        conditions.append("found.tenant = %(tenant)b and found.epoch >= %(epoch)s")
    if shape.keys:
        conditions.append(f"found.{key} = any(%(keys)b::bytea[])")
    if shape.used_before:
        conditions.append(f"found.{used} < to_timestamp(%(used_before_s)s::float8)")
    if shape.where:
        conditions.append("found.metadata <> '{}' and found.metadata @> %(where)s::jsonb")
    if shape.after:
        begins = f"(found.tenant, found.{used}, found.{last}) > (%(after_tenant)b, {_MICROSECONDS}, %(last)b::{cast})"
        conditions.append(begins)
    source = f"from {table} found"
    if shape.under:  # one by one: how many there are, the planner cannot know
        one = f"select * from {table} t where t.{key} = wanted.member offset 0"  # noqa: S608 - of constants
        source = f"from wanted cross join lateral ({one}) found"
    return Statement(
        f"{_DESCENDANTS if shape.under else ''} select {columns} {source} where {' and '.join(conditions)} "
        f"order by found.tenant, found.{used}, found.{last} limit %(limit)s"
    )


def _shape(filters: Filters) -> Shape:
    return Shape(
        tenant=filters.tenant is not None,
        under=filters.under is not None,
        keys=filters.keys is not None,
        used_before=filters.used_before_s is not None,
        where=bool(filters.where),
        after=filters.after is not None,
    )


def _parameters(filters: Filters) -> dict[str, Any]:
    after = filters.after or Cursor(TenantDigest(b""), 0, 0)
    return {
        "fingerprint": filters.fingerprint,
        "tenant": filters.tenant,
        "epoch": filters.epoch,
        "under": filters.under,
        "keys": None if filters.keys is None else list(filters.keys),
        "used_before_s": filters.used_before_s,
        "where": json.dumps(dict(filters.where)),
        "after_tenant": after.tenant,
        "used_us": after.used_us,
        "last": after.last,
        "limit": filters.limit + 1,
    }


def _page(rows: Sequence[tuple[Any, ...]], limit: int, made: type[Row]) -> Page[Row]:
    """One row more than a page was asked for: whether it came tells whether there is another page."""
    found = [made(*row[:-2]) for row in rows[:limit]]
    if len(rows) <= limit:
        return Page(found, None)
    _, tenant, *_, used_us, last = rows[limit - 1]
    return Page(found, Cursor(tenant, used_us, last))

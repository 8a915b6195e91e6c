"""Takes the rows of a tenant, a model or a node out of the catalog: a few thousand at a time, each in a transaction.

Each pass may be repeated, so may the whole, and it ends when a pass has found nothing; between passes others get their
turn. Nothing is left of a block that goes: not its locations, and not its trail.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID

import psycopg

from kvpool.blocks.identity import Fingerprint, TenantDigest
from kvpool.catalog.rows import Alone, ModelForgotten, TenantErased, TiersCleared
from kvpool.catalog.statement import LOOK_UP, Statement
from kvpool.tiers.tier import TierName

Connection: TypeAlias = psycopg.Connection[Any]

PASS_ROWS = 2_000

_MODELS = Statement("select fingerprint from kvpool.models")

_TENANTS_BLOCKS = Statement("""
    select key from kvpool.blocks where key = any(array(
        select key from kvpool.blocks
        where fingerprint = %(fingerprint)b and tenant = %(tenant)b and epoch < %(epoch)s
        order by last_used_at, key limit %(rows)s))
    order by key for update
""")
"""In the order of their use, in which those of an erased epoch come first."""

_MODELS_BLOCKS = Statement("""
    select key from kvpool.blocks where key = any(array(
        select key from kvpool.blocks where fingerprint = %(fingerprint)b
        order by tenant, last_used_at, key limit %(rows)s))
    order by key for update
""")

_DELETE_LOCATIONS = Statement("delete from kvpool.locations where key = any(%(keys)b::bytea[])")
_DELETE_TRAIL = Statement("delete from kvpool.evictions where key = any(%(keys)b::bytea[])")
_DELETE_BLOCKS = Statement("delete from kvpool.blocks where key = any(%(keys)b::bytea[])")

_TENANTS_PROMPTS = Statement("""
    delete from kvpool.prompts where id = any(array(
        select id from kvpool.prompts
        where fingerprint = %(fingerprint)b and tenant = %(tenant)b and epoch < %(epoch)s
        order by last_asked_at, id limit %(rows)s))
""")

_MODELS_PROMPTS = Statement("""
    delete from kvpool.prompts where id = any(array(
        select id from kvpool.prompts where fingerprint = %(fingerprint)b
        order by tenant, last_asked_at, id limit %(rows)s))
""")

_TENANTS_SHARED = Statement("delete from kvpool.shared_prefixes where tenant = %(tenant)b and epoch < %(epoch)s")
_TENANTS_USAGE = Statement("delete from kvpool.usage where tenant = %(tenant)b")
_MODELS_HOLDINGS = Statement("delete from kvpool.holdings where fingerprint = %(fingerprint)b")
_FORGET_MODEL = Statement("delete from kvpool.models where fingerprint = %(fingerprint)b")

_CLEAR = Statement("""
    with gone as (
        delete from kvpool.locations where ctid = any(array(
            select ctid from kvpool.locations where node = %(node)s::uuid and tier = any(%(tiers)s::text[])
            order by node limit %(rows)s for update))
        returning key, tier, node
    )
    insert into kvpool.evictions (key, tier, node, reason, at)
    select key, tier, node, %(reason)s::text, to_timestamp(%(at)s::float8) from gone
""")


def write_alone(connection: Connection, node: UUID, op: Alone, *, passes: int) -> bool:
    """Do what a report of this kind says, as far as so many passes get; whether that was all of it."""
    match op:
        case TenantErased():
            removed = _Removal(connection, passes)
            return removed.by(_of_tenant(connection, op.tenant, op.epoch)) and _last_of_tenant(connection, op)
        case ModelForgotten():
            removed = _Removal(connection, passes)
            return removed.by(_of_model(connection, op.fingerprint)) and _last_of_model(connection, op)
        case TiersCleared():
            return clear_tiers(connection, node, op.tiers, op.reason, op.at_s, passes=passes)


def clear_tiers(
    connection: Connection, node: UUID, tiers: Sequence[TierName], reason: str, at_s: float, *, passes: int
) -> bool:
    """Remove what a node holds in these tiers, as far as so many passes get; whether that was all.

    The trail says why.
    """
    of_node = {"node": node, "tiers": [tier.value for tier in tiers], "reason": reason, "at": at_s, "rows": PASS_ROWS}
    return _Removal(connection, passes).by([partial(_remove, connection, _CLEAR, of_node)])


def remove_blocks(connection: Connection, keys: Sequence[bytes]) -> int:
    """Remove blocks whose rows this transaction has locked, with all that is about them; how many those were."""
    if not keys:
        return 0
    these = {"keys": keys}
    connection.execute(_DELETE_LOCATIONS, these)
    connection.execute(_DELETE_TRAIL, these)
    return connection.execute(_DELETE_BLOCKS, these).rowcount


class _Removal:
    """Passes in transactions of their own, until there is nothing more, or as many as were asked for."""

    def __init__(self, connection: Connection, passes: int) -> None:
        self._connection = connection
        self._left = passes

    def by(self, steps: Iterable[Callable[[], int]]) -> bool:
        """Repeat each step until it has found nothing; whether all did. One that finds nothing counts for no pass."""
        for step in steps:
            while self._once(step):
                self._left -= 1
                if self._left <= 0:
                    return False
        return True

    def _once(self, step: Callable[[], int]) -> int:
        with self._connection.transaction():
            self._connection.execute(LOOK_UP)
            return step()


def _of_tenant(connection: Connection, tenant: TenantDigest, before_epoch: int) -> Iterator[Callable[[], int]]:
    """What removes blocks and prompts. `hold_epochs` has seen to it that none comes after the epoch was raised."""
    for (fingerprint,) in connection.execute(_MODELS).fetchall():
        of_tenant = {"fingerprint": fingerprint, "tenant": tenant, "epoch": before_epoch, "rows": PASS_ROWS}
        yield partial(_remove_blocks, connection, _TENANTS_BLOCKS, of_tenant)
        yield partial(_remove, connection, _TENANTS_PROMPTS, of_tenant)


def _last_of_tenant(connection: Connection, op: TenantErased) -> bool:
    with connection.transaction():
        connection.execute(_TENANTS_SHARED, {"tenant": op.tenant, "epoch": op.epoch})
        connection.execute(_TENANTS_USAGE, {"tenant": op.tenant})
    return True


def _of_model(connection: Connection, fingerprint: Fingerprint) -> Iterator[Callable[[], int]]:
    of_model = {"fingerprint": fingerprint, "rows": PASS_ROWS}
    yield partial(_remove_blocks, connection, _MODELS_BLOCKS, of_model)
    yield partial(_remove, connection, _MODELS_PROMPTS, of_model)


def _last_of_model(connection: Connection, op: ModelForgotten) -> bool:
    with connection.transaction():
        connection.execute(_FORGET_MODEL, {"fingerprint": op.fingerprint})
        connection.execute(_MODELS_HOLDINGS, {"fingerprint": op.fingerprint})
    return True


def _remove_blocks(connection: Connection, which: Statement, parameters: dict[str, Any]) -> int:
    return remove_blocks(connection, [key for (key,) in connection.execute(which, parameters).fetchall()])


def _remove(connection: Connection, statement: Statement, parameters: dict[str, Any]) -> int:
    return connection.execute(statement, parameters).rowcount

"""Keeps the catalog within its bounds: the trail and the prompts to the newest, sums folded, what is long gone removed.

Every node does this, a few thousand rows at a time, and none waits for another: rows that somebody else is at are left
to him. Each function is one pass in a transaction of its own, and says whether there may be more to do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from uuid import UUID

import psycopg

from kvpool.catalog.erasing import PASS_ROWS, clear_tiers, remove_blocks
from kvpool.catalog.rows import NO_NODE
from kvpool.catalog.statement import LOOK_UP, Statement
from kvpool.tiers.tier import TierName

Connection: TypeAlias = psycopg.Connection[Any]

DAY_S = 86_400.0
FOLD_AFTER = 10_000
FOLD_ROWS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogLimits:
    """How much the catalog keeps. Times are seconds since a row was last written."""

    evictions: int = 1_000_000
    eviction_age_s: float = 30 * DAY_S
    prompts: int = 1_000_000
    prompt_age_s: float = 90 * DAY_S
    node_age_s: float = 30 * DAY_S
    """A node that has written nothing for so long holds nothing any more. Its journal, if it ever comes back, may then
    bring a batch a second time whose answer was lost at the end: at worst it counts some hits twice."""
    usage_age_s: float = 7 * DAY_S
    """A session's counters that have not changed for so long are added up with those of others."""
    shared_age_s: float = DAY_S
    ttl_s: Mapping[TierName, float] = field(default_factory=dict)
    """For tiers that forget by themselves, how long after a copy was written."""


_TRIM_TRAIL = Statement("""
    delete from kvpool.evictions where id = any(array(
        select id from (
            select id, at from kvpool.evictions order by id limit %(rows)s for update skip locked
        ) oldest
        where id <= (select max(id) from kvpool.evictions) - %(most)s or at < now() - %(age_s)s * interval '1 second'))
    returning key
""")

_BARE_BLOCKS = Statement("""
    select key from kvpool.blocks b
    where key = any(%(keys)b::bytea[])
          and not exists (select from kvpool.locations l where l.key = b.key)
          and not exists (select from kvpool.evictions e where e.key = b.key)
    order by key for update
""")

_STILL_BARE = Statement("""
    select key from kvpool.blocks b
    where key = any(%(keys)b::bytea[]) and not exists (select from kvpool.locations l where l.key = b.key)
""")
"""Asked once the rows are locked, so that no location can be added any more."""

_TRIM_PROMPTS = Statement("""
    delete from kvpool.prompts where id = any(array(
        select id from kvpool.prompts
        where last_asked_at < greatest(
            now() - %(age_s)s * interval '1 second',
            (select last_asked_at from kvpool.prompts order by last_asked_at desc offset %(most)s limit 1))
        order by last_asked_at limit %(rows)s for update skip locked))
""")

_EXPIRE = Statement("""
    with gone as (
        delete from kvpool.locations where ctid = any(array(
            select ctid from kvpool.locations
            where node = %(node)s::uuid and tier = %(tier)s and since < now() - %(age_s)s * interval '1 second'
            order by since limit %(rows)s for update skip locked))
        returning key, tier, node
    )
    insert into kvpool.evictions (key, tier, node, reason, at) select key, tier, node, 'ttl', now() from gone
""")

_FOLD_IS_DUE = Statement("select coalesce(max(id) - min(id), 0) >= %(after)s from kvpool.holdings")

_FOLD_HOLDINGS = Statement("""
    with taken as (
        delete from kvpool.holdings where id = any(array(
            select id from kvpool.holdings order by id limit %(rows)s for update skip locked))
        returning fingerprint, tenant, tier, day, blocks, nbytes
    )
    insert into kvpool.holdings (fingerprint, tenant, tier, day, blocks, nbytes)
    select fingerprint, tenant, tier, day, sum(blocks), sum(nbytes) from taken
    group by fingerprint, tenant, tier, day having sum(blocks) <> 0 or sum(nbytes) <> 0
""")

_FOLD_USAGE = Statement("""
    with taken as (
        delete from kvpool.usage where ctid = any(array(
            select ctid from kvpool.usage
            where node <> %(node)s::uuid and reported_at < now() - %(age_s)s * interval '1 second'
            limit %(rows)s for update skip locked))
        returning *
    )
    insert into kvpool.usage (
        node, session, fingerprint, tenant, asked_blocks, matched_blocks, loaded_gpu, loaded_ram, loaded_dragonfly,
        loaded_database, loaded_ssd, saved_tokens, saved_prefill_s, reported_at)
    select %(node)s::uuid, 0, fingerprint, tenant, sum(asked_blocks), sum(matched_blocks), sum(loaded_gpu),
           sum(loaded_ram), sum(loaded_dragonfly), sum(loaded_database), sum(loaded_ssd), sum(saved_tokens),
           sum(saved_prefill_s), max(reported_at)
    from taken group by fingerprint, tenant order by fingerprint, tenant
    on conflict (node, session, fingerprint, tenant) do update
    set asked_blocks = usage.asked_blocks + excluded.asked_blocks,
        matched_blocks = usage.matched_blocks + excluded.matched_blocks,
        loaded_gpu = usage.loaded_gpu + excluded.loaded_gpu, loaded_ram = usage.loaded_ram + excluded.loaded_ram,
        loaded_dragonfly = usage.loaded_dragonfly + excluded.loaded_dragonfly,
        loaded_database = usage.loaded_database + excluded.loaded_database,
        loaded_ssd = usage.loaded_ssd + excluded.loaded_ssd, saved_tokens = usage.saved_tokens + excluded.saved_tokens,
        saved_prefill_s = usage.saved_prefill_s + excluded.saved_prefill_s,
        reported_at = greatest(usage.reported_at, excluded.reported_at)
""")

_FORGET_SHARED = Statement("""
    delete from kvpool.shared_prefixes where reported_at < now() - %(age_s)s * interval '1 second'
""")

_GONE_NODES = Statement("""
    select node from kvpool.writers group by node having max(at) < now() - %(age_s)s * interval '1 second' limit 1
""")

_FORGET_NODE = Statement("delete from kvpool.writers where node = %(node)s")


def chores(limits: CatalogLimits) -> Sequence[Callable[[Connection], bool]]:
    """All that keeps a catalog within these limits; each is to be called until it says False."""
    return (
        lambda connection: trim_trail(connection, limits.evictions, limits.eviction_age_s),
        lambda connection: trim_prompts(connection, limits.prompts, limits.prompt_age_s),
        *(lambda connection, tier=tier, ttl_s=ttl_s: expire(connection, tier, ttl_s) for tier, ttl_s in _ttls(limits)),
        fold_holdings,
        lambda connection: fold_usage(connection, limits.usage_age_s),
        lambda connection: forget_shared(connection, limits.shared_age_s),
        lambda connection: forget_node(connection, limits.node_age_s),
    )


def trim_trail(connection: Connection, most: int, age_s: float) -> bool:
    """Remove the oldest of the trail, and the blocks that nothing names any more then."""
    with connection.transaction():
        connection.execute(LOOK_UP)
        bounds = {"most": most, "age_s": age_s, "rows": PASS_ROWS}
        keys = [key for (key,) in connection.execute(_TRIM_TRAIL, bounds).fetchall()]
        if keys:
            bare = [key for (key,) in connection.execute(_BARE_BLOCKS, {"keys": keys}).fetchall()]
            bare = [key for (key,) in connection.execute(_STILL_BARE, {"keys": bare}).fetchall()]
            remove_blocks(connection, bare)
    return len(keys) == PASS_ROWS


def trim_prompts(connection: Connection, most: int, age_s: float) -> bool:
    """Remove the prompts that were not asked for longest."""
    bounds = {"most": most, "age_s": age_s, "rows": PASS_ROWS}
    return connection.execute(_TRIM_PROMPTS, bounds).rowcount == PASS_ROWS


def expire(connection: Connection, tier: TierName, age_s: float) -> bool:
    """Remove locations in a tier that all share which were not written for so long."""
    bounds = {"node": NO_NODE, "tier": tier.value, "age_s": age_s, "rows": PASS_ROWS}
    return connection.execute(_EXPIRE, bounds).rowcount == PASS_ROWS


def fold_holdings(connection: Connection) -> bool:
    """Add up the changes of the sums, when there are many."""
    due = connection.execute(_FOLD_IS_DUE, {"after": FOLD_AFTER}).fetchone()
    if due is not None and due[0]:
        connection.execute(_FOLD_HOLDINGS, {"rows": FOLD_ROWS})
    return False


def fold_usage(connection: Connection, age_s: float) -> bool:
    """Add the counters of sessions that ended long ago to those of others that did."""
    connection.execute(_FOLD_USAGE, {"node": NO_NODE, "age_s": age_s, "rows": PASS_ROWS})
    return False


def forget_shared(connection: Connection, age_s: float) -> bool:
    """Remove the reports of nodes that do not report any more."""
    connection.execute(_FORGET_SHARED, {"age_s": age_s})
    return False


def forget_node(connection: Connection, age_s: float) -> bool:
    """Remove what a node held that has written nothing for so long."""
    row = connection.execute(_GONE_NODES, {"age_s": age_s}).fetchone()
    if row is None:
        return False
    node: UUID = row[0]
    now = connection.execute("select extract(epoch from now())::float8").fetchone()
    if clear_tiers(connection, node, tuple(TierName), "node-gone", now[0] if now else 0.0, passes=1):
        connection.execute(_FORGET_NODE, {"node": node})
    return True


def _ttls(limits: CatalogLimits) -> Sequence[tuple[TierName, float]]:
    return tuple(limits.ttl_s.items())

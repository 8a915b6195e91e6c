"""Writes a batch of reports in one transaction, once.

Reports of one kind become one statement each, whose parameters are arrays with an element for each report; the keys
are taken apart in the database. Two writers never deadlock: all go through the tables in the same order, each statement
takes its rows in the order of their keys, and none waits for a row that another writer may hold out of that order. What
is about a model that the catalog does not know, or of a tenant's epoch that was erased, is left out by the statement
itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias
from uuid import UUID

import psycopg

from kvpool.blocks.identity import TreeId
from kvpool.catalog.rows import (
    NO_NODE,
    SHARED_TIERS,
    Batch,
    BlocksRemoved,
    BlocksStored,
    BlocksUsed,
    ModelSeen,
    Op,
    PricesSet,
    PromptAsked,
    SharedReport,
    UsageReport,
    row_count,
)
from kvpool.catalog.statement import LOOK_UP, Statement
from kvpool.tiers.tier import TierName

Connection: TypeAlias = psycopg.Connection[Any]
Parameters: TypeAlias = dict[str, Any]

_KNOWN = """
    exists (select from kvpool.models m where m.fingerprint = told.fingerprint)
    and not exists (
        select from kvpool.tenants t
        where t.tenant in (told.tenant, '\\x00000000000000000000000000000000'::bytea) and t.epoch > told.epoch)
"""
"""What a report of a tree must fulfil. The tenant of zeros stands for all."""

_CLAIM = Statement("""
    insert into kvpool.writers (node, session, last) values (%(node)s, %(session)s, %(sequence)s)
    on conflict (node, session) do update set last = excluded.last, at = now() where writers.last < excluded.last
    returning last
""")
"""Returns a row where the batch was not written before; another attempt at the same one waits for this one's end."""

_IS_WRITTEN = Statement("""
    select exists (
        select from kvpool.writers where node = %(node)s and session = %(session)s and last >= %(sequence)s)
""")

_HOLD_EPOCHS = Statement("select kvpool.hold_epochs(%(tenants)b::bytea[])")

_FORGET_SESSIONS = Statement("delete from kvpool.writers where node = %(node)s and session <> %(session)s")

_MODELS = Statement("""
    insert into kvpool.models (fingerprint, name, revision, identity, created_at, updated_at)
    select distinct on (fingerprint) fingerprint, name, revision, identity, to_timestamp(at), to_timestamp(at)
    from unnest(%(fingerprints)b::bytea[], %(names)s::text[], %(revisions)s::text[], %(identities)s::jsonb[],
                %(ats)s::float8[]) told (fingerprint, name, revision, identity, at)
    order by fingerprint, at
    on conflict (fingerprint) do nothing
""")

_BLOCKS = Statement(f"""
    insert into kvpool.blocks (key, fingerprint, tenant, epoch, parent, depth, tokens, created_at, last_used_at)
    select substr(keys, 16 * i + 1, 16), fingerprint, tenant, epoch,
           case i when 0 then parent else substr(keys, 16 * i - 15, 16) end,
           depth + i, tokens, to_timestamp(at), to_timestamp(at)
    from unnest(%(keys)b::bytea[], %(fingerprints)b::bytea[], %(tenants)b::bytea[], %(epochs)s::bigint[],
                %(parents)b::bytea[], %(depths)s::int[], %(tokens)s::int[], %(ats)s::float8[])
             told (keys, fingerprint, tenant, epoch, parent, depth, tokens, at)
         cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
    where {_KNOWN}
    order by 1
    on conflict (key) do nothing
""")  # noqa: S608 - a constant

_USES = Statement("""
    update kvpool.blocks
    set hits = hits + told.uses, last_used_at = greatest(last_used_at, to_timestamp(told.at))
    from (
        select told.* from (
            select substr(keys, 16 * i + 1, 16) as key, count(*) as uses, max(at) as at
            from unnest(%(keys)b::bytea[], %(ats)s::float8[]) told (keys, at)
                 cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
            group by 1 order by 1 limit %(rows)s
        ) told cross join lateral (select from kvpool.blocks b where b.key = told.key for no key update) held
    ) told
    where blocks.key = told.key
""")
"""Locked first, in order: an update by itself takes rows as its plan finds them."""

_TRAIL = Statement("""
    insert into kvpool.evictions (key, tier, node, reason, at)
    select substr(keys, 16 * i + 1, 16), tier, node, reason, to_timestamp(at)
    from unnest(%(removed_keys)b::bytea[], %(removed_tiers)s::text[], %(removed_nodes)s::uuid[],
                %(removed_reasons)s::text[], %(removed_ats)s::float8[])
             with ordinality told (keys, tier, node, reason, at, number)
         cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
    order by number, i
""")

_LOCATIONS = Statement(f"""
    insert into kvpool.locations (key, tier, node, codec, nbytes, fingerprint, tenant, since)
    select distinct on (key, tier, node, codec)
           key, tier, node, codec, nbytes, fingerprint, tenant, to_timestamp(at)
    from (
        select *, max(number) filter (where is_removal) over (partition by key, tier, node) as removed
        from (
            select substr(keys, 16 * i + 1, 16) as key, tier, node, codec, nbytes, fingerprint, tenant, at, number,
                   false as is_removal
            from unnest(%(keys)b::bytea[], %(tiers)s::text[], %(nodes)s::uuid[], %(codecs)s::smallint[],
                        %(nbytes)s::bigint[], %(fingerprints)b::bytea[], %(tenants)b::bytea[], %(epochs)s::bigint[],
                        %(ats)s::float8[], %(numbers)s::int[])
                     told (keys, tier, node, codec, nbytes, fingerprint, tenant, epoch, at, number)
                 cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
            where {_KNOWN}
            union all
            select substr(keys, 16 * i + 1, 16), tier, node, null, null, null, null, null, number, true
            from unnest(%(removed_keys)b::bytea[], %(removed_tiers)s::text[], %(removed_nodes)s::uuid[],
                        %(removed_numbers)s::int[]) told (keys, tier, node, number)
                 cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
        ) told
    ) told
    where not is_removal and coalesce(removed, -1) < number
    order by key, tier, node, codec, number desc
    on conflict (key, tier, node, codec) do update set nbytes = excluded.nbytes, since = excluded.since
    where locations.nbytes <> excluded.nbytes or locations.since < excluded.since - interval '1 minute'
""")  # noqa: S608 - a constant
"""Of what a batch stores and removes by turns, the end counts: what it stored and then removed is not added. Where
another writer is at a row, this waits for him, and then finds the row as he left it, though he began after this did."""

_REMOVE_LOCATIONS = Statement("""
    delete from kvpool.locations using (
        select held.* from (
            select key, tier, node, coalesce(array_agg(codec) filter (where number > removed), '{}') as stored_again
            from (
                select *, max(number) filter (where codec is null) over (partition by key, tier, node) as removed
                from (
                    select substr(keys, 16 * i + 1, 16) as key, tier, node, null::smallint as codec, number
                    from unnest(%(removed_keys)b::bytea[], %(removed_tiers)s::text[], %(removed_nodes)s::uuid[],
                                %(removed_numbers)s::int[]) told (keys, tier, node, number)
                         cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
                    union all
                    select substr(keys, 16 * i + 1, 16), tier, node, codec, number
                    from unnest(%(keys)b::bytea[], %(tiers)s::text[], %(nodes)s::uuid[], %(codecs)s::smallint[],
                                %(numbers)s::int[]) told (keys, tier, node, codec, number)
                         cross join lateral generate_series(0, octet_length(keys) / 16 - 1) i
                ) told
            ) told
            where removed is not null
            group by key, tier, node order by 1, 2, 3 limit %(removed_rows)s
        ) told cross join lateral (
            select l.key, l.tier, l.node, l.codec from kvpool.locations l
            where l.key = told.key and l.codec <> all(told.stored_again)
                  and l.tier is not distinct from told.tier and l.node is not distinct from told.node
            for update skip locked
        ) held
    ) held
    where locations.key = held.key and locations.codec = held.codec
          and locations.tier is not distinct from held.tier and locations.node is not distinct from held.node
""")
"""Last of all about locations, and waits for nobody: by what another writer has just added, or removed, it passes. Of a
copy that two of them report about at once, nobody knows what was first. To wait would be to wait in a circle: each
statement sees what was there when it began, so this one would come upon rows that the one before had not seen, and has
not locked in order.

The odd comparisons cannot use an index: the planner might take the one by node, and read a tier for each key."""

_KEEP_PLANS = Statement("select set_config('plan_cache_mode', %(mode)s, true)")
"""For each location the server sees that its block is there; to plan that anew for each takes half of all the time."""

_PROMPTS = Statement(f"""
    insert into kvpool.prompts (
        fingerprint, tenant, epoch, leaf, tokens, first_asked_at, last_asked_at, asks, embedding)
    select fingerprint, tenant, epoch, leaf, (array_agg(tokens order by at desc))[1],
           to_timestamp(min(at)), to_timestamp(max(at)), count(*),
           (array_agg(embedding order by at desc) filter (where embedding is not null))[1]
    from unnest(%(leaves)b::bytea[], %(fingerprints)b::bytea[], %(tenants)b::bytea[], %(epochs)s::bigint[],
                %(tokens)s::int[], %(embeddings)s::uuid[], %(ats)s::float8[])
             told (leaf, fingerprint, tenant, epoch, tokens, embedding, at)
    where {_KNOWN}
    group by fingerprint, tenant, epoch, leaf
    order by leaf
    on conflict (leaf) do update
    set tokens = excluded.tokens, asks = prompts.asks + excluded.asks,
        last_asked_at = greatest(prompts.last_asked_at, excluded.last_asked_at),
        embedding = coalesce(excluded.embedding, prompts.embedding)
""")  # noqa: S608 - a constant

_USAGE = Statement("""
    insert into kvpool.usage (
        node, session, fingerprint, tenant, asked_blocks, matched_blocks, loaded_gpu, loaded_ram, loaded_dragonfly,
        loaded_database, loaded_ssd, saved_tokens, saved_prefill_s, reported_at)
    select distinct on (fingerprint, tenant)
           %(node)s::uuid, %(session)s::bigint, fingerprint, tenant, asked, matched, gpu, ram, dragonfly, database, ssd,
           saved_tokens, saved_s, to_timestamp(at)
    from unnest(%(fingerprints)b::bytea[], %(tenants)b::bytea[], %(asked)s::bigint[], %(matched)s::bigint[],
                %(gpu)s::bigint[], %(ram)s::bigint[], %(dragonfly)s::bigint[], %(database)s::bigint[],
                %(ssd)s::bigint[], %(saved_tokens)s::bigint[], %(saved_s)s::float8[], %(ats)s::float8[])
             with ordinality told (fingerprint, tenant, asked, matched, gpu, ram, dragonfly, database, ssd,
                                   saved_tokens, saved_s, at, number)
    where exists (select from kvpool.models m where m.fingerprint = told.fingerprint)
    order by fingerprint, tenant, number desc
    on conflict (node, session, fingerprint, tenant) do update
    set asked_blocks = excluded.asked_blocks, matched_blocks = excluded.matched_blocks,
        loaded_gpu = excluded.loaded_gpu, loaded_ram = excluded.loaded_ram,
        loaded_dragonfly = excluded.loaded_dragonfly, loaded_database = excluded.loaded_database,
        loaded_ssd = excluded.loaded_ssd, saved_tokens = excluded.saved_tokens,
        saved_prefill_s = excluded.saved_prefill_s, reported_at = excluded.reported_at
""")

_FORGET_SHARED = Statement("delete from kvpool.shared_prefixes where node = %(node)s")

_SHARED = Statement(f"""
    insert into kvpool.shared_prefixes (node, key, fingerprint, tenant, epoch, depth, tokens, hits, nbytes, reported_at)
    select %(node)s::uuid, key, fingerprint, tenant, epoch, depth, tokens, hits, nbytes, to_timestamp(%(at)s::float8)
    from unnest(%(keys)b::bytea[], %(fingerprints)b::bytea[], %(tenants)b::bytea[], %(epochs)s::bigint[],
                %(depths)s::int[], %(tokens)s::int[], %(hits)s::bigint[], %(nbytes)s::bigint[])
             told (key, fingerprint, tenant, epoch, depth, tokens, hits, nbytes)
    where {_KNOWN}
    order by key
    on conflict (node, key) do nothing
""")  # noqa: S608 - a constant

_PRICES = Statement("""
    insert into kvpool.prices (name, value, updated_at)
    values ('gpuHour', %(gpu_hour)s, to_timestamp(%(at)s::float8)),
           ('ramGiBMonth', %(ram_gib_month)s, to_timestamp(%(at)s::float8)),
           ('ssdGiBMonth', %(ssd_gib_month)s, to_timestamp(%(at)s::float8))
    on conflict (name) do update set value = excluded.value, updated_at = excluded.updated_at
    where prices.updated_at < excluded.updated_at
""")


def is_written(connection: Connection, node: UUID, batch: Batch) -> bool:
    """Whether the batch was written already."""
    parameters = {"node": node, "session": batch.session, "sequence": batch.sequence}
    row = connection.execute(_IS_WRITTEN, parameters).fetchone()
    return row is not None and bool(row[0])


def claim(connection: Connection, node: UUID, batch: Batch) -> bool:
    """Whether the batch is to be written: False where it was already. In the transaction that writes it."""
    parameters = {"node": node, "session": batch.session, "sequence": batch.sequence}
    return connection.execute(_CLAIM, parameters).fetchone() is not None


def forget_sessions(connection: Connection, node: UUID, but: int) -> None:
    """Forget how far the node's other sessions came, once nothing of theirs waits any more."""
    connection.execute(_FORGET_SESSIONS, {"node": node, "session": but})


def write(connection: Connection, node: UUID, session: int, ops: Sequence[Op]) -> None:
    """Write reports, other than those that are written alone, in the transaction that is open."""
    connection.execute(LOOK_UP)
    if tenants := {tree.tenant for op in ops for tree in _trees_of(op)}:
        connection.execute(_HOLD_EPOCHS, {"tenants": sorted(tenants)})
    for statement, parameters in statements(node, session, ops):
        if statement is _LOCATIONS:
            connection.execute(_KEEP_PLANS, {"mode": "auto"})
        connection.execute(statement, parameters)
        if statement is _LOCATIONS:
            connection.execute(_KEEP_PLANS, {"mode": "force_custom_plan"})


def statements(node: UUID, session: int, ops: Sequence[Op]) -> Iterable[tuple[Statement, Parameters]]:
    """What to send for these reports, in order; pure. Later reports count more than earlier ones."""
    numbered = list(enumerate(ops))
    stored = [(number, op) for number, op in numbered if isinstance(op, BlocksStored)]
    removed = [(number, op) for number, op in numbered if isinstance(op, BlocksRemoved)]
    if models := [op for op in ops if isinstance(op, ModelSeen)]:
        yield _MODELS, _of_models(models)
    if stored:
        yield _BLOCKS, _of_blocks([op for _, op in stored])
    if used := [op for op in ops if isinstance(op, BlocksUsed)]:
        yield _USES, _of_used(used)
    if stored or removed:
        copies = _of_copies(stored, removed, node)
        if stored:
            yield _LOCATIONS, copies
        if removed:
            yield _REMOVE_LOCATIONS, copies
            yield _TRAIL, copies
    if asked := [op for op in ops if isinstance(op, PromptAsked)]:
        yield _PROMPTS, _of_prompts(asked)
    if usage := [op for op in ops if isinstance(op, UsageReport)]:
        yield _USAGE, _of_usage(usage, node, session)
    if shared := [op for op in ops if isinstance(op, SharedReport)]:
        yield _FORGET_SHARED, {"node": node}
        if shared[-1].prefixes:
            yield _SHARED, _of_shared(shared[-1], node)
    if prices := [op for op in ops if isinstance(op, PricesSet)]:
        last = prices[-1]
        yield (
            _PRICES,
            {
                "gpu_hour": last.gpu_hour,
                "ram_gib_month": last.ram_gib_month,
                "ssd_gib_month": last.ssd_gib_month,
                "at": last.at_s,
            },
        )


def node_of(tier: TierName, node: UUID) -> UUID:
    """Whose copy it is that `node` reports about."""
    return NO_NODE if tier in SHARED_TIERS else node


def _trees_of(op: Op) -> Iterable[TreeId]:
    match op:
        case BlocksStored() | PromptAsked():
            return (op.tree,)
        case SharedReport():
            return (prefix.tree for prefix in op.prefixes)
        case _:
            return ()


def _of_trees(trees: Sequence[TreeId]) -> Parameters:
    return {
        "fingerprints": [tree.fingerprint for tree in trees],
        "tenants": [tree.tenant for tree in trees],
        "epochs": [tree.epoch for tree in trees],
    }


def _of_models(ops: Sequence[ModelSeen]) -> Parameters:
    return {
        "fingerprints": [op.fingerprint for op in ops],
        "names": [op.name for op in ops],
        "revisions": [op.revision for op in ops],
        "identities": [op.identity for op in ops],
        "ats": [op.at_s for op in ops],
    }


def _of_blocks(ops: Sequence[BlocksStored]) -> Parameters:
    return _of_trees([op.tree for op in ops]) | {
        "keys": [op.keys for op in ops],
        "parents": [op.parent for op in ops],
        "depths": [op.depth for op in ops],
        "tokens": [op.block_tokens for op in ops],
        "ats": [op.at_s for op in ops],
    }


def _of_copies(
    stored: Sequence[tuple[int, BlocksStored]], removed: Sequence[tuple[int, BlocksRemoved]], node: UUID
) -> Parameters:
    ops = [op for _, op in stored]
    return _of_trees([op.tree for op in ops]) | {
        "keys": [op.keys for op in ops],
        "tiers": [op.tier.value for op in ops],
        "nodes": [node_of(op.tier, node) for op in ops],
        "codecs": [op.codec for op in ops],
        "nbytes": [op.nbytes for op in ops],
        "ats": [op.at_s for op in ops],
        "numbers": [number for number, _ in stored],
        "removed_keys": [op.keys for _, op in removed],
        "removed_tiers": [op.tier.value for _, op in removed],
        "removed_nodes": [node_of(op.tier, node) for _, op in removed],
        "removed_numbers": [number for number, _ in removed],
        "removed_reasons": [op.reason for _, op in removed],
        "removed_ats": [op.at_s for _, op in removed],
        "removed_rows": sum(row_count(op) for _, op in removed),
    }


def _of_used(ops: Sequence[BlocksUsed]) -> Parameters:
    return {"keys": [op.keys for op in ops], "ats": [op.at_s for op in ops], "rows": sum(map(row_count, ops))}


def _of_prompts(ops: Sequence[PromptAsked]) -> Parameters:
    return _of_trees([op.tree for op in ops]) | {
        "leaves": [op.leaf for op in ops],
        "tokens": [op.tokens for op in ops],
        "embeddings": [op.embedding for op in ops],
        "ats": [op.at_s for op in ops],
    }


def _of_usage(ops: Sequence[UsageReport], node: UUID, session: int) -> Parameters:
    loaded = {tier.value: [op.loaded_blocks[at] for op in ops] for at, tier in enumerate(TierName)}
    return loaded | {
        "node": node,
        "session": session,
        "fingerprints": [op.fingerprint for op in ops],
        "tenants": [op.tenant for op in ops],
        "asked": [op.asked_blocks for op in ops],
        "matched": [op.matched_blocks for op in ops],
        "saved_tokens": [op.saved_tokens for op in ops],
        "saved_s": [op.saved_prefill_s for op in ops],
        "ats": [op.at_s for op in ops],
    }


def _of_shared(op: SharedReport, node: UUID) -> Parameters:
    return _of_trees([prefix.tree for prefix in op.prefixes]) | {
        "node": node,
        "at": op.at_s,
        "keys": [prefix.key for prefix in op.prefixes],
        "depths": [prefix.depth for prefix in op.prefixes],
        "tokens": [prefix.tokens for prefix in op.prefixes],
        "hits": [prefix.hits for prefix in op.prefixes],
        "nbytes": [prefix.nbytes for prefix in op.prefixes],
    }

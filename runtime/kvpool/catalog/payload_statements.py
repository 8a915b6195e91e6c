"""What the payload tier says to PostgreSQL. The functions of `schema/0002_payloads.sql` keep its counters and limits.

Statements that lock rows pass by those that others hold, or lock them in the order of their keys.
"""

from kvpool.catalog.statement import Statement

FIND = Statement("""
    select p.key, p.codec, p.nbytes from kvpool.payloads p
    where p.key = any (%(keys)b::bytea[]) and p.codec = any (%(codecs)b::smallint[])
""")

GET = Statement("""
    select wanted.place, p.used_at < now() - %(refresh)s::interval, p.record
    from unnest(%(keys)b::bytea[], %(codecs)b::smallint[], %(lengths)b::int[])
        with ordinality wanted (key, codec, nbytes, place)
    join kvpool.payloads p on p.key = wanted.key and p.codec = wanted.codec and p.nbytes = wanted.nbytes
""")
"""Read by COPY, whose parameters psycopg writes into the statement, for the server takes none there."""

ROOM = Statement("""
    select now(),
        (select min(t.limit_bytes) from kvpool.payload_totals t where t.fingerprint in (%(fingerprint)b, '')),
        exists (
            select from kvpool.tenants t
            where t.tenant in (%(tenant)b, '\\x00000000000000000000000000000000'::bytea) and t.epoch > %(epoch)s),
        pg_stat_get_dead_tuples((select c.reltoastrelid from pg_class c where c.oid = 'kvpool.payloads'::regclass))
            * %(chunk_bytes)s > greatest(
                (select t.limit_bytes from kvpool.payload_totals t where t.fingerprint = ''), %(least_dead_bytes)s)
""")
"""The time, the smaller of the limits, whether the epoch is over, whether there is more to vacuum than all may be.

To send nothing in vain, and to let the files grow to no more than about twice the limit. `SETTLE` decides of the rest.
"""
CHUNK_BYTES = 1_996
"""Bytes of a record in one row of PostgreSQL's own for it."""
LEAST_DEAD_BYTES = 64 << 20
"""So much may wait for vacuum, however small the limit."""

CHAIN = Statement("""
    select chain.place, p.codec, p.used_at
    from unnest(%(keys)b::bytea[]) with ordinality chain (key, place)
    join kvpool.payloads p on p.key = chain.key
""")

INSERT = Statement("""
    insert into kvpool.payloads (key, codec, fingerprint, tenant, epoch, record, used_at)
    values (%(key)b, %(codec)s, %(fingerprint)b, %(tenant)b, %(epoch)s, %(record)b, %(used_at)s)
    on conflict (key, codec) do nothing returning nbytes
""")

SETTLE = Statement("""
    select v.key, v.codec, v.nbytes
    from kvpool.settle_payloads(%(fingerprint)b, %(tenant)b, %(epoch)s, %(added)s, %(keep)b::bytea[]) v
""")
NO_ROOM, EPOCH_OVER = "KV001", "KV002"
"""What `SETTLE` raises."""

TOUCH = Statement("""
    with free as (
        select p.key, p.codec, chain.place
        from unnest(%(keys)b::bytea[]) with ordinality chain (key, place)
        join kvpool.payloads p on p.key = chain.key
        where p.codec = any (%(codecs)b::smallint[])
        for update of p skip locked
    )
    update kvpool.payloads p
    set used_at = greatest(p.used_at, %(at)s::timestamptz - free.place * interval '1 microsecond')
    from free where p.key = free.key and p.codec = free.codec
        and (select set_config('synchronous_commit', 'off', true)) = 'off'  -- no reader waits for the disk for this
""")
"""The first of a chain is used last: a parent never goes before its child."""

STALE = Statement("""
    select now(), exists (
        select from kvpool.payloads p
        where p.key = any (%(keys)b::bytea[]) and p.codec = any (%(codecs)b::smallint[])
            and p.used_at < now() - %(refresh)s::interval)
""")

DROP = Statement("""
    with held as (
        select p.key, p.codec
        from unnest(%(keys)b::bytea[], %(codecs)b::smallint[]) unwanted (key, codec)
        join kvpool.payloads p on p.key = unwanted.key and p.codec = unwanted.codec
        order by p.key, p.codec for update of p
    ), gone as (
        delete from kvpool.payloads p using held where p.key = held.key and p.codec = held.codec
        returning p.fingerprint, p.nbytes
    )
    select kvpool.count_payloads(array_agg(gone.fingerprint), array_agg(-gone.nbytes::bigint)) from gone
""")

_REMOVE = """
    with candidates as (
        select c.key, c.codec, sum(c.nbytes) over (order by c.key, c.codec) - c.nbytes as before
        from (select p.key, p.codec, p.nbytes from kvpool.payloads p where {which} order by {order} limit 1024) c
    ), held as (
        select p.key, p.codec from candidates c join kvpool.payloads p on p.key = c.key and p.codec = c.codec
        where c.before < %(most_bytes)s for update of p skip locked
    ), gone as (
        delete from kvpool.payloads p using held where p.key = held.key and p.codec = held.codec
        returning p.fingerprint, p.nbytes
    )
    select count(*), kvpool.count_payloads(array_agg(gone.fingerprint), array_agg(-gone.nbytes::bigint)) from gone
"""
_WAIT = "select 1 from kvpool.payloads p where {which} order by {order} limit 1 for update"
"""One row, or none where nothing is left. It waits for who holds that row, and holds nothing meanwhile."""
_OF_TENANT = {"which": "p.tenant = %(tenant)b and p.epoch < %(before_epoch)s", "order": "p.tenant, p.epoch"}
_OF_MODEL = {"which": "p.fingerprint = %(fingerprint)b", "order": "p.fingerprint, p.used_at"}
"""In the order of an index: else the planner, which does not know that few are left, reads the whole table for them."""

ERASE, WAIT_TO_ERASE = Statement(_REMOVE.format(**_OF_TENANT)), Statement(_WAIT.format(**_OF_TENANT))
FORGET, WAIT_TO_FORGET = Statement(_REMOVE.format(**_OF_MODEL)), Statement(_WAIT.format(**_OF_MODEL))

LIMIT = Statement("select kvpool.limit_payloads(%(scope)b, %(limit_bytes)s::bigint)")
"""`scope` is a fingerprint, or empty for all."""

TRIM = Statement("select v.key, v.codec, v.nbytes from kvpool.trim_payloads(%(scope)b::bytea, %(most_bytes)s) v")
"""`scope` is a fingerprint, or null for all."""

USAGE = Statement("select t.fingerprint, t.nbytes, t.limit_bytes from kvpool.payload_totals t")

-- Small records, and how many bytes they are. A record is what a tier holds: nobody looks into it here.
--
-- Locks, so that writers cannot block each other in a circle: a transaction first inserts, in the order of the keys; then
-- it touches or evicts rows that nobody else holds (skip locked); then, last, it takes the row of the total and counts.
-- That row is held until the commit, which follows at once: it is the lock of all counters, and of the limits.

create table kvpool.payloads (
    key bytea not null check (octet_length(key) = 16),
    codec smallint not null,
    fingerprint bytea not null check (octet_length(fingerprint) = 32),
    tenant bytea not null check (octet_length(tenant) = 16),
    epoch bigint not null,
    record bytea not null,
    nbytes int not null generated always as (octet_length(record)) stored,
    stored_at timestamptz not null default now(),
    used_at timestamptz not null,
    primary key (key, codec)
) with (
    autovacuum_vacuum_scale_factor = 0.05,
    toast.autovacuum_vacuum_scale_factor = 0.05
);
alter table kvpool.payloads alter column record set storage external;
create index payloads_by_use on kvpool.payloads (used_at);
create index payloads_by_model on kvpool.payloads (fingerprint, used_at);
create index payloads_by_tenant on kvpool.payloads (tenant, epoch);

comment on table kvpool.payloads is 'Records small enough to be worth reading from here; the oldest go as others come';
comment on column kvpool.payloads.used_at is
    'When it was last read or written, to the minute; a parent''s is never before its child''s: children go first';

create table kvpool.payload_totals (
    fingerprint bytea primary key,
    nbytes bigint not null default 0,
    limit_bytes bigint
) with (fillfactor = 50);
insert into kvpool.payload_totals (fingerprint) values ('');

comment on table kvpool.payload_totals is
    'Bytes of the records of each model, and under the empty fingerprint of all; kept by who changes the records';

-- Adds to the counters of models and of all; what comes to nothing, and has no limit, goes. Locks them until the commit.
create function kvpool.count_payloads(models bytea[], deltas bigint[]) returns void
language plpgsql strict as $$
begin
    update kvpool.payload_totals t set nbytes = t.nbytes + (select sum(delta) from unnest(deltas) as u (delta))
    where t.fingerprint = '';
    update kvpool.payload_totals t set nbytes = t.nbytes + u.delta
    from (select model, sum(delta) as delta from unnest(models, deltas) as v (model, delta) group by model) u
    where t.fingerprint = u.model;
    insert into kvpool.payload_totals (fingerprint, nbytes)
    select u.model, sum(u.delta) from unnest(models, deltas) as u (model, delta)
    where not exists (select from kvpool.payload_totals t where t.fingerprint = u.model) group by u.model;
    delete from kvpool.payload_totals t
    where t.fingerprint = any (models) and t.fingerprint <> '' and t.nbytes = 0 and t.limit_bytes is null;
end $$;

-- Sets the limit of a model, or with the empty fingerprint of all; null: none. Nothing is evicted.
create function kvpool.limit_payloads(model bytea, of_bytes bigint) returns void
language plpgsql as $$
begin
    perform from kvpool.payload_totals t where t.fingerprint = '' for update;
    insert into kvpool.payload_totals as t (fingerprint, limit_bytes) values (model, of_bytes)
    on conflict (fingerprint) do update set limit_bytes = excluded.limit_bytes;
    perform kvpool.count_payloads(array[model], array[0::bigint]);
end $$;

-- By how much a model (null: all) would be above its limit with so many bytes more; 0 or less: not at all.
create function kvpool.payload_excess(model bytea, more bigint) returns bigint
language sql as $$
    select coalesce((
        select t.nbytes + more - t.limit_bytes from kvpool.payload_totals t where t.fingerprint = coalesce(model, '')
    ), 0)
$$;

-- Removes the oldest records of a model (null: of any), but for those to keep, until so many bytes are gone. Does not
-- count, and passes by what others hold.
create function kvpool.evict_payloads(model bytea, excess bigint, keep bytea[])
returns table (key bytea, codec smallint, fingerprint bytea, nbytes int)
language plpgsql as $$
declare
    oldest refcursor;
    freed bigint := 0;
begin
    if model is null then
        open oldest for
            select p.key, p.codec, p.fingerprint, p.nbytes from kvpool.payloads p
            order by p.used_at for update skip locked;
    else
        open oldest for
            select p.key, p.codec, p.fingerprint, p.nbytes from kvpool.payloads p
            where p.fingerprint = model order by p.used_at for update skip locked;
    end if;
    while freed < excess loop
        fetch oldest into key, codec, fingerprint, nbytes;
        exit when not found;
        continue when key = any (keep);
        delete from kvpool.payloads p where p.key = evict_payloads.key and p.codec = evict_payloads.codec;
        freed := freed + nbytes;
        return next;
    end loop;
    close oldest;
end $$;

-- The end of a transaction that inserted so many bytes of one model: makes room, counts, and returns what had to go.
-- Raises KV001, with the bytes that are lacking as its detail, where there is no room; KV002 where the epoch is over.
create function kvpool.settle_payloads(model bytea, of_tenant bytea, of_epoch bigint, added bigint, keep bytea[])
returns table (key bytea, codec smallint, fingerprint bytea, nbytes int)
language plpgsql as $$
declare
    most constant bigint := 64 << 20;  -- a writer makes room for itself; a lowered limit is somebody else's work
    excess bigint;
    scope bytea;
    models bytea[] := array[model];
    deltas bigint[] := array[added];
    counted boolean := false;
    evicted boolean;
    lacking bigint;
begin
    perform set_config('synchronous_commit', 'off', true);  -- a cache: after a crash the last few may be missing
    perform kvpool.check_epoch(of_tenant, of_epoch);
    loop  -- first by what is counted before the lock, then by what is counted under it: seldom more is needed
        evicted := false;
        lacking := 0;
        foreach scope in array array[model, null] loop
            excess := kvpool.payload_excess(scope, (
                select coalesce(sum(u.delta), 0)::bigint from unnest(models, deltas) as u (model, delta)
                where scope is null or u.model = scope
            ));
            lacking := greatest(lacking, excess);
            continue when excess <= 0 or excess > added + most;
            for key, codec, fingerprint, nbytes in
                select v.key, v.codec, v.fingerprint, v.nbytes from kvpool.evict_payloads(scope, excess, keep) v
            loop
                models := models || fingerprint;
                deltas := deltas || -nbytes::bigint;
                evicted := true;
                return next;
            end loop;
        end loop;
        exit when counted and lacking <= 0;
        if counted and not evicted then
            raise exception 'no room for % bytes', added using errcode = 'KV001', detail = lacking::text;
        end if;
        perform kvpool.count_payloads(models, deltas);
        models := '{}';
        deltas := '{}';
        counted := true;
    end loop;
end $$;

-- Evicts a part of what a model (null: all) is above its limit, and counts; nothing is returned where it is not.
create function kvpool.trim_payloads(model bytea, most bigint)
returns table (key bytea, codec smallint, fingerprint bytea, nbytes int)
language plpgsql as $$
declare
    models bytea[] := '{}';
    deltas bigint[] := '{}';
begin
    for key, codec, fingerprint, nbytes in
        select v.key, v.codec, v.fingerprint, v.nbytes
        from kvpool.evict_payloads(model, least(kvpool.payload_excess(model, 0), most), '{}') v
    loop
        models := models || fingerprint;
        deltas := deltas || -nbytes::bigint;
        return next;
    end loop;
    if models <> '{}' then
        perform kvpool.count_payloads(models, deltas);
    end if;
end $$;

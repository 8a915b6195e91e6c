-- The epochs of tenants, of which this is the authority, and the nodes that are to follow them.

create sequence kvpool.epoch_changes;

create table kvpool.tenants (
    tenant bytea primary key check (octet_length(tenant) = 16),
    epoch bigint not null,
    changed bigint not null unique,
    changed_at timestamptz not null default now()
);

comment on table kvpool.tenants is
    'Epochs of the tenants that were erased, as keyed digests; the digest of zeros stands for all tenants';
comment on column kvpool.tenants.changed is 'The number of the change: in the order of the commits, with gaps';

create table kvpool.nodes (
    node uuid primary key,
    name text not null,
    started_at timestamptz not null default now(),
    heartbeat_at timestamptz not null default now(),
    confirmed bigint not null
);
create index nodes_by_heartbeat on kvpool.nodes (heartbeat_at);

comment on table kvpool.nodes is 'Processes that keep blocks; confirmed: the last change of an epoch that each knows of';

-- Takes part in a tenant's epoch until the transaction ends, or raises KV002 where it is over. Who raises the epoch waits
-- for all who took part: after that nothing of an earlier one can be committed any more.
create function kvpool.check_epoch(of_tenant bytea, of_epoch bigint) returns void
language plpgsql as $$
declare
    everyone constant bytea := '\x00000000000000000000000000000000';
begin
    perform pg_advisory_xact_lock_shared(1803972719, hashtext(encode(everyone, 'hex')));
    perform pg_advisory_xact_lock_shared(1803972719, hashtext(encode(of_tenant, 'hex')));
    if exists (select from kvpool.tenants t where t.tenant in (everyone, of_tenant) and t.epoch > of_epoch) then
        raise exception 'epoch % of this tenant is over', of_epoch using errcode = 'KV002';
    end if;
end $$;

-- Raises a tenant's epoch, if it is lower. One change at a time: so the numbers are in the order of the commits, and who
-- has read up to one of them will never see a lower one appear.
create function kvpool.raise_epoch(of_tenant bytea, at_least bigint) returns table (epoch bigint, changed bigint)
language plpgsql as $$
begin
    perform pg_advisory_xact_lock(1803972720, 0);
    perform pg_advisory_xact_lock(1803972719, hashtext(encode(of_tenant, 'hex')));
    insert into kvpool.tenants as t (tenant, epoch, changed)
    values (of_tenant, at_least, nextval('kvpool.epoch_changes'))
    on conflict (tenant) do update set epoch = excluded.epoch, changed = excluded.changed, changed_at = now()
    where t.epoch < excluded.epoch;
    return query select t.epoch, t.changed from kvpool.tenants t where t.tenant = of_tenant;
end $$;

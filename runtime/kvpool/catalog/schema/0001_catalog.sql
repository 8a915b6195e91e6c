-- The catalog: which models, blocks and prompts there are, and where the blocks lie. It is told by the nodes and
-- believed by nobody: a tier is asked, and the bytes are verified. Tenants appear as keyed digests, never by name.
--
-- A block's row lives as long as a location or an entry of the trail (evictions) names it; whoever removes a location
-- writes such an entry.

create table kvpool.models (
    fingerprint bytea primary key check (octet_length(fingerprint) = 32),
    name text not null,
    revision text not null,
    identity jsonb not null,
    metadata jsonb not null default '{}',
    version bigint not null default 1,
    created_at timestamptz not null,
    updated_at timestamptz not null
);

create table kvpool.model_history (
    fingerprint bytea not null references kvpool.models on delete cascade,
    version bigint not null,
    metadata jsonb not null,
    replaced_at timestamptz not null default now(),
    primary key (fingerprint, version)
);

-- That a block's model is there is a foreign key too, but of a statement's rows at once (check_models, below): thousands
-- of rows come in together and refer to one or two models, and checking each costs a quarter of all that storing costs.
create table kvpool.blocks (
    key bytea primary key check (octet_length(key) = 16),
    fingerprint bytea not null,
    tenant bytea not null check (octet_length(tenant) = 16),
    epoch bigint not null,
    parent bytea not null check (octet_length(parent) = 16),
    depth int not null,
    tokens int not null,
    created_at timestamptz not null,
    last_used_at timestamptz not null,
    hits bigint not null default 0,
    metadata jsonb not null default '{}',
    version bigint not null default 1
);
create index blocks_by_use on kvpool.blocks (fingerprint, tenant, last_used_at, key);
create index blocks_by_parent on kvpool.blocks (parent);
create index blocks_by_metadata on kvpool.blocks using gin (metadata jsonb_path_ops) where metadata <> '{}';

-- Model and tenant stand here once more: when a block goes, its locations go after it, and are then still accounted.
create table kvpool.locations (
    key bytea not null references kvpool.blocks on delete cascade,
    tier text not null check (tier in ('gpu', 'ram', 'dragonfly', 'database', 'ssd')),
    node uuid not null,
    codec smallint not null,
    nbytes bigint not null,
    fingerprint bytea not null,
    tenant bytea not null,
    since timestamptz not null,
    primary key (key, tier, node, codec)
);
create index locations_by_node on kvpool.locations (node, tier, since);

create table kvpool.prompts (
    id bigint generated always as identity primary key,
    fingerprint bytea not null references kvpool.models on delete cascade,
    tenant bytea not null check (octet_length(tenant) = 16),
    epoch bigint not null,
    leaf bytea not null unique check (octet_length(leaf) = 16),
    tokens int not null,
    first_asked_at timestamptz not null,
    last_asked_at timestamptz not null,
    asks bigint not null,
    embedding uuid,
    metadata jsonb not null default '{}',
    version bigint not null default 1
);
create index prompts_by_use on kvpool.prompts (fingerprint, tenant, last_asked_at, id);
create index prompts_by_age on kvpool.prompts (last_asked_at);
create index prompts_by_metadata on kvpool.prompts using gin (metadata jsonb_path_ops) where metadata <> '{}';

create table kvpool.prompt_history (
    prompt bigint not null references kvpool.prompts on delete cascade,
    version bigint not null,
    metadata jsonb not null,
    replaced_at timestamptz not null default now(),
    primary key (prompt, version)
);

create table kvpool.evictions (
    id bigint generated always as identity primary key,
    key bytea not null,
    tier text not null,
    node uuid not null,
    reason text not null,
    at timestamptz not null
);
create index evictions_by_key on kvpool.evictions (key, id);

create table kvpool.shared_prefixes (
    node uuid not null,
    key bytea not null,
    fingerprint bytea not null references kvpool.models on delete cascade,
    tenant bytea not null,
    epoch bigint not null,
    depth int not null,
    tokens int not null,
    hits bigint not null,
    nbytes bigint not null,
    reported_at timestamptz not null,
    primary key (node, key)
);

-- Counters of a node's session, absolute: a report replaces the one before.
create table kvpool.usage (
    node uuid not null,
    session bigint not null,
    fingerprint bytea not null references kvpool.models on delete cascade,
    tenant bytea not null,
    asked_blocks bigint not null,
    matched_blocks bigint not null,
    loaded_gpu bigint not null,
    loaded_ram bigint not null,
    loaded_dragonfly bigint not null,
    loaded_database bigint not null,
    loaded_ssd bigint not null,
    saved_tokens bigint not null,
    saved_prefill_s double precision not null,
    reported_at timestamptz not null,
    primary key (node, session, fingerprint, tenant)
);

create table kvpool.prices (
    name text primary key,
    value double precision not null,
    updated_at timestamptz not null
);

-- How far the batches of each session of a node have arrived; what makes a batch arrive once.
create table kvpool.writers (
    node uuid not null,
    session bigint not null,
    last bigint not null,
    at timestamptz not null default now(),
    primary key (node, session)
);

-- What lies where, summed up: the sum over a group's rows counts. Changes are added as rows of their own, so that
-- writers never wait for each other here, and are folded from time to time.
create table kvpool.holdings (
    id bigint generated always as identity primary key,
    fingerprint bytea not null,
    tenant bytea not null,
    tier text not null,
    day date not null,
    blocks bigint not null,
    nbytes bigint not null
);
create index holdings_by_group on kvpool.holdings (fingerprint, tenant, tier, day);

-- A reference from blocks to models, on delete cascade. Who adds blocks holds their models until the transaction ends;
-- who deletes a model waits for that, and then finds the blocks.
create function kvpool.check_models() returns trigger language plpgsql as $$
begin
    perform from kvpool.models where fingerprint in (select fingerprint from came) order by fingerprint for key share;
    if exists (
        select from came where not exists (select from kvpool.models m where m.fingerprint = came.fingerprint)
    ) then
        raise foreign_key_violation using message = 'a block''s model is not there', table = 'blocks';
    end if;
    return null;
end $$;

create function kvpool.remove_blocks_of_model() returns trigger language plpgsql as $$
begin
    delete from kvpool.blocks where fingerprint = old.fingerprint;
    return null;
end $$;

create trigger check_models after insert on kvpool.blocks referencing new table as came
    for each statement execute function kvpool.check_models();
create trigger remove_blocks after delete on kvpool.models
    for each row execute function kvpool.remove_blocks_of_model();

create function kvpool.count_came() returns trigger language plpgsql as $$
begin
    insert into kvpool.holdings (fingerprint, tenant, tier, day, blocks, nbytes)
    select fingerprint, tenant, tier, (since at time zone 'UTC')::date, count(*), sum(nbytes)
    from came group by 1, 2, 3, 4;
    return null;
end $$;

create function kvpool.count_went() returns trigger language plpgsql as $$
begin
    insert into kvpool.holdings (fingerprint, tenant, tier, day, blocks, nbytes)
    select fingerprint, tenant, tier, (since at time zone 'UTC')::date, -count(*), -sum(nbytes)
    from went group by 1, 2, 3, 4;
    return null;
end $$;

create function kvpool.count_changed() returns trigger language plpgsql as $$
begin
    insert into kvpool.holdings (fingerprint, tenant, tier, day, blocks, nbytes)
    select fingerprint, tenant, tier, (since at time zone 'UTC')::date, sum(sign), sum(sign * nbytes)
    from (select came.*, 1 as sign from came union all select went.*, -1 from went) changed
    group by 1, 2, 3, 4 having sum(sign) <> 0 or sum(sign * nbytes) <> 0;
    return null;
end $$;

create trigger count_came after insert on kvpool.locations referencing new table as came
    for each statement execute function kvpool.count_came();
create trigger count_went after delete on kvpool.locations referencing old table as went
    for each statement execute function kvpool.count_went();
create trigger count_changed after update on kvpool.locations referencing old table as went new table as came
    for each statement execute function kvpool.count_changed();

-- What people look at. Nothing here reads the large tables: sums are kept as things happen.

-- As check_epoch, for many tenants at once and without a word: takes part in their epochs until the transaction ends.
-- What is of an earlier one is left out by the statements that follow, which see every epoch raised before.
create function kvpool.hold_epochs(of_tenants bytea[]) returns void language plpgsql as $$
declare
    everyone constant bytea := '\x00000000000000000000000000000000';
begin
    perform pg_advisory_xact_lock_shared(1803972719, hashtext(encode(everyone, 'hex')));
    perform pg_advisory_xact_lock_shared(1803972719, lock)
    from (select distinct hashtext(encode(tenant, 'hex')) as lock from unnest(of_tenants) tenant order by 1) locks;
end $$;

create view kvpool.held as
select m.name as model, m.revision, encode(h.tenant, 'hex') as tenant, h.tier,
       case when h.day >= current_date then 'today' when h.day > current_date - 7 then 'week'
            when h.day > current_date - 30 then 'month' else 'older' end as age,
       sum(h.blocks)::bigint as blocks, sum(h.nbytes)::bigint as bytes
from kvpool.holdings h join kvpool.models m using (fingerprint)
group by 1, 2, 3, 4, 5 having sum(h.blocks) <> 0;
comment on view kvpool.held is
    'What lies where: copies of blocks and their bytes as stored, per model, tenant, tier and age. A block that lies in '
    'two tiers, or on two nodes, counts twice; one in a tier that all nodes share counts once';
comment on column kvpool.held.tenant is 'The keyed digest that stands for the tenant, in hexadecimal';
comment on column kvpool.held.age is
    'Since the copy was written, in days of UTC: today, week (less than 7 days), month (less than 30), older';

create view kvpool.top_shared_prefixes as
select m.name as model, encode(s.tenant, 'hex') as tenant, encode(s.key, 'hex') as key, max(s.tokens) as tokens,
       sum(s.hits)::bigint as hits, count(*) as nodes, sum(s.nbytes)::bigint as bytes, max(s.reported_at) as reported_at
from kvpool.shared_prefixes s join kvpool.models m using (fingerprint)
group by m.name, s.tenant, s.key order by hits desc;
comment on view kvpool.top_shared_prefixes is
    'The prefixes that requests have in common, most used first: those that each node reported last';
comment on column kvpool.top_shared_prefixes.key is 'The key of the prefix''s last block, in hexadecimal';
comment on column kvpool.top_shared_prefixes.hits is 'Requests whose longest shared prefix it was, over all nodes';

create view kvpool.saved as
select m.name as model, encode(u.tenant, 'hex') as tenant,
       sum(asked_blocks)::bigint as asked_blocks, sum(matched_blocks)::bigint as matched_blocks,
       round(sum(matched_blocks) / nullif(sum(asked_blocks), 0), 4) as hit_ratio,
       sum(loaded_gpu)::bigint as loaded_gpu, sum(loaded_ram)::bigint as loaded_ram,
       sum(loaded_dragonfly)::bigint as loaded_dragonfly, sum(loaded_database)::bigint as loaded_database,
       sum(loaded_ssd)::bigint as loaded_ssd,
       sum(saved_tokens)::bigint as saved_tokens, sum(saved_prefill_s) as saved_prefill_s,
       max(u.reported_at) as reported_at
from kvpool.usage u join kvpool.models m using (fingerprint)
group by m.name, u.tenant;
comment on view kvpool.saved is
    'What the cache spared, per model and tenant, since the catalog began: blocks asked for, matched, and loaded from '
    'each tier; tokens that need not be computed again, and the seconds of prefill that would have taken';

create view kvpool.cost as
with price as (
    select max(value) filter (where name = 'gpuHour') as gpu_hour,
           max(value) filter (where name = 'ramGiBMonth') as ram, max(value) filter (where name = 'ssdGiBMonth') as ssd
    from kvpool.prices
), held as (
    select fingerprint, coalesce(sum(nbytes) filter (where tier in ('ram', 'dragonfly')), 0) / 1073741824 as ram_gib,
           coalesce(sum(nbytes) filter (where tier in ('ssd', 'database')), 0) / 1073741824 as ssd_gib
    from kvpool.holdings group by fingerprint
), saved as (
    select fingerprint, sum(saved_prefill_s) / 3600 as gpu_hours from kvpool.usage group by fingerprint
)
select m.name as model, m.revision,
       round(coalesce(ram_gib, 0), 3) as ram_gib, round(coalesce(ssd_gib, 0), 3) as ssd_gib,
       coalesce(ram_gib, 0)::float8 * price.ram as ram_per_month,
       coalesce(ssd_gib, 0)::float8 * price.ssd as ssd_per_month,
       coalesce(gpu_hours, 0) as gpu_hours_saved, coalesce(gpu_hours, 0) * price.gpu_hour as gpu_cost_saved
from kvpool.models m left join held using (fingerprint) left join saved using (fingerprint) cross join price;
comment on view kvpool.cost is
    'What a model''s blocks cost a month at the pool''s prices, and what the prefill that they spared would have cost '
    'since the catalog began. Dragonfly counts as memory, PostgreSQL as disk; empty where the pool has told no prices';

comment on table kvpool.models is
    'The models that were seen; the fingerprint says all that makes keys and values compatible';
comment on table kvpool.model_history is 'The last versions of the metadata of models, as they were replaced';
comment on table kvpool.blocks is 'The blocks that lie, or lay a while ago, in some tier; tenants are keyed digests';
comment on table kvpool.locations is
    'Where each block lies: in which tier, on which node (zeros: a tier that all share)';
comment on table kvpool.prompts is 'The prompts that were asked for; leaf: the key of the last whole block';
comment on table kvpool.prompt_history is 'The last versions of the metadata of prompts, as they were replaced';
comment on table kvpool.evictions is 'Why copies of blocks went, newest last; bounded in rows and in age';
comment on table kvpool.shared_prefixes is 'The shared prefixes that each node reported last; see top_shared_prefixes';
comment on table kvpool.usage is 'What each session of a node spared, counted from its beginning; see saved';
comment on table kvpool.prices is 'What resources cost, as the pool''s configuration says it; see cost';
comment on table kvpool.holdings is 'Sums over locations, and changes to them not folded yet; see held';
comment on table kvpool.writers is 'How far the batches of each node''s sessions have arrived';

"""Ten scenarios of a pool with all its tiers, each a function of open pools and models: every byte is verified.

How a pool is made, and where its servers run, is the caller's business. A `cold` pool is another one on the same shared
tiers, with nothing of its own. Where a pool has a gpu tier, what is stored comes from the device and what is loaded
goes there, unless it says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from random import Random
from typing import Any

import numpy as np

from kvpool.api.codec import Codec
from kvpool.config import RuntimeConfig
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import LeaseState, Refusal, StoreResult, Verdict
from kvpool.tiers.tier import TierName
from tests.pool.kv import (
    BLOCK_TOKENS,
    DEADLINE_S,
    LAYOUT,
    RECORD,
    WIDE,
    Prompt,
    check,
    check_chains_on_ssd,
    flushed,
    is_within_capacity,
    loaded_blocks,
    prompt,
    spec,
    store,
)
from tests.pool.kv import served as on_host
from tests.pool.test_pool_codecs import BOUND, Floats
from tests.pool.test_pool_codecs import LARGE as FLOATS
from tests.pool.test_pool_gpu import DevicePrompt
from tests.pool.test_pool_threads import TENANTS, Crowd
from tests.waiting import eventually

from .pools import in_normal_mode, looked_up, remote_of, reported

GPU, RAM, DRAGONFLY, DATABASE, SSD = TierName
MEMORY = (GPU, RAM)
PREFILL_TOKENS_PER_SECOND = 40.0
"""Of an engine that is simulated: so slow that even a busy machine loads sooner."""
MOST_FILLING = 500
_SEEDS = count(5_000)
"""Of prompts that nobody else uses."""

Served = dict[TierName, int]
Ask = Callable[[str], list[Any]]
"""Rows of a query to the catalog's database."""


def five_tier_waterfall(pool: Pool, model: Model) -> None:
    """A prompt of which each tier has a part that no other has is served from all of them, by one load.

    The pool writes to ssd what is asked for twice.
    """
    tokens, part = prompt(20), 4
    assert kept(pool, model, tokens).stored == 20
    flushed(pool)
    assert tiers_of(model, tokens) == [{GPU if pool.config.gpu else RAM}] * 20
    push_out(pool, model, tokens, MEMORY)
    assert tiers_of(model, tokens) == [{DRAGONFLY, DATABASE}] * 20, "what was asked for once is not on ssd"
    assert fetched(pool, model, first(12, tokens)) == {DRAGONFLY: 12}
    assert here(pool, model, first(12, tokens)) == {RAM: 12}
    flushed(pool)
    push_out(pool, model, tokens, MEMORY)
    assert tiers_of(model, first(12, tokens)) == [{SSD}] * 12, "what was asked for twice is"
    assert here(pool, model, first(8, tokens)) == {SSD: 8}
    if pool.config.gpu:
        promote(pool, model, first(4, tokens))
    flushed(pool)
    forget(pool, model, DATABASE, tokens, range(12, 16))
    forget(pool, model, DRAGONFLY, tokens, range(16, 20))
    with model.match(tokens) as lease:
        assert lease.blocks == 12, "a match knows what is here, and waits for nothing"
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert lease.blocks == 20
        in_memory = {GPU: part, RAM: part} if pool.config.gpu else {RAM: 2 * part}
        assert delivered(pool, lease, model, tokens) == {**in_memory, SSD: part, DRAGONFLY: part, DATABASE: part}
    stats = pool.stats()
    assert stats.mode == "normal"
    assert all(stats.tiers[tier].loaded_blocks >= part for tier in stats.tiers)
    check(pool)


def hit_path_order(pool: Pool, model: Model, cold: Pool) -> None:
    """A block that several tiers hold comes from the fastest of them, and is in memory afterwards."""
    tokens, other, lost = prompt(10, 1), prompt(10, 2), prompt(10, 3)
    for each in (other, lost, tokens):
        kept(pool, model, each)
    flushed(pool)
    if pool.config.gpu:
        assert here(pool, model, tokens) == {GPU: 10}
        push_out(pool, model, tokens, [GPU])
    assert on_host(model, tokens) == {RAM: 10}
    push_out(pool, model, tokens, MEMORY)
    flushed(pool)
    with nothing_is_fetched(pool):
        assert looked_up(model, tokens) == {SSD: 10}, "what a node has on its own disk needs no lookup"
        assert on_host(model, tokens) == {RAM: 10}

    elsewhere = cold.register(spec())
    assert on_host(elsewhere, tokens) == {}
    assert looked_up(elsewhere, tokens) == {DRAGONFLY: 10}
    assert on_host(elsewhere, tokens) == {RAM: 10}
    forget(pool, model, DRAGONFLY, other, range(10))
    assert looked_up(elsewhere, other) == {DATABASE: 10}
    flushed(cold)
    assert held_by(cold, elsewhere, DRAGONFLY, other) == 10, "the faster tier has it again"
    for tier in (DRAGONFLY, DATABASE):
        forget(pool, model, tier, lost, range(10))
    assert looked_up(elsewhere, lost) == {}, "what no shared tier has is to be computed"
    assert {report.verdict for report in elsewhere.explain(lost)} == {Verdict.NEVER_STORED}
    assert sum(on_host(model, lost).values()) == 10, "also where another node has it on its disk"
    check(cold)


def eviction_cascade(pool: Pool, model: Model, *, prompts: int) -> None:
    """What leaves a tier that is full is in the next one: nothing is lost while the last one has room.

    So many prompts of 10 blocks are several times what gpu and ram hold, and more than ssd does.
    """
    stored = [prompt(10, seed) for seed in range(prompts)]
    for tokens in stored:
        assert kept(pool, model, tokens).stored == 10
        flushed(pool)
        assert is_within_capacity(pool)
    stats = pool.stats()
    assert stats.tiers[RAM].block_bytes + stats.tiers[SSD].block_bytes < prompts * 10 * RECORD
    assert stats.write_behind.freed_segments > 0, "the disk was full as well"
    assert stats.demoted_blocks > 0 or pool.config.gpu is None
    assert sum(stats.write_behind.dropped_blocks.values()) == 0
    assert not tiers_of(model, stored[0])[0] & {GPU, RAM, SSD}, "the oldest prompt has left this node"
    assert tiers_of(model, stored[-1])[0] & {GPU, RAM}
    check(pool)
    check_chains_on_ssd(pool)
    came: set[TierName] = set()
    for tokens in reversed(stored):
        served = fetched(pool, model, tokens)
        assert sum(served.values()) == 10, "every block is had from where it is by now"
        came |= set(served)
    assert came >= {RAM, SSD}
    assert came & {DRAGONFLY, DATABASE}
    assert is_within_capacity(pool)
    check(pool)


def prefix_sharing_across_tiers(pool: Pool, model: Model, cold: Pool) -> None:
    """What prompts have in common is stored once, in every tier and for all nodes; no other tenant or model has it.

    The pool protects shared prefixes of 8 blocks.
    """
    system = prompt(8)
    asked = [system + prompt(3, seed) for seed in range(1, 5)]
    assert kept(pool, model, asked[0]) == (11, 0, {})
    assert kept(pool, model, asked[1]) == (3, 8, {})
    flushed(pool)
    elsewhere = cold.register(spec())
    assert looked_up(elsewhere, asked[2]) == {DRAGONFLY: 8}
    assert kept(cold, elsewhere, asked[2]) == (3, 8, {})
    flushed(cold)
    with model.match(asked[2]) as lease:
        assert lease.blocks == 8
        lease.wait(DEADLINE_S)
        served = delivered(pool, lease, model, asked[2])
        assert served == {GPU if pool.config.gpu else RAM: 8, DRAGONFLY: 3}, "only what differs crosses the network"
    flushed(pool)
    for tier in (DRAGONFLY, DATABASE):
        assert sum(one.stats().shared[tier].sent_blocks for one in (pool, cold)) == 8 + 3 * 3
    assert pool.shared_prefixes(1)[0].tokens == 8 * BLOCK_TOKENS
    assert pool.stats().already_there_bytes == 8 * RECORD

    push_out(pool, model, asked[0], MEMORY, blocks=range(8, 11))
    assert set(here(pool, model, system)) <= set(MEMORY), "one-off prompts do not push out what many share"
    stranger = pool.register(spec("stranger"))
    assert fetched(pool, model, asked[0], "another tenant") == {}
    assert fetched(pool, stranger, asked[0]) == {}
    check(pool)
    check(cold)


def compression_with_the_database(pool: Pool, model: Model, cold: Pool, ask: Ask) -> None:
    """int8 in the database takes less, by the catalog too, and comes back as near as the codec promises.

    `model` has floats of 32 bits, and so few tokens in a block that scales weigh. Other tiers keep what they are given.
    """
    tokens = prompt(8)
    stored = Floats(model)
    stored.poison = np.nan  # in block 1: what no codec can hold
    model.store(tokens, stored)
    reported(pool)
    raw = model.layout.record_bytes
    in_database = dict(ask("select octet_length(record), count(*) from kvpool.payloads group by 1"))
    encoded = min(in_database)
    assert in_database == {encoded: 7, raw: 1}
    assert encoded < 0.6 * raw
    by_catalog = ask("select tier, sum(blocks)::int, sum(bytes)::int from kvpool.held where tier <> 'ssd' group by 1")
    assert {tier: sizes for tier, *sizes in by_catalog} == {
        "ram": [8, 8 * raw], "dragonfly": [8, 8 * raw], "database": [8, 7 * encoded + raw],
    }  # fmt: skip
    assert pool.stats().encoding.encoded_blocks == {Codec.INT8_ASYMMETRIC.value: 7}

    exact, served = floats_of(model, tokens)
    assert served == {RAM: 8}
    assert [exact.arrived[at].tobytes() for at in range(8)] == [stored.values(at).tobytes() for at in range(8)]
    forget(pool, model, DRAGONFLY, tokens, range(8))
    elsewhere = cold.register(spec(layout=model.layout))
    near, served = floats_of(elsewhere, tokens)
    assert served == {DATABASE: 8}
    errors = [near.error(at) for at in range(8) if at != 1]
    assert all(0 < error <= BOUND[Codec.INT8_ASYMMETRIC] for error in errors)
    assert near.arrived[1].tobytes() == stored.values(1).tobytes(), "what int8 cannot hold is kept as it is"
    flushed(cold)
    again, served = floats_of(elsewhere, tokens)
    assert served == {RAM: 8}
    assert all(np.array_equal(again.arrived[at], near.arrived[at]) for at in range(8)), "and is not encoded twice"
    check(cold)


def slab_reuse(pool: Pool) -> None:
    """Records of three lengths follow each other in one slab: it never grows, none strands, and no byte shows through.

    The pool has no gpu tier.
    """
    ram_bytes = pool.config.ram.capacity_bytes
    layouts = {"small": LAYOUT, "wide": WIDE, "large": FLOATS}
    models = [pool.register(spec(name, layout=layout)) for name, layout in layouts.items()]
    slab = pool._engine.ram.slab
    for turn in range(4):
        for model in models:
            blocks = ram_bytes // model.layout.record_bytes * 3 // 4
            tokens = prompt(blocks, seed=turn)
            assert kept(pool, model, tokens) == (blocks, 0, {}), "all room is there for records of any length"
            assert on_host(model, tokens) == {RAM: blocks}
            flushed(pool)
            assert slab.reserved_bytes <= ram_bytes
    mapped = slab.stats().mapped
    for turn in range(4):
        for model in models:
            tokens = prompt(6, seed=turn)
            assert sum(looked_up(model, tokens).values()) == 6, "slots that were others' hold what was asked for"
    assert slab.stats().mapped - mapped <= slab.stats().recut, "memory was cut anew, not added"
    for tenant in TENANTS:
        for model in models:
            kept(pool, model, prompt(5), tenant)
    flushed(pool)  # what is being written is leased
    pool.unregister("large")
    pool.unregister("wide")
    most = ram_bytes // RECORD - 2
    assert kept(pool, models[0], prompt(most, seed=50)) == (most, 0, {}), "what they had is others' now"
    assert on_host(models[0], prompt(most, seed=50)) == {RAM: most}
    for tenant in ("default", *TENANTS):
        pool.erase(tenant=tenant)
    eventually(lambda: pool.stats().tiers[RAM].used_bytes == 0, "nothing is left over")
    slab.check_integrity()
    check(pool)


def end_to_end_latency(pool: Pool, model: Model, cold: Pool) -> None:
    """From every tier a prompt is there before it could have been computed; one that would not be is not asked.

    Both pools are told that models compute `PREFILL_TOKENS_PER_SECOND`. The whole of a request counts: match, wait,
    load, and every block compared.
    """
    tokens = prompt(40)
    computed_s = len(tokens) / PREFILL_TOKENS_PER_SECOND
    took: dict[TierName, float] = {}

    def timed(owner: Pool, of: Model, tier: TierName) -> None:
        began_s = time.monotonic()
        assert fetched(owner, of, tokens) == {tier: 40}
        took[tier] = time.monotonic() - began_s

    kept(pool, model, tokens)
    flushed(pool)
    if pool.config.gpu:
        timed(pool, model, GPU)
        push_out(pool, model, tokens, [GPU])
    timed(pool, model, RAM)
    push_out(pool, model, tokens, MEMORY)
    timed(pool, model, SSD)
    elsewhere = cold.register(spec())
    timed(cold, elsewhere, DRAGONFLY)
    push_out(cold, elsewhere, tokens, MEMORY)
    forget(pool, model, DRAGONFLY, tokens, range(40))
    timed(cold, elsewhere, DATABASE)
    assert max(took.values()) < computed_s, f"loading pays: {took} against {computed_s} s"
    loads = len(took)
    saved_s = pool.stats().saved_prefill_seconds + cold.stats().saved_prefill_seconds
    assert saved_s == loads * computed_s

    began_s = time.monotonic()
    with elsewhere.match(prompt(40, 1)) as lease:
        assert lease.wait(DEADLINE_S) is LeaseState.READY
        assert lease.blocks == 0
    assert time.monotonic() - began_s < computed_s, "nor does asking for what nobody has"

    kept(pool, model, prompt(40, 2))
    flushed(pool)
    looked_up(elsewhere, prompt(20, 2))  # measured just now, so that nobody needs to try
    elsewhere.observe_prefill(10**12, 1.0)
    before = cold.stats().skipped_slower_blocks
    assert fetched(cold, elsewhere, prompt(30, 2)) == {RAM: 20}
    assert cold.stats().skipped_slower_blocks == before + 10


def concurrent_stress(pool: Pool, cold: Pool, *, operations: int) -> None:
    """Threads of two nodes store, look up, hold and erase for three models and tenants; at the end all is in order."""
    crowd = Crowd()
    for seed, node in enumerate((pool, cold) * 2):
        models = [node.register(spec(name)) for name in ("m", "n")]
        models.append(node.register(spec("wide", layout=WIDE)))
        crowd.add(partial(some_requests, node, models, seed, operations))
    crowd.add(partial(some_erasures, pool, "c"))
    crowd.run()
    for node in (pool, cold):
        assert is_within_capacity(node)
        assert sum(tier.loaded_blocks for tier in node.stats().tiers.values()) > 0
        assert all(not tier.corrupt for tier in node.stats().tiers.values())
        in_normal_mode(node)
        check(node, [])
        assert node.stats().shared[DRAGONFLY].in_flight_bytes == node.stats().shared[DATABASE].in_flight_bytes == 0
    tokens = prompt(6, 77)
    kept(pool, pool.model("m"), tokens)
    flushed(pool)
    served = looked_up(cold.model("m"), tokens)
    assert sum(served.values()) == 6
    assert set(served) <= {DRAGONFLY, DATABASE}


def memory_pressure(pool: Pool, model: Model, resized: Callable[[int], RuntimeConfig]) -> None:
    """Where memory is short, blocks are refused, with the reason, and others served through what is left; leases hold.

    `resized` is the pool's configuration with ram for so many blocks.
    """
    room = pool.config.ram.capacity_bytes // RECORD
    tokens, refused, longer = prompt(room - 2, 1), prompt(room, 2), prompt(3 * room, 3)
    pool.reload(resized(4 * room))
    assert store(model, longer).stored == 3 * room
    flushed(pool)
    pool.reload(resized(room))
    eventually(lambda: is_within_capacity(pool), "memory is given back")
    assert sum(looked_up(model, longer).values()) >= room - 2, "as far as there is memory that it does not fill itself"
    assert store(model, tokens).stored == room - 2
    flushed(pool)
    assert sum(looked_up(model, longer).values()) == 3 * room, "what is longer than memory is served through it"
    assert sum(looked_up(model, tokens).values()) == room - 2
    with model.match(tokens) as lease:
        assert store(model, refused).refused[Refusal.NO_ROOM] >= room - 2
        assert model.explain(refused)[-1].verdict is Verdict.REFUSED
        looked_up(model, longer)
        pool.reload(resized(room // 2))
        assert loaded_blocks(lease, model, tokens) == room - 2
        assert lease.served == {RAM: room - 2}, "what is leased stays where it is"
    eventually(lambda: is_within_capacity(pool), "it is given back when the lease has ended")
    pool.reload(resized(room))
    assert sum(looked_up(model, tokens).values()) == room - 2, "what had to go is served from below"
    assert store(model, first(room - 2, refused)).refused == {}
    flushed(pool)
    if pool.config.gpu:
        assert kept(pool, model, prompt(4)).stored == 4
        flushed(pool)  # what is being written is leased
        assert pool.release_device_memory(pool.config.gpu.capacity_bytes) >= 4 * RECORD
        assert here(pool, model, prompt(4)) == {RAM: 4}, "an engine that needs its memory has it, and nothing is lost"
    in_normal_mode(pool)
    check(pool, [])


def before_a_restart(pool: Pool, model: Model) -> None:
    """`persistence_over_a_restart`, its first part: what is stored, shared and erased before the pool is closed."""
    for seed in (1, 2):
        kept(pool, model, prompt(8) + prompt(4, seed))
    kept(pool, model, prompt(6, 3), "gone")
    flushed(pool)
    pool.erase(tenant="gone")
    assert pool.shared_prefixes(1)[0].tokens == 8 * BLOCK_TOKENS
    like_a_prompt_of_before(pool)


def after_a_restart(pool: Pool) -> None:
    """Its second part, on the same files: all is there, with no wait for what is on ssd, and erased is erased."""
    model = pool.model("m")
    assert pool.stats().restored.blocks == 16
    assert pool.stats().restored.dropped == {}
    assert pool.shared_prefixes(1)[0].tokens == 8 * BLOCK_TOKENS
    with nothing_is_fetched(pool):
        assert here(pool, model, prompt(8) + prompt(4, 1)) == {SSD: 12}
    for tier in (DRAGONFLY, DATABASE):
        assert held_by(pool, model, tier, prompt(8) + prompt(4, 2)) == 12
    assert fetched(pool, model, prompt(6, 3), "gone") == {}
    like_a_prompt_of_before(pool)
    check(pool)


def after_losing_the_disk(pool: Pool) -> None:
    """Its third part, on a machine whose ssd is new: shared tiers bring everything back, and erased is erased."""
    model = pool.model("m")
    assert pool.stats().restored.blocks == 0
    assert fetched(pool, model, prompt(8) + prompt(4, 1)) == {DRAGONFLY: 12}
    forget(pool, model, DRAGONFLY, prompt(8) + prompt(4, 2), range(8, 12))
    served = fetched(pool, model, prompt(8) + prompt(4, 2))
    assert served == {RAM: 8, DATABASE: 4}
    assert fetched(pool, model, prompt(6, 3), "gone") == {}
    check(pool)


# -- what they are made of ---------------------------------------------------------------------------------------------


def first(blocks: int, tokens: list[int]) -> list[int]:
    return tokens[: blocks * BLOCK_TOKENS]


def kept(pool: Pool, model: Model, tokens: list[int], tenant: str = "default") -> StoreResult:
    """Store a prompt, from the device where the pool has one."""
    kind = DevicePrompt if pool.config.gpu else Prompt
    return model.store(tokens, kind(model, tokens, tenant), tenant=tenant)


def delivered(pool: Pool, lease: Lease, model: Model, tokens: list[int], tenant: str = "default") -> Served:
    """Load an open lease, to the device where the pool has one. Fails if a block is wrong, or out of order."""
    sink = (DevicePrompt if pool.config.gpu else Prompt)(model, tokens, tenant)
    arrived = lease.load(sink)
    assert sink.wrong == [], "a block came back other than it was stored"
    assert sink.written == list(range(arrived // BLOCK_TOKENS)), "in order, and as many as it says"
    assert sum(lease.served.values()) == len(sink.written)
    return lease.served


def here(pool: Pool, model: Model, tokens: list[int]) -> Served:
    """Match and load, as an engine that waits for nobody; where the blocks came from."""
    with model.match(tokens) as lease:
        return delivered(pool, lease, model, tokens)


def fetched(pool: Pool, model: Model, tokens: list[int], tenant: str = "default") -> Served:
    """Match, wait for what shared tiers have, and load; where the blocks came from."""
    with model.match(tokens, tenant=tenant) as lease:
        lease.wait(DEADLINE_S)
        return delivered(pool, lease, model, tokens, tenant)


def floats_of(model: Model, tokens: list[int]) -> tuple[Floats, Served]:
    """Match, wait and load floats; the caller says how near they must be."""
    sink = Floats(model)
    with model.match(tokens) as lease:
        lease.wait(DEADLINE_S)
        lease.load(sink)
        return sink, lease.served


def tiers_of(model: Model, tokens: list[int]) -> list[set[TierName]]:
    """Which tiers have each block; shared ones are named for blocks that are not here."""
    return [set(report.tiers) for report in model.explain(tokens)]


def push_out(
    pool: Pool, model: Model, tokens: list[int], tiers: Collection[TierName], blocks: Sequence[int] | None = None
) -> None:
    """Store what nobody asks for again until none of a prompt's blocks, or of those named, is in these tiers."""

    def is_out() -> bool:
        held = tiers_of(model, tokens)
        return not any(held[at] & set(tiers) for at in blocks or range(len(held)))

    for _ in range(MOST_FILLING):
        if is_out():
            return
        kept(pool, model, prompt(4, next(_SEEDS)))
        flushed(pool)  # what is being written is leased, and others would have to go in its place
    raise AssertionError(f"other prompts do not push it out of {tiers}: {tiers_of(model, tokens)}")


def like_a_prompt_of_before(pool: Pool) -> None:
    """Where there is Qdrant: fails unless it knows the two prompts that are like one which was stored."""
    if pool.config.database is not None and pool.config.database.qdrant is not None:
        tokens = prompt(8) + prompt(4, 1)
        eventually(lambda: len(pool.find("m", "default", similar_to=tokens)) == 2, "Qdrant remembers what was stored")
        best, other = pool.find("m", "default", similar_to=tokens)
        assert best.key == pool.model("m").explain(tokens)[-1].key
        assert (best.similarity or 0) > (other.similarity or 0)


def promote(pool: Pool, model: Model, tokens: list[int]) -> None:
    """Ask for a prompt until it is on the device."""

    def is_there() -> bool:
        here(pool, model, tokens)
        return all(GPU in tiers for tiers in tiers_of(model, tokens))

    eventually(is_there, "what is asked for again and again goes to the device")


def forget(pool: Pool, model: Model, tier: TierName, tokens: list[int], blocks: Sequence[int]) -> None:
    """Have a shared tier lose some blocks of a prompt, as if it had needed the room."""
    store = remote_of(pool).store(tier)
    assert store is not None
    tree, codecs = _tree_and_codecs(pool, model)
    keys = [report.key for report in model.explain(tokens)]
    found = [found for found in store.find(tree, [keys[at] for at in blocks], codecs) if found is not None]
    assert len(found) == len(blocks), f"{tier} had them all"
    store.drop(tree, found)


def held_by(pool: Pool, model: Model, tier: TierName, tokens: list[int]) -> int:
    """How many blocks of a prompt a shared tier has."""
    store = remote_of(pool).store(tier)
    assert store is not None
    tree, codecs = _tree_and_codecs(pool, model)
    found = store.find(tree, [report.key for report in model.explain(tokens)], codecs)
    return len(found) - found.count(None)


def _tree_and_codecs(pool: Pool, model: Model) -> tuple[Any, list[int]]:
    fingerprint = model.identity.fingerprint
    return pool._engine.tenants.tree_id(fingerprint, "default"), sorted(pool._engine.encodings.readable(fingerprint))


@contextmanager
def nothing_is_fetched(pool: Pool) -> Iterator[None]:
    """Fails if a shared tier was read from."""
    before = [store.fetched_blocks for store in remote_of(pool).stores]
    yield
    assert [store.fetched_blocks for store in remote_of(pool).stores] == before


def some_requests(pool: Pool, models: Sequence[Model], seed: int, operations: int) -> None:
    """Random prompts that many have in common, stored, looked up and held."""
    random = Random(seed)
    held: list[tuple[Lease, Callable[[], Served]]] = []
    try:
        for _ in range(operations):
            model, tenant = random.choice(models), random.choice(TENANTS)
            tokens = prompt(4, random.randrange(3)) + prompt(random.randint(1, 5), 10 + random.randrange(12))
            match random.choices(["store", "look up", "hold", "let go"], [5, 5, 2, 2])[0]:
                case "store":
                    result = kept(pool, model, tokens, tenant)
                    assert result.stored + result.already_there + sum(result.refused.values()) == len(tokens) // 4
                case "look up":
                    fetched(pool, model, tokens, tenant)
                case "hold" if len(held) < 2:
                    lease = model.match(tokens, tenant=tenant)
                    lease.ask(DEADLINE_S)
                    held.append((lease, partial(delivered, pool, lease, model, tokens, tenant)))
                case "let go" if held:
                    lease, load = held.pop(random.randrange(len(held)))
                    with lease:
                        lease.poll()
                        load()
    finally:
        for lease, _ in held:
            lease.close()


def some_erasures(pool: Pool, tenant: str, times: int = 4) -> None:
    """Erase one tenant again and again; nobody waits for other nodes."""
    for _ in range(times):
        pool.erase(tenant=tenant, deadline_s=0.0)

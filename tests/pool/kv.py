"""Small models, prompts and payloads for the tests of the pool. A payload is a function of the block's identity."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvpool.api import Eviction
from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.blocks.record import Buffer
from kvpool.blocks.tokens import token_bytes
from kvpool.config import RuntimeConfig
from kvpool.pool.lease import Lease
from kvpool.pool.model import Model
from kvpool.pool.pool import Pool
from kvpool.pool.results import ModelSpec, StoreResult
from kvpool.prefix.integrity import IntegrityError, check_integrity
from kvpool.prefix.node import NOWHERE, RAM, SSD
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.tier import TierName
from tests.waiting import eventually

Payload: TypeAlias = npt.NDArray[np.uint8]

BLOCK_TOKENS = 4
KIB, MIB = 1 << 10, 1 << 20
LAYOUT = KVLayout(layers=2, kv_heads=1, head_size=128, dtype=Dtype.FLOAT32, block_tokens=BLOCK_TOKENS)
"""8 KiB of payload, 12 KiB of record."""
WIDE = KVLayout(layers=5, kv_heads=1, head_size=120, dtype=Dtype.FLOAT32, block_tokens=BLOCK_TOKENS)
"""19,200 bytes of payload, 24 KiB of record: the payload ends within a page."""
RECORD = LAYOUT.record_bytes
DEADLINE_S = 20.0
SERVERS = (TierName.DRAGONFLY, TierName.DATABASE)
"""Tiers that others hold, of which a pool knows what they say."""
"""How long a test waits for what must happen in the background, before it fails."""


def identity(name: str = "m", *, layout: KVLayout = LAYOUT, weights: str = "w") -> ModelIdentity:
    return ModelIdentity(name=name, weights=weights, layout=layout)


def spec(name: str = "m", **options: Any) -> ModelSpec:
    return ModelSpec(identity=identity(name, **options))


def config(
    *,
    ram: int = 64 * RECORD,
    ssd: int | None = None,
    directory: Path | None = None,
    index: int = 64 * MIB,
    sharing: Mapping[str, Any] | None = None,
    read_ahead: bool = True,
    eviction: Eviction = Eviction.ADAPTIVE,
    **ssd_options: Any,
) -> RuntimeConfig:
    """A pool of two tiers; `ssd` None: of one.

    Unless `ssd_options` say otherwise, without the second-hit filter, and with a budget that a busy machine keeps.
    """
    defaults = {"secondHit": False, "budgetS": DEADLINE_S}
    ssd_section = None if ssd is None else {"capacityBytes": ssd, **defaults, **ssd_options}
    return RuntimeConfig.model_validate(
        {
            "name": "test",
            "blockTokens": BLOCK_TOKENS,
            "ram": {"capacityBytes": ram, "indexBytes": index},
            "ssd": ssd_section,
            "directory": directory,
            "sharing": sharing or {},
            "policy": {"readAhead": read_ahead, "eviction": eviction},
        }
    )


def open_pool(directory: Path, *, disk: Disk | None = None, **options: Any) -> Pool:
    """A pool of `config(**options)` in `directory`.

    The part of its memory that is being touched ahead is nobody's: a RAM tier of a few blocks would be one block
    smaller meanwhile, so that is waited for.
    """
    pool = Pool.open(config(**options), directory=directory, disk=disk)
    touching = pool._engine.ram._prefault_thread
    if pool.config.ram.capacity_bytes < 64 * RECORD and touching is not None:
        touching.join()
    return pool


def prompt(blocks: int, seed: int = 0, extra_tokens: int = 0) -> list[int]:
    """Token ids that no prompt of another seed begins with."""
    return [seed * 100_000 + at for at in range(blocks * BLOCK_TOKENS + extra_tokens)]


def payload(
    model: ModelIdentity, tokens: bytes, block: int, salt: str = "", extras: Mapping[int, bytes] | None = None
) -> Payload:
    """What block `block` of a prompt holds: other bytes for every other prefix, model, salt (a tenant), extra key."""
    prefix = tokens[: (block + 1) * model.layout.token_bytes]
    said = repr(sorted((at, extra) for at, extra in (extras or {}).items() if at <= block))
    seed = hashlib.blake2b(model.fingerprint + prefix + salt.encode() + said.encode(), digest_size=8).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
    return generator.integers(0, 256, model.layout.payload_bytes, np.uint8)


class Prompt:
    """Source and sink of one prompt's blocks: writes what is right, and notes what arrives wrong."""

    def __init__(self, model: Model, tokens: Any, salt: str = "", extras: Mapping[int, bytes] | None = None) -> None:
        self.model = model
        self.tokens = token_bytes(tokens)
        self.salt = salt
        self.extras = extras
        self.read: list[int] = []
        self.written: list[int] = []
        self.wrong: list[int] = []

    def read_block(self, index: int, into: Buffer) -> None:
        self.read.append(index)
        into[:] = self._payload(index)

    def write_block(self, index: int, payload: Buffer) -> None:
        self.written.append(index)
        if not np.array_equal(payload, self._payload(index)):
            self.wrong.append(index)

    def _payload(self, index: int) -> Payload:
        return payload(self.model.identity, self.tokens, index, self.salt, self.extras)


def store(
    model: Model, tokens: Any, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None
) -> StoreResult:
    return model.store(tokens, Prompt(model, tokens, tenant, extra_keys), tenant=tenant, extra_keys=extra_keys)


def loaded_blocks(
    lease: Lease, model: Model, tokens: Any, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None
) -> int:
    """Load an open lease; the blocks that arrived. Fails if one of them is wrong, or out of order."""
    sink = Prompt(model, tokens, tenant, extra_keys)
    arrived = lease.load(sink)
    assert sink.wrong == [], "a block came back other than it was stored"
    assert sink.written == list(range(len(sink.written))), "blocks come in order"
    assert arrived == len(sink.written) * model.layout.block_tokens, "load says what arrived"
    return len(sink.written)


def load(model: Model, tokens: Any, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None) -> int:
    """Match and load; the blocks that arrived. Fails if one of them is wrong."""
    with model.match(tokens, tenant=tenant, extra_keys=extra_keys) as lease:
        arrived = loaded_blocks(lease, model, tokens, tenant, extra_keys)
        assert arrived <= lease.blocks
        return arrived


def served(model: Model, tokens: Any, tenant: str = "default") -> dict[TierName, int]:
    """Match and load; how many blocks came from which tier. Fails if one of them is wrong."""
    with model.match(tokens, tenant=tenant) as lease:
        loaded_blocks(lease, model, tokens, tenant)
        return lease.served


def matched(model: Model, tokens: Any, tenant: str = "default", extra_keys: Mapping[int, bytes] | None = None) -> int:
    """The blocks that a match promises."""
    with model.match(tokens, tenant=tenant, extra_keys=extra_keys) as lease:
        return lease.blocks


def fill_ram(model: Model, blocks: int, seed: int = 900) -> None:
    """Store a prompt of so many blocks that nobody else uses, so that older ones have to go."""
    store(model, prompt(blocks, seed=seed))


def stored_below(pool: Pool, model: Model, tokens: list[int], tenant: str = "default") -> None:
    """Store a prompt, see that it is on SSD, and take it out of RAM."""
    store(model, tokens, tenant)
    flushed(pool)
    empty_ram(pool)


def empty_ram(pool: Pool) -> None:
    """Evict all that may go from RAM, as if others had needed the room."""
    engine = pool._engine
    while gone := engine.index.evict(RAM, engine.ram.capacity_bytes):
        engine.copies.release(gone)


def flushed(pool: Pool) -> None:
    assert pool.flush(DEADLINE_S), "the write queue does not drain"


def check(pool: Pool, leases: Iterable[Lease] | None = None) -> None:
    """Fail unless index, tiers and counters agree, and the capacities hold.

    `leases` are all that are open: then what is being written is waited for. None: not known.
    """
    engine = pool._engine
    check_index(pool, leases)
    engine.ram.slab.check_integrity()
    for tier in pool.stats().tiers.values():
        assert tier.name in SERVERS or tier.used_bytes <= tier.capacity_bytes, f"{tier.name} is within its capacity"
    eventually(lambda: is_within_capacity(pool), "servers are within theirs, which is what they said some seconds ago")
    eventually(lambda: engine.ram.used_bytes == engine.index.copy_bytes[RAM], "every slot in use is one block's")
    assert all(engine.ram.slab.slot_bytes(place) for place in ram_places(pool)), "every place in RAM is a slot in use"


def is_within_capacity(pool: Pool) -> bool:
    return all(tier.used_bytes <= tier.capacity_bytes for tier in pool.stats().tiers.values())


def check_index(pool: Pool, leases: Iterable[Lease] | None, deadline_s: float = 3.0) -> None:
    """Fail unless every invariant of the index holds, `leases` being all that are open, if they are known.

    The writers and the housekeeper lease blocks too, for moments: what does not hold is looked at again for a while.
    """
    pins = None if leases is None else [lease._pin for lease in leases if lease._pin]
    until = time.monotonic() + deadline_s
    while True:
        if pins is not None:
            flushed(pool)
        try:
            return check_integrity(pool._engine.index, pins)
        except IntegrityError:
            if pins is None or time.monotonic() > until:
                raise
        time.sleep(0.002)


def ram_places(pool: Pool) -> list[int]:
    """Where all blocks in RAM lie."""
    index = pool._engine.index
    with index.lock:
        trees = [*index.trees.values(), *index.buried_trees()]
        return [place for tree in trees for node in tree.nodes() for place in node.places[RAM] or () if place >= 0]


def check_chains_on_ssd(pool: Pool) -> None:
    """Fail unless a block on SSD has all blocks before it there too: then a restart can match every one."""
    index = pool._engine.index
    with index.lock:
        for tree in index.trees.values():
            for node in tree.nodes():
                places = node.places[SSD]
                assert places is None or NOWHERE not in places, "no gap within an edge"
                above = node.parent
                whole = above is None or above.parent is None or len(above.places[SSD] or ()) == above.blocks
                assert places is None or whole, "none above it"


def segment_files(directory: Path) -> Iterator[Path]:
    yield from sorted((directory / "ssd").glob("*.segment"))


def disk_usage(directory: Path) -> int:
    """Bytes that the files of the ssd tier occupy, as `du` counts them."""
    nbytes = 0
    for file in (directory / "ssd").iterdir():
        with suppress(FileNotFoundError):  # it was freed, or renamed, just now
            nbytes += file.stat().st_blocks * 512
    return nbytes

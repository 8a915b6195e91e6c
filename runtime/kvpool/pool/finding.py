"""Finds what the pool and those that share its catalog hold: one query over the catalog, vectors and shared tiers.

The catalog says what there is and where it was put; what may have gone from a shared tier since is asked there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpool.blocks.identity import BlockKey, ModelIdentity, TreeId
from kvpool.blocks.tokens import Tokens, token_bytes
from kvpool.errors import InputError, SharedTierOutError
from kvpool.pool.engine import Engine
from kvpool.tiers.tier import TierName, TierUnavailableError

if TYPE_CHECKING:
    from kvpool.catalog.find import FoundBlock
    from kvpool.pool.remote.catalog import PoolCatalog

MAX_FOUND = 10_000
MAX_SIMILAR = 100
SIMILAR_DEADLINE_S = 1.0
OWN_REPORTS_S = 1.0
"""How long to wait for this process's own reports to be in the catalog, so that it finds what it stored."""
ASKED_AT_ONCE = 512


class FoundEntry(NamedTuple):
    """A block that is known, and with it the prompt that ends in it."""

    key: BlockKey
    tenant: str
    """The keyed digest that stands for the tenant, in hexadecimal."""
    depth: int
    """In blocks from the prompt's start, from 0 on."""
    tokens: int
    """From the prompt's start to the block's end."""
    tiers: tuple[TierName, ...]
    """Where it lies: on this node or another; in shared tiers as they said just now."""
    nbytes: int
    """All its copies together, as stored."""
    last_used_s: float
    hits: int
    metadata: Mapping[str, Any]
    similarity: float | None
    """To what was asked with `similar_to`, from 0 to 1."""


class Question(NamedTuple):
    """What is looked for: all that is given must hold."""

    identity: ModelIdentity
    tenant: str | None
    prefix: Tokens | None
    similar_to: Tokens | None
    older_than_s: float | None
    where: Mapping[str, Any]
    limit: int


def find(engine: Engine, question: Question) -> list[FoundEntry]:
    """What is known and matches; used longest ago first, or most similar first. Raises as `Pool.find` does."""
    try:
        return _find(engine, question)
    except TierUnavailableError as error:
        raise SharedTierOutError(f"the catalog does not answer: {error.reason}") from error


def _find(engine: Engine, question: Question) -> list[FoundEntry]:
    catalog = engine.catalog
    if catalog is None:
        raise InputError("find asks the catalog: it needs a pool with tiers.database")
    if not 1 <= question.limit <= MAX_FOUND:
        raise InputError(f"limit is {question.limit}; it must be 1 to {MAX_FOUND}")
    if question.tenant is None and (question.prefix is not None or question.similar_to is not None):
        raise InputError("prefix and similar_to need a tenant: the same tokens are other blocks for each")
    if question.prefix is not None and question.similar_to is not None:
        raise InputError("give prefix or similar_to, not both")
    if question.older_than_s is not None and question.older_than_s < 0:
        raise InputError(f"older_than is {question.older_than_s} s; it must be 0 or more")
    catalog.flush(OWN_REPORTS_S)
    similarity = _similar(engine, question)
    if similarity is not None and not similarity:
        return []
    blocks = _blocks(engine, catalog, question, None if similarity is None else list(similarity))
    located = catalog.reading.locate([block.key for block in blocks]) if blocks else {}
    shared = _in_shared_tiers(engine, question, blocks, located)
    entries = []
    for block in blocks:
        copies = [one for one in located.get(block.key, ()) if (one.tier, block.key) not in shared]
        tiers = {one.tier for one in copies}
        entries.append(
            FoundEntry(
                key=block.key,
                tenant=block.tenant.hex(),
                depth=block.depth,
                tokens=(block.depth + 1) * block.tokens,
                tiers=tuple(tier for tier in TierName if tier in tiers),
                nbytes=sum(one.nbytes for one in copies),
                last_used_s=block.last_used_s,
                hits=block.hits,
                metadata=block.metadata,
                similarity=None if similarity is None else similarity[block.key],
            )
        )
    if similarity is not None:
        entries.sort(key=lambda entry: -(entry.similarity or 0.0))
    return entries


def _tree_id(engine: Engine, question: Question) -> TreeId:
    assert question.tenant is not None
    return engine.tenants.tree_id(question.identity.fingerprint, question.tenant)


def _similar(engine: Engine, question: Question) -> dict[BlockKey, float] | None:
    """The last blocks of similar prompts, and how similar; None: not asked for."""
    if question.similar_to is None:
        return None
    prompts = engine.prompts
    if prompts is None:
        raise InputError("similar_to asks Qdrant: it needs a pool with tiers.database.qdrant")
    count = min(question.limit, MAX_SIMILAR)
    from kvpool.catalog.vectors.contract import VectorsUnavailableError

    prompts.flush(OWN_REPORTS_S)
    tokens, tree_id = token_bytes(question.similar_to), _tree_id(engine, question)
    try:
        hits = prompts.similar(tokens, tree_id, count, deadline_s=SIMILAR_DEADLINE_S)
    except VectorsUnavailableError as error:
        raise SharedTierOutError(str(error)) from error
    return {hit.leaf: hit.score for hit in hits}


def _blocks(engine: Engine, catalog: PoolCatalog, question: Question, keys: list[BlockKey] | None) -> list[FoundBlock]:
    from kvpool.catalog.find import Filters

    tenant = None if question.tenant is None else engine.tenants.digest(question.tenant)
    filters = Filters(
        fingerprint=question.identity.fingerprint,
        tenant=tenant,
        epoch=0 if tenant is None else engine.tenants.epochs.of(tenant),
        under=_last_key(engine, question),
        keys=keys,
        used_before_s=None if question.older_than_s is None else time.time() - question.older_than_s,
        where=question.where,
        limit=question.limit,
    )
    return catalog.reading.find_blocks(filters).rows


def _last_key(engine: Engine, question: Question) -> BlockKey | None:
    if question.prefix is None:
        return None
    packed, size = token_bytes(question.prefix), question.identity.layout.token_bytes
    if len(packed) < size:
        raise InputError(f"prefix has {len(packed) // 4} tokens; it must have at least a block of {size // 4}")
    return engine.tenants.chain(_tree_id(engine, question)).keys(packed, size)[-1]


def _in_shared_tiers(
    engine: Engine, question: Question, blocks: Sequence[FoundBlock], located: Mapping[BlockKey, Sequence[Any]]
) -> set[tuple[TierName, BlockKey]]:
    """Copies in shared tiers that the catalog knows, and that are gone by what the tier says."""
    gone: set[tuple[TierName, BlockKey]] = set()
    codecs = sorted(engine.encodings.readable(question.identity.fingerprint))
    for store in () if engine.remote is None else engine.remote.stores:
        by_tree: dict[TreeId, list[BlockKey]] = {}
        for block in blocks:
            if any(one.tier is store.name for one in located.get(block.key, ())):
                tree = TreeId(question.identity.fingerprint, block.tenant, block.epoch)
                by_tree.setdefault(tree, []).append(block.key)
        for tree, keys in by_tree.items():
            for at in range(0, len(keys), ASKED_AT_ONCE):
                some = keys[at : at + ASKED_AT_ONCE]
                if store.usable:
                    answer = store.find(tree, some, codecs)
                    gone |= {(store.name, key) for key, found in zip(some, answer, strict=True) if found is None}
    return gone

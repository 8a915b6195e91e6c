"""Reports for tests, and a catalog in a database of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg

from kvpool.blocks.identity import BlockKey, Fingerprint, ModelIdentity, TenantDigest, TreeId
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.catalog import storing
from kvpool.catalog.connections import Connections
from kvpool.catalog.journal import Journal
from kvpool.catalog.migrations import Schema, migrate
from kvpool.catalog.rows import Batch, BlocksRemoved, BlocksStored, BlocksUsed, Op, PromptAsked, model_seen
from kvpool.catalog.writer import CatalogWriter, WriterLimits
from kvpool.resilience import BreakerLimits, CircuitBreaker
from kvpool.tiers.tier import TierName
from tests.catalog.connecting import DEADLINE_S, bare, connections_to

IDENTITY = ModelIdentity(
    name="m", weights="w", layout=KVLayout(layers=2, kv_heads=1, head_size=128, dtype=Dtype.FLOAT32, block_tokens=16)
)
OTHER_IDENTITY = ModelIdentity(name="other", weights="w", layout=IDENTITY.layout)
MODEL, OTHER_MODEL = IDENTITY.fingerprint, OTHER_IDENTITY.fingerprint
TENANT, OTHER_TENANT = TenantDigest(b"t" * 16), TenantDigest(b"o" * 16)
TREE = TreeId(MODEL, TENANT, 0)
SEEN = model_seen(IDENTITY, 1.0)
NODE, OTHER_NODE = UUID(int=1), UUID(int=2)
NBYTES = 12_288
NOW_S = 1_700_000_000.0
BIG_TABLES = ("blocks", "locations", "prompts", "evictions")

Rows = list[tuple[Any, ...]]


def key(number: int, salt: str = "") -> BlockKey:
    return BlockKey(hashlib.blake2b(f"{salt}{number}".encode(), digest_size=16).digest())


def keys(numbers: Sequence[int], salt: str = "") -> bytes:
    return b"".join(key(number, salt) for number in numbers)


def stored(
    numbers: Sequence[int],
    *,
    tree: TreeId = TREE,
    tier: TierName = TierName.RAM,
    codec: int = 0,
    nbytes: int = NBYTES,
    at_s: float = NOW_S,
    salt: str = "",
    depth: int = 0,
    parent: BlockKey | None = None,
) -> BlocksStored:
    above = key(-1, salt) if parent is None else parent
    return BlocksStored(tree, above, keys(numbers, salt), depth, 16, tier, codec, nbytes, at_s)


def removed(
    numbers: Sequence[int], *, tier: TierName = TierName.RAM, reason: str = "evicted", at_s: float = NOW_S
) -> BlocksRemoved:
    return BlocksRemoved(keys(numbers), tier, reason, at_s)


def used(numbers: Sequence[int], at_s: float = NOW_S) -> BlocksUsed:
    return BlocksUsed(keys(numbers), at_s)


def asked(leaf: int, *, tree: TreeId = TREE, tokens: int = 100, at_s: float = NOW_S, salt: str = "") -> PromptAsked:
    return PromptAsked(tree, key(leaf, salt), tokens, None, at_s)


@dataclass
class Database:
    """A catalog that is up to date, and a bare connection to look at it."""

    folder: Path
    connection: psycopg.Connection[tuple[Any, ...]]
    sequence: int = 0

    def sql(self, text: str, *parameters: Any) -> Rows:
        cursor = self.connection.execute(text.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def value(self, text: str, *parameters: Any) -> Any:
        return self.sql(text, *parameters)[0][0]

    def count(self, table: str) -> int:
        count: int = self.value(f"select count(*) from kvpool.{table}")  # noqa: S608 - a table's name in a test
        return count

    def write(self, *ops: Op, node: UUID = NODE) -> None:
        """Write reports as one batch, as a writer does."""
        with self.connection.transaction():
            storing.write(self.connection, node, 1, ops)

    def claim(self, batch: Batch, node: UUID = NODE) -> bool:
        with self.connection.transaction():
            return storing.claim(self.connection, node, batch)

    def locations(self) -> set[tuple[bytes, str, UUID]]:
        return {(row[0], row[1], row[2]) for row in self.sql("select key, tier, node from kvpool.locations")}

    def raise_epoch(self, tenant: bytes, epoch: int) -> None:
        self.sql("select kvpool.raise_epoch(%s, %s)", tenant, epoch)

    def check_sums(self) -> None:
        """Fail unless the sums agree with the locations, group by group."""
        summed = """select fingerprint, tenant, tier, day, sum(blocks)::bigint, sum(nbytes)::bigint
                    from kvpool.holdings group by 1, 2, 3, 4 having sum(blocks) <> 0 or sum(nbytes) <> 0"""
        counted = """select fingerprint, tenant, tier, (since at time zone 'UTC')::date, count(*), sum(nbytes)::bigint
                     from kvpool.locations group by 1, 2, 3, 4"""
        assert sorted(self.sql(summed)) == sorted(self.sql(counted)), "the sums are what the locations add up to"


@contextmanager
def catalog_in(folder: Path) -> Iterator[Database]:
    with bare(folder) as connection:
        migrate(connection)
        connection.execute("set timezone to 'UTC'")
        yield Database(folder, connection)


@contextmanager
def writing(
    folder: Path,
    journal: Path | None = None,
    *,
    node: UUID = NODE,
    journal_bytes: int = 64 << 20,
    connections: Connections | None = None,
    retry_backoff_s: float = 0.05,
    **limits: Any,
) -> Iterator[CatalogWriter]:
    """A writer that tries again often, closed at the end."""
    own = connections or connections_to(folder)
    defaults = {"linger_s": 0.005, "retry_s": 0.01, "budget_s": DEADLINE_S}
    backoff = BreakerLimits(first_backoff_s=retry_backoff_s, last_backoff_s=retry_backoff_s)
    writer = CatalogWriter(
        own,
        None if journal is None else Journal(journal, max_bytes=journal_bytes),
        node=node,
        schema=Schema(),
        breaker=CircuitBreaker(backoff),
        limits=WriterLimits(**{**defaults, **limits}),
    )
    writer.start()
    try:
        yield writer
    finally:
        assert writer.close(DEADLINE_S), "the writer ends"
        if connections is None:
            own.close()


def new_node() -> UUID:
    return uuid4()


def tree_of(model: Fingerprint = MODEL, tenant: TenantDigest = TENANT, epoch: int = 0) -> TreeId:
    return TreeId(model, tenant, epoch)

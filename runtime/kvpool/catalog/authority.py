"""The authority on tenants' epochs, and the nodes that are to follow it: two tables in PostgreSQL.

An epoch never decreases. A change has a number; a node confirms the number up to which it knows all changes, with its
heartbeat, so that an erasure can name the nodes that may still serve what was erased.
"""

from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from kvpool.blocks.identity import TenantDigest
from kvpool.catalog.connections import Connections
from kvpool.catalog.migrations import Schema
from kvpool.catalog.sessions import Sessions
from kvpool.catalog.statement import Statement

PAGE_ROWS = 10_000
SILENT_AFTER_S = 60.0
"""A node that has not been heard of for so long is listed as silent."""
REMOVED_AFTER_S = 7 * 86_400.0
"""A node that has not been heard of for so long is forgotten; one that comes back after that is a new one."""
RAISE_BUDGET_S = 5.0
"""Raising an epoch waits for writers that are about to commit; this is the least that it is given."""

_RAISE = Statement("select r.epoch, r.changed from kvpool.raise_epoch(%(tenant)b, %(at_least)s) r")
_CHANGES = Statement("""
    select t.tenant, t.epoch, t.changed from kvpool.tenants t
    where t.changed > %(sequence)s order by t.changed limit %(most)s
""")
_NEWEST = Statement("select max(t.changed) from kvpool.tenants t")
_HEARTBEAT = Statement("""
    insert into kvpool.nodes as n (node, name, confirmed) values (%(node)s, %(name)s, %(confirmed)s)
    on conflict (node) do update
    set name = excluded.name, confirmed = excluded.confirmed, heartbeat_at = excluded.heartbeat_at
""")
_REMOVE_SILENT = Statement("""
    delete from kvpool.nodes where node in (
        select node from kvpool.nodes where heartbeat_at < now() - %(removed_after)s::interval for update skip locked)
""")
_NODES = Statement("""
    select n.node, n.name, n.started_at, n.heartbeat_at, n.confirmed,
        n.heartbeat_at < now() - %(silent_after)s::interval
    from kvpool.nodes n where n.confirmed < %(sequence)s order by n.name, n.node
""")
_EVERY_SEQUENCE = (1 << 63) - 1


class Raised(NamedTuple):
    """A tenant's epoch, and the number of the change that made it so."""

    epoch: int
    sequence: int


class Changes(NamedTuple):
    """Epochs that changed, each tenant's last one."""

    epochs: list[tuple[TenantDigest, int]]
    sequence: int
    """What to ask from the next time."""


class Node(NamedTuple):
    """A process that keeps blocks, as it was last heard of."""

    node: UUID
    name: str
    started_at: datetime
    heartbeat_at: datetime
    confirmed: int
    silent: bool
    """Whether it has not been heard of for `SILENT_AFTER_S`."""


class Authority:
    """Asks and changes the epochs. Safe from any thread; every call raises `TierUnavailableError`."""

    def __init__(
        self,
        connections: Connections,
        schema: Schema,
        *,
        silent_after_s: float = SILENT_AFTER_S,
        removed_after_s: float = REMOVED_AFTER_S,
    ) -> None:
        self._sessions = Sessions(connections, schema)
        self._silent_after = timedelta(seconds=silent_after_s)
        self._removed_after = timedelta(seconds=removed_after_s)

    def raise_epoch(self, tenant: TenantDigest, at_least: int) -> Raised:
        """Make a tenant's epoch at least this; what it is now, which may be more. It is on the server's disk then.

        When it has returned, no transaction that stores records or rows of an earlier epoch can commit any more.
        """
        with self._sessions.borrow(at_least_s=RAISE_BUDGET_S) as connection:
            row = connection.execute(_RAISE, {"tenant": tenant, "at_least": at_least}).fetchone()
        assert row is not None
        return Raised(*row)

    def changes_since(self, sequence: int) -> Changes:
        """All changes after this number; 0: all that there ever were. None is missed, however many commit at once.

        A number that the database has not come to yet (it was restored from a backup) is taken for 0. Who knows of a
        restore, or was away for long, asks from 0.
        """
        with self._sessions.borrow() as connection:
            newest = connection.execute(_NEWEST).fetchone()
            if newest is not None and sequence > (newest[0] or 0):
                sequence = 0
            epochs: list[tuple[TenantDigest, int]] = []
            while page := connection.execute(_CHANGES, {"sequence": sequence, "most": PAGE_ROWS}).fetchall():
                epochs += [(TenantDigest(tenant), epoch) for tenant, epoch, _ in page]
                sequence = page[-1][2]
        return Changes(epochs, sequence)

    def heartbeat(self, node: UUID, name: str, confirmed: int) -> None:
        """Say that a node lives, and up to which change it knows all; forgets those that are silent for too long."""
        with self._sessions.borrow() as connection:
            connection.execute(_HEARTBEAT, {"node": node, "name": name, "confirmed": confirmed})
            connection.execute(_REMOVE_SILENT, {"removed_after": self._removed_after})

    def unconfirmed(self, sequence: int) -> list[Node]:
        """The nodes that have not confirmed this change, the silent ones among them, by name."""
        with self._sessions.borrow() as connection:
            rows = connection.execute(_NODES, {"sequence": sequence, "silent_after": self._silent_after}).fetchall()
        return [Node(*row) for row in rows]

    def nodes(self) -> list[Node]:
        """All nodes that are known, by name."""
        return self.unconfirmed(_EVERY_SEQUENCE)

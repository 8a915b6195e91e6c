"""Connections whose database has the schema that this program knows."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from kvpool.catalog.bounded_connection import BoundedConnection
from kvpool.catalog.connections import Connections
from kvpool.catalog.migrations import Schema
from kvpool.tiers.tier import TierUnavailableError

MIGRATION_BUDGET_S = 30.0
"""What a step of the schema may take, the first time; other processes may be at it too."""


class Sessions:
    """Lends connections as `Connections` does, once the schema is there. Safe from any thread."""

    def __init__(self, connections: Connections, schema: Schema) -> None:
        self._connections = connections
        self._schema = schema
        self._was_ready = False

    @contextmanager
    def borrow(self, *, at_least_s: float = 0.0) -> Iterator[BoundedConnection]:
        """A connection whose budget is the pool's, or `at_least_s` where that is more."""
        budget_s = max(at_least_s, self._connections.budget_s)
        try:
            with self._connections.borrow(budget_s) as connection:
                self._make_ready(connection, budget_s)
                yield connection
        except TierUnavailableError as error:
            if isinstance(error.__cause__, psycopg.ProgrammingError):  # a table is missing, or not what it was
                self._was_ready = False
                self._schema.doubt()
            raise

    def _make_ready(self, connection: BoundedConnection, budget_s: float) -> None:
        if not self._was_ready:
            connection.budget_s = max(budget_s, MIGRATION_BUDGET_S)
        self._schema.ready(connection)
        self._was_ready = True
        connection.budget_s = budget_s

"""What is asked of the catalog: where blocks lie, why they went, what there is; and notes about it."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvpool.blocks.identity import BlockKey, Fingerprint
from kvpool.catalog import find, metadata, trail
from kvpool.catalog.connections import Connections
from kvpool.catalog.find import Filters, FoundBlock, FoundPrompt, Page
from kvpool.catalog.migrations import Schema
from kvpool.catalog.sessions import Sessions
from kvpool.catalog.trail import Eviction, Location


class Catalog:
    """Reads, and changes metadata. Safe from any thread.

    Every call raises `TierUnavailableError` where the database does not answer within its budget, or has a schema that
    this program does not know.
    """

    def __init__(self, connections: Connections, schema: Schema) -> None:
        self._sessions = Sessions(connections, schema)

    def locate(self, keys: Sequence[BlockKey]) -> Mapping[BlockKey, list[Location]]:
        """Where these blocks lie, each one's oldest copy first; no entry where it lies nowhere, as far as is known."""
        with self._sessions.borrow() as connection:
            return trail.locate(connection, keys)

    def trail(self, keys: Sequence[BlockKey]) -> Mapping[BlockKey, Eviction]:
        """How a copy of each of these blocks went last; no entry where none did, or where it is forgotten."""
        with self._sessions.borrow() as connection:
            return trail.trail(connection, keys)

    def find_blocks(self, filters: Filters) -> Page[FoundBlock]:
        """The blocks of which all that is asked holds, used longest ago first."""
        with self._sessions.borrow() as connection:
            return find.find_blocks(connection, filters)

    def find_prompts(self, filters: Filters) -> Page[FoundPrompt]:
        """The prompts of which all that is asked holds, asked for longest ago first."""
        with self._sessions.borrow() as connection:
            return find.find_prompts(connection, filters)

    def describe_model(self, model: Fingerprint, noted: Mapping[str, Any], version: int) -> int:
        """Replace a model's metadata, which was read as `version`; its new version. Raises `LostRaceError`."""
        with self._sessions.borrow() as connection:
            return metadata.describe_model(connection, model, noted, version)

    def describe_prompt(self, prompt: int, noted: Mapping[str, Any], version: int) -> int:
        """Replace the metadata of the prompt of this id, which was read as `version`. Raises `LostRaceError`."""
        with self._sessions.borrow() as connection:
            return metadata.describe_prompt(connection, prompt, noted, version)

    def describe_block(self, key: BlockKey, noted: Mapping[str, Any], version: int) -> int:
        """Replace a block's metadata, which was read as `version`. Raises `LostRaceError`."""
        with self._sessions.borrow() as connection:
            return metadata.describe_block(connection, key, noted, version)

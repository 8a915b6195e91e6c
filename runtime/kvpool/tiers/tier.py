"""The contract of every tier: what it stores are sealed records, and a miss is absence, never an exception.

A local tier (gpu, ram, ssd) gives each record a *place*, an integer that only the tier understands; the prefix index
remembers it. Nothing outside a tier knows how it stores.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from kvpool.blocks.record import Buffer


class TierName(StrEnum):
    """The five tiers, fastest first."""

    GPU = "gpu"
    RAM = "ram"
    DRAGONFLY = "dragonfly"
    DATABASE = "database"
    SSD = "ssd"


class TierUnavailableError(Exception):
    """The tier as a whole cannot work now (disk full, read-only, I/O error): a degradation, never a user's error."""

    def __init__(self, tier: TierName, reason: str) -> None:
        super().__init__(f"{tier}: {reason}")
        self.tier = tier
        self.reason = reason


class LocalTier(Protocol):
    """Holds sealed records. Batch calls, safe from any thread; buffers are read or written only while a call runs."""

    name: TierName

    @property
    def capacity_bytes(self) -> int:
        """The most that this tier may occupy, overhead included."""
        ...

    @property
    def used_bytes(self) -> int:
        """What it occupies now; never above `capacity_bytes`."""
        ...

    def put(self, records: Sequence[Buffer]) -> list[int | None]:
        """Store each record, in order; its place, or None where there was no room (nothing is evicted here).

        Each buffer is one whole record, padding included. Raises `TierUnavailableError` when the whole tier is out.
        """
        ...

    def get(self, places: Sequence[int], into: Sequence[Buffer]) -> list[bool]:
        """Copy each record into its buffer, which has the record's length; False where it is not to be had.

        The bytes are as stored, or not: the caller verifies them. Raises `TierUnavailableError` as `put` does.
        """
        ...

    def drop(self, places: Sequence[int]) -> None:
        """Forget these records; their bytes may be reused from now on. Unknown places are a programming error."""
        ...

    def close(self) -> None:
        """Give back files and memory. The tier is not used afterwards."""
        ...

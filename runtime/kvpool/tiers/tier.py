"""The contract of every tier: what it stores are sealed records, and a miss is absence, never an exception.

A local tier (gpu, ram, ssd) gives each record a *place*, an integer that only the tier understands; the prefix index
remembers it. A *keyed* tier (dragonfly, database) is shared between processes and asked by key: nobody remembers what
it holds. Nothing outside a tier knows how it stores.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
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


class TierBusyError(TierUnavailableError):
    """All connections to the tier were in use for its whole budget; it may be well, and who uses them would notice."""


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


class Found(NamedTuple):
    """A record that a keyed tier holds, or held a moment ago."""

    key: BlockKey
    codec: int
    """The number of its codec, as in the record's head."""
    record_bytes: int


class Sealed(NamedTuple):
    """A record that is to be stored under its key."""

    key: BlockKey
    codec: int
    record: Buffer
    """The whole record, padding included."""


class Moved(NamedTuple):
    """What became of a batch of records, in order."""

    done: list[bool]
    """Per record: it arrived whole, or was taken."""
    fault: str = ""
    """Why the rest did not, where the tier as a whole failed on the way; what was `done` by then counts."""


class Usage(NamedTuple):
    """What a keyed tier holds of everybody's."""

    used_bytes: int
    capacity_bytes: int
    """0 where it has no limit of its own."""


class Inquiry(Protocol):
    """What a keyed tier was asked, and has not answered yet. For one thread; ends with `close`."""

    def answer(self) -> list[Found | None]:
        """Wait for the answer, as `KeyedTier.find` gives it. To be called once."""
        ...

    def close(self) -> None:
        """Give up what the question holds. May be called at any time, and again."""
        ...


class KeyedTier(Protocol):
    """Holds sealed records by key, and is shared with other processes. Batch calls, safe from any thread.

    A call waits as long as it makes progress, and gives up after the tier's budget without any. When a call has
    returned, or raised, its buffers are the caller's again: bytes that arrive late find nobody there. All calls raise
    `TierUnavailableError` where the tier cannot be reached at all, cannot be logged in to, or has stalled; `get` and
    `put` say so in `Moved.fault` instead once they have moved a record. Keys of one call are of one tree.
    """

    name: TierName

    def find(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[Found | None]:
        """Which of these blocks are there, in one round trip: for each the first of `codecs` that it has.

        `codecs` are numbers, at least one. What has the key but cannot be a record is not there.
        """
        ...

    def inquire(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> Inquiry:
        """Ask what `find` asks, and leave the waiting for later, so that several tiers are asked at once.

        The tier's budget begins here. Where there is no connection yet, that is waited for.
        """
        ...

    def get(self, tree: TreeId, wanted: Sequence[Found], into: Sequence[Buffer]) -> Moved:
        """Copy each record into its buffer, which has `record_bytes`; not done where it is gone, or of another length.

        The bytes are as they are there: the caller verifies them. A buffer that is not done may hold anything. `wanted`
        are in their prompt's order, and used by this: what the tier keeps by recency or for a time is kept as if
        written now. Who reads a prompt's end without its beginning calls `touch` for the whole of it.
        """
        ...

    def put(self, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey]) -> Moved:
        """Store records of consecutive blocks of one prompt, first to last; not done where they are refused.

        What is there already is kept as if written now. `ancestors` are the keys of the blocks before them, from the
        prompt's first on: they are kept at least as long as their descendants, if they are there.
        """
        ...

    def touch(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        """Keep these consecutive blocks of one prompt as if written now, parents at least as long as children."""
        ...

    def drop(self, tree: TreeId, found: Sequence[Found]) -> None:
        """Remove records, if they are there."""
        ...

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """Remove all of a tenant's records of earlier epochs; how many those were. Takes time, and blocks nobody."""
        ...

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """Remove all records of a model; how many those were. Takes time, and blocks nobody."""
        ...

    def usage(self) -> Usage:
        """How full it is; asks the server."""
        ...

    def close(self) -> None:
        """Give connections back, those in use too: calls in flight fail. The tier is not used afterwards."""
        ...

"""What `Pool.stats` returns: a snapshot, made when it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kvpool.pool.results import Refusal
from kvpool.resilience import Change
from kvpool.tiers.tier import TierName


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier. `used_bytes` is what it occupies, overhead included; `blocks` and `block_bytes` what it holds.

    Of a tier that is shared with other processes nobody here knows how many blocks it holds, so these are 0; bytes are
    all that its server holds, as of some seconds ago.
    """

    name: TierName
    available: bool
    capacity_bytes: int
    used_bytes: int
    blocks: int
    block_bytes: int
    loaded_blocks: int
    """Blocks that loads found here."""
    loaded_bytes: int
    corrupt: Mapping[str, int]
    """Records that were not what was asked for, by reason."""
    last_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTierStats:
    """What this process had to do with a tier that is shared. Dropped blocks were to be sent there, by reason."""

    queued_parcels: int
    sent_blocks: int
    sent_bytes: int
    dropped_blocks: Mapping[str, int]
    found_blocks: int
    """Blocks that were asked for and are there, whether or not they were read."""
    fetched_blocks: int
    fetched_bytes: int
    in_flight_bytes: int
    refused_for_room: int
    """Batches that were not read or sent, since too many bytes were in flight."""
    busy: int
    """Calls that were given up, since all connections were in use for the whole budget."""
    fell_out: int
    """How often it went out of use."""


class PrefetchStats(NamedTuple):
    """Blocks that were read ahead of being asked for, and what became of them."""

    searches: int
    prefetched_blocks: int
    used_blocks: int
    unused_blocks: int
    """They left RAM before anybody asked for them."""
    held_bytes: int
    """Neither used nor gone yet."""

    @property
    def precision(self) -> float:
        """Used ones of those whose fate is known."""
        known = self.used_blocks + self.unused_blocks
        return self.used_blocks / known if known else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBehindStats:
    """What went down to SSD. Dropped blocks were wanted there and lost or refused, by reason."""

    queued_edges: int
    saved_blocks: int
    saved_bytes: int
    dropped_blocks: Mapping[str, int]
    physical_bytes_written: int
    """All that was written to the disk: records, footers and what reclaiming wrote again."""
    freed_segments: int
    rewritten_blocks: int
    rewritten_bytes: int

    @property
    def write_amplification(self) -> float:
        """Bytes written to the disk for each byte of records saved."""
        return self.physical_bytes_written / self.saved_bytes if self.saved_bytes else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """The prefix index. `blocks` counts each block once, however many tiers hold it."""

    trees: int
    blocks: int
    bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats:
    """One model that this process has registered."""

    name: str
    fingerprint: str
    record_bytes: int
    prefill_tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareStats:
    """What one model holds of one tier, in encoded bytes, and its quota. `limit_bytes` None: the tier's capacity."""

    blocks: int
    used_bytes: int
    in_flight_bytes: int
    """Charged, and not yet entered: being stored, read or encoded."""
    guaranteed_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedShareStats:
    """What one model holds of a shared tier: of dragonfly what this process knows, of the database what all have."""

    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountStats:
    """All revisions of one model together."""

    name: str
    asked_blocks: int
    matched_blocks: int
    tiers: Mapping[TierName, ShareStats]
    shared: Mapping[TierName, SharedShareStats]
    """Of the shared tiers in which the model has a limit."""

    @property
    def hit_ratio(self) -> float:
        """Matched blocks of those that were asked for, 0 to 1."""
        return self.matched_blocks / self.asked_blocks if self.asked_blocks else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingStats:
    """What codecs did, by codec; blocks that had to be kept as they are, by reason."""

    encoded_blocks: Mapping[str, int]
    raw_bytes: Mapping[str, int]
    """Records before they were encoded."""
    encoded_bytes: Mapping[str, int]
    kept_raw_blocks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreStats:
    """What start-up found on SSD. `dropped` counts records and files that were not taken, by reason."""

    blocks: int
    seconds: float
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A whole pool, since it was opened."""

    name: str
    mode: str
    """`normal`, or what is out: see `kvpool.resilience.mode`."""
    mode_changes: tuple[Change, ...]
    """What fell out and came back last, with times in seconds since the epoch; oldest first, at most 256."""
    requests: int
    asked_blocks: int
    matched_blocks: int
    shared_hit_blocks: int
    """Matched blocks that belong to a prefix that several requests share."""
    shared_bytes: Mapping[TierName, int]
    saved_prefill_seconds: float
    """Prefill time that loads have spared, by each model's prefill rate; models without one count nothing."""
    stored_blocks: int
    stored_bytes: int
    already_there_blocks: int
    already_there_bytes: int
    """Bytes that stores did not have to keep once more, since another request had stored the same prefix."""
    refused_blocks: Mapping[Refusal, int]
    short_loads: int
    skipped_slower_blocks: int
    demoted_blocks: int
    """Copied from device memory down to RAM."""
    promoted_blocks: int
    """Copied from RAM up to device memory."""
    tiers: Mapping[TierName, TierStats]
    shared: Mapping[TierName, SharedTierStats]
    prefetch: PrefetchStats | None
    """None: `prefetch.semantic` is off."""
    skipped_lookups: int
    """Leases whose tail was not looked up in shared tiers, since too many lookups were under way."""
    write_behind: WriteBehindStats
    index: IndexStats
    restored: RestoreStats
    models: tuple[ModelStats, ...]
    accounts: tuple[AccountStats, ...]
    encoding: EncodingStats

    @property
    def hit_ratio(self) -> float:
        """Matched blocks of those that were asked for, 0 to 1."""
        return self.matched_blocks / self.asked_blocks if self.asked_blocks else 0.0

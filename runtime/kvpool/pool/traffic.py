"""Counters of what a pool's users did, as `Pool.stats` shows them."""

import threading
from collections import Counter
from collections.abc import Mapping

from kvpool.pool.results import Refusal
from kvpool.tiers.tier import TierName


class Traffic:
    """Counts once per call of a user, not per block. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.loaded_blocks: Counter[TierName] = Counter()
        self.loaded_bytes: Counter[TierName] = Counter()
        self.short_loads = 0
        """Loads that delivered fewer blocks than were matched."""
        self.stored_blocks = 0
        self.stored_bytes = 0
        self.already_there_blocks = 0
        self.already_there_bytes = 0
        self.refused_blocks: Counter[Refusal] = Counter()
        self.skipped_slower_blocks = 0
        """Blocks on SSD that were not read since computing them is faster."""

    def count_load(self, served: Mapping[TierName, int], record_bytes: int, *, short: bool) -> None:
        """A lease was loaded."""
        with self._lock:
            for tier, blocks in served.items():
                self.loaded_blocks[tier] += blocks
                self.loaded_bytes[tier] += blocks * record_bytes
            self.short_loads += short

    def count_store(self, stored: int, already_there: int, refused: Mapping[Refusal, int], record_bytes: int) -> None:
        """A prompt was stored."""
        with self._lock:
            self.stored_blocks += stored
            self.stored_bytes += stored * record_bytes
            self.already_there_blocks += already_there
            self.already_there_bytes += already_there * record_bytes
            self.refused_blocks.update(refused)

    def count_skipped(self, blocks: int) -> None:
        """Blocks were left on SSD since reading them would have taken longer than computing them."""
        with self._lock:
            self.skipped_slower_blocks += blocks

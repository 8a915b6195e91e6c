"""Takes back what left the index: gives each place to its tier."""

from collections.abc import Sequence

from kvpool.pool.gpu_store import GpuStore
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix.accounts import Account
from kvpool.prefix.index import Gone, PrefixIndex
from kvpool.prefix.node import GPU, RAM, SSD
from kvpool.prefix.reclaiming import evict_own
from kvpool.tiers.ram import RamTier


class Copies:
    """The way from the index back to the tiers."""

    def __init__(self, ram: RamTier, ssd: SsdStore, gpu: GpuStore | None = None) -> None:
        self._ram = ram
        self._ssd = ssd
        self._gpu = gpu

    def release(self, gone: Sequence[Gone]) -> None:
        """Give every place back."""
        if not gone:
            return
        ram = [copy.place for copy in gone if copy.level == RAM]
        if ram:
            self._ram.drop(ram)
        if len(ram) < len(gone):
            self._ssd.drop([copy.place for copy in gone if copy.level == SSD])
            if self._gpu is not None:
                self._gpu.drop([copy.place for copy in gone if copy.level == GPU])

    def evict_own(self, index: PrefixIndex, account: Account, level: int, wanted_bytes: int) -> bool:
        """Take up to 32 of a model's own blocks out of a tier, and give them back; whether any went."""
        gone = evict_own(index, account, level, wanted_bytes)
        self.release(gone)
        return bool(gone)


def shrink_index(index: PrefixIndex, copies: Copies) -> bool:
    """Forget blocks until the index is within its limit; False where leases forbid that."""
    while index.over_limit:
        gone = index.shrink()
        if not gone:
            return False
        copies.release(gone)
    return True

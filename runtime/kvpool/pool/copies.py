"""Takes back what left the index: gives each place to its tier."""

from collections.abc import Sequence

from kvpool.pool.gpu_store import GpuStore
from kvpool.pool.ssd_store import SsdStore
from kvpool.prefix.index import Gone, PrefixIndex
from kvpool.prefix.node import GPU, RAM, SSD
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


def shrink_index(index: PrefixIndex, copies: Copies) -> bool:
    """Forget blocks until the index is within its limit; False where leases forbid that."""
    while index.over_limit:
        gone = index.shrink()
        if not gone:
            return False
        copies.release(gone)
    return True

"""Whether what a tier counts is what there is; to be asked when nothing is in flight."""

from __future__ import annotations

import stat

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.ledger import Phase
from kvpool.tiers.ssd.place import bytes_of, end_page_of, offset_of
from kvpool.tiers.ssd.space import SMALL_FILES_BYTES
from kvpool.tiers.ssd.tier import SsdTier

_LIVE = 1
_SMALL_FILES = {"LOCK", "FORMAT", "BUDGET", "BUDGET.tmp"}


def check_accounts(tier: SsdTier, *, foreign: int = 0) -> None:
    """Compare bytes, records and files with each other and with the directory, which may hold so many other files."""
    space = tier._space
    counted = {segment.path: segment.file_bytes for segment in space.segments.values()}
    counted |= {blank.path: blank.file_bytes for blank in space._blanks} | space._litter
    found = {path: path.lstat() for path in tier.directory.iterdir() if path.name not in _SMALL_FILES}
    files = [path for path, status in found.items() if stat.S_ISREG(status.st_mode)]
    assert len(files) - foreign <= len(counted)
    assert {path: status.st_size for path, status in found.items() if path in counted} == {
        path: nbytes for path, nbytes in counted.items() if path in found
    }
    assert counted.keys() - found.keys() <= space._litter.keys(), "only litter may be gone already"
    assert tier.used_bytes == SMALL_FILES_BYTES + sum(counted.values()) <= tier.capacity_bytes
    assert sum(space._sizes.values()) == len(space.segments)
    for segment in space.segments.values():
        assert not segment.busy
        assert segment.phase is not Phase.FULL
        live = [place for place, state in zip(segment.places, segment.states, strict=True) if state == _LIVE]
        assert segment.live_records == len(live)
        assert segment.live_bytes == sum(map(bytes_of, live))
        ends = [PAGE_BYTES, *(end_page_of(place) * PAGE_BYTES for place in segment.places)]
        assert all(offset_of(place) >= end for place, end in zip(segment.places, ends, strict=False))
        assert ends[-1] <= segment.next_page * PAGE_BYTES < segment.file_bytes
    assert set(tier._writer._open.values()) <= {s for s in space.segments.values() if s.phase is Phase.OPEN}
    assert all(
        tier._writer._open.get(s.header.fingerprint) is s for s in space.segments.values() if s.phase is Phase.OPEN
    )

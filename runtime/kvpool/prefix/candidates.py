"""What the index asks of an eviction policy: to order the blocks that may go, by pure computation.

The index offers a node when its last block of a tier may leave (nothing deeper is as fast) and takes it back when one must
go. The policy never sees leases, quotas or protection; those are settled around it.
"""

from typing import Protocol


class Candidate(Protocol):
    """What a policy may look at."""

    last_use: int
    """The index's clock when the node's last block was used last; larger is later."""


class EvictionPolicy(Protocol):
    """Orders candidates. Each is on offer at most once; `last_use` may grow while it is."""

    def offer(self, candidate: Candidate) -> None:
        """This one may go from now on."""
        ...

    def take(self) -> Candidate | None:
        """Return the one to go next, no longer on offer; None when there is none."""
        ...

    def __len__(self) -> int:
        """How many are on offer."""
        ...

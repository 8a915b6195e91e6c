"""What a replay of one trace at one capacity came to."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """Counts of one replay. `blocks` are those asked for; `hits` of them were there, as part of a prefix."""

    requests: int
    blocks: int
    hits: int
    seconds: float

    @property
    def hit_percent(self) -> float:
        """Hits of all blocks asked for."""
        return 100 * self.hits / self.blocks if self.blocks else 0.0

    @property
    def requests_per_second(self) -> float:
        """How fast the replay itself went."""
        return self.requests / self.seconds if self.seconds else 0.0

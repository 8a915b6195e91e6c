"""Evicts the block that was used longest ago, where uses count as much as they turned out to be worth."""

from collections.abc import Sequence
from operator import add

from kvpool.policy.demand import Demand
from kvpool.policy.lru import LruPolicy
from kvpool.policy.traits import CLASS_OF, CLASSES
from kvpool.prefix.candidates import Candidate

_NEVER = 1 << 62


class AdaptivePolicy:
    """The candidate with the earliest date: that of its last use and the head start of its uses; see `Hindsight`.

    One LRU for each class of uses, of which the oldest are compared: so another head start costs nothing.
    """

    def __init__(self, demand: Demand, level: int) -> None:
        self._learned = demand.hindsight
        self._level = level
        self._queues = [LruPolicy() for _ in range(CLASSES)]
        self._class_of: dict[Candidate, int] = {}
        self._ages = [_NEVER] * CLASSES
        """Of the oldest of each queue."""

    def __len__(self) -> int:
        return len(self._class_of)

    def offer(self, candidate: Candidate, last_use: int, trait: int) -> None:
        """Add a candidate, or give it another age and trait."""
        self.withdraw(candidate)
        at = self._class_of[candidate] = CLASS_OF[trait]
        self._queues[at].offer(candidate, last_use)
        if last_use < self._ages[at]:
            self._ages[at] = last_use

    def withdraw(self, candidate: Candidate) -> None:
        """Forget a candidate; nothing happens when it is not on offer."""
        at = self._class_of.pop(candidate, None)
        if at is not None:
            queue = self._queues[at]
            age = queue.offered_at(candidate)
            queue.withdraw(candidate)
            if age == self._ages[at]:
                self._look_at(at)

    def take(self) -> tuple[Candidate, int] | None:
        """Return the candidate with the earliest date, and the age at which it was offered."""
        if not self._class_of:
            return None
        dates = self._dates()
        at = dates.index(min(dates))
        taken = self._queues[at].take()
        assert taken is not None
        del self._class_of[taken[0]]
        self._look_at(at)
        return taken

    def date(self, last_use: int, trait: int) -> int:
        """The time of the last use, and the head start of the uses."""
        return last_use + self._learned.head_starts[self._level][CLASS_OF[trait]]

    def next_date(self) -> int | None:
        """The earliest date. So what a model uses often is worth as much beside another's as beside its own."""
        return min(self._dates()) if self._class_of else None

    def offered_at(self, candidate: Candidate) -> int | None:
        """The age at which the candidate is on offer; None when it is not."""
        at = self._class_of.get(candidate)
        return None if at is None else self._queues[at].offered_at(candidate)

    def _dates(self) -> Sequence[int]:
        return list(map(add, self._ages, self._learned.head_starts[self._level]))

    def _look_at(self, at: int) -> None:
        age = self._queues[at].next_date()
        self._ages[at] = _NEVER if age is None else age

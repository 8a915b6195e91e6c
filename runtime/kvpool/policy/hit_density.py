"""Evicts the block that promises the fewest hits for the time for which it would be kept."""

from collections import deque

from kvpool.policy.demand import BIN_END, Demand
from kvpool.policy.lru import LruPolicy
from kvpool.prefix.candidates import Candidate

_NEVER = 1 << 62
_INFINITE = float("inf")


class _Queue:
    """The candidates of one trait, with both ends at hand."""

    __slots__ = ("oldest", "trait", "youngest")

    def __init__(self, trait: int) -> None:
        self.trait = trait
        self.oldest = LruPolicy()
        self.youngest: deque[tuple[int, Candidate]] = deque(maxlen=64)
        """Each offered later and not older than the one before it, and maybe void by now. A few will do: where none is
        left, the youngest is not known for a while."""

    def offer(self, candidate: Candidate, last_use: int) -> None:
        self.oldest.offer(candidate, last_use)
        youngest = self.youngest
        if not youngest or last_use >= youngest[-1][0]:
            youngest.append((last_use, candidate))

    def newest_age(self) -> int | None:
        youngest = self.youngest
        while youngest:
            last_use, candidate = youngest[-1]
            if self.oldest.offered_at(candidate) == last_use:
                return last_use
            youngest.pop()
        return None

    def take_youngest(self) -> tuple[Candidate, int]:
        last_use, candidate = self.youngest.pop()
        self.oldest.withdraw(candidate)
        return candidate, last_use


class HitDensityPolicy:
    """Of the oldest and the youngest candidate of each trait, the one with least worth; see `Demand`.

    The youngest is looked at because people come back after a while: what is just past is then worth less than what is
    about to be asked for. The one used longest ago goes all the same unless the other is worth clearly less, and while
    LRU would do better: where nothing can be learned, this is LRU.

    What each end of each trait's candidates is worth is kept until the end is another, or has come to an age that is
    worth something else.
    """

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._queue_of: dict[Candidate, int] = {}
        self._queues: list[_Queue] = []
        self._of_trait: dict[int, int] = {}
        self._ages: list[int] = []
        """Of the oldest of each queue."""
        self._worths: list[float] = []
        """Of the oldest and the youngest of each queue."""
        self._good_until: list[int] = []
        """Up to which time each queue's worths hold."""
        self._changed: set[int] = set()
        """Queues whose ends may be others by now."""
        self._looked_at = -1
        self._worth_version = 0
        self._oldest = 0
        """The queue with the candidate used longest ago."""
        self._least = _INFINITE

    def __len__(self) -> int:
        return len(self._queue_of)

    def offer(self, candidate: Candidate, last_use: int, trait: int) -> None:
        """Add a candidate, or give it another age and trait."""
        at = self._of_trait.get(trait)
        if at is None:
            at = self._opened(trait)
        before = self._queue_of.get(candidate)
        queue = self._queues[at]
        if before is not None:
            self._changed.add(before)
            if before != at:
                self._queues[before].oldest.withdraw(candidate)
        if before is not None or last_use < self._ages[at] or not queue.youngest or last_use >= queue.youngest[-1][0]:
            self._changed.add(at)
        self._queue_of[candidate] = at
        queue.offer(candidate, last_use)

    def withdraw(self, candidate: Candidate) -> None:
        """Forget a candidate; nothing happens when it is not on offer."""
        at = self._queue_of.pop(candidate, None)
        if at is not None:
            self._queues[at].oldest.withdraw(candidate)
            self._changed.add(at)

    def take(self) -> tuple[Candidate, int] | None:
        """Return the candidate with least worth, and the age at which it was offered."""
        if not self._queue_of:
            return None
        at, youngest = self._choice()
        queue = self._queues[at]
        taken = queue.take_youngest() if youngest else queue.oldest.take()
        assert taken is not None
        self._changed.add(at)
        del self._queue_of[taken[0]]
        return taken

    def goes_too(self, last_use: int, trait: int) -> bool:
        """Whether a candidate like this would be taken next."""
        self._look()
        worth, oldest = self._demand.worth(trait, last_use), self._oldest
        if last_use <= self._ages[oldest]:
            return worth <= self._least or self._least >= self._demand.clearly_less * worth
        return worth <= self._least and worth < self._demand.clearly_less * self._worths[2 * oldest]

    def next_age(self) -> int | None:
        """The age of the oldest candidate, whether or not that goes next: so models are compared by what they keep."""
        ages = [age for queue in self._queues if (age := queue.oldest.next_age()) is not None]
        return min(ages, default=None)

    def offered_at(self, candidate: Candidate) -> int | None:
        """The age at which the candidate is on offer; None when it is not."""
        at = self._queue_of.get(candidate)
        return None if at is None else self._queues[at].oldest.offered_at(candidate)

    def _opened(self, trait: int) -> int:
        at = self._of_trait[trait] = len(self._queues)
        self._queues.append(_Queue(trait))
        self._ages.append(_NEVER)
        self._worths += [_INFINITE, _INFINITE]
        self._good_until.append(0)
        return at

    def _choice(self) -> tuple[int, bool]:
        """The queue to take from, and whether its youngest."""
        self._look()
        if self._least < self._demand.clearly_less * self._worths[2 * self._oldest]:
            best = self._worths.index(self._least)
            return best // 2, best % 2 == 1
        return self._oldest, False

    def _look(self) -> None:
        """Bring up to date what is kept of all queues."""
        now = self._demand.now
        if now != self._looked_at:
            self._look_around(now)
        elif not self._changed:
            return
        for at in self._changed:
            self._look_at(at, now)
        self._changed.clear()
        self._oldest = self._ages.index(min(self._ages))
        self._least = min(self._worths)

    def _look_around(self, now: int) -> None:
        """Time has passed: note what may be worth something else."""
        self._looked_at = now
        demand = self._demand
        demand.refresh()
        if self._worth_version == demand.worth_version:
            self._changed.update(at for at, until in enumerate(self._good_until) if until <= now)
        else:
            self._worth_version = demand.worth_version
            self._changed.update(range(len(self._queues)))

    def _look_at(self, at: int, now: int) -> None:
        """Bring up to date what is kept of a queue."""
        queue, worth_at = self._queues[at], at + at
        old = queue.oldest.next_age()
        if old is None:
            self._ages[at] = self._good_until[at] = _NEVER
            self._worths[worth_at] = self._worths[worth_at + 1] = _INFINITE
            return
        table = self._demand.worths[queue.trait]
        age = now - old
        in_bin = (age * age).bit_length()
        self._ages[at] = old
        self._worths[worth_at] = table[in_bin]
        until = old + BIN_END[in_bin]
        young = queue.newest_age()
        if young is None or young == old:
            self._worths[worth_at + 1] = _INFINITE
        else:
            age = now - young
            in_bin = (age * age).bit_length()
            self._worths[worth_at + 1] = table[in_bin]
            until = min(until, young + BIN_END[in_bin])
        self._good_until[at] = until

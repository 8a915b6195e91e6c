"""Evicts the block that promises the fewest hits for the time for which it would be kept."""

from kvpool.policy.demand import Demand
from kvpool.policy.lru import LruPolicy
from kvpool.prefix.candidates import Candidate


class _Ages:
    """The candidates of one trait, with both ends at hand."""

    __slots__ = ("oldest", "youngest")

    def __init__(self) -> None:
        self.oldest = LruPolicy()
        self.youngest = LruPolicy()
        """By negative age."""

    def offer(self, candidate: Candidate, last_use: int) -> None:
        self.oldest.offer(candidate, last_use)
        self.youngest.offer(candidate, -last_use)

    def withdraw(self, candidate: Candidate) -> None:
        self.oldest.withdraw(candidate)
        self.youngest.withdraw(candidate)

    def take(self, *, youngest: bool) -> tuple[Candidate, int]:
        taken = self.youngest.take() if youngest else self.oldest.take()
        assert taken is not None
        candidate, age = taken
        if youngest:
            self.oldest.withdraw(candidate)
            return candidate, -age
        self.youngest.withdraw(candidate)
        return candidate, age


class HitDensityPolicy:
    """Of the oldest and the youngest candidate of each trait, the one with least worth; see `Demand`.

    The youngest is looked at because people come back after a while: what is just past is then worth less than what is
    about to be asked for. The one used longest ago goes all the same unless the other is worth clearly less: where
    nothing can be learned, this is LRU.
    """

    CLEARLY_LESS = 0.6
    """With all the confidence that there can be; less of it asks for a larger difference."""

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._traits: dict[Candidate, int] = {}
        self._ages: dict[int, _Ages] = {}
        """Of traits that have candidates."""

    def __len__(self) -> int:
        return len(self._traits)

    def offer(self, candidate: Candidate, last_use: int, trait: int) -> None:
        """Add a candidate, or give it another age and trait."""
        if self._traits.get(candidate, trait) != trait:
            self.withdraw(candidate)
        self._traits[candidate] = trait
        ages = self._ages.get(trait)
        if ages is None:
            ages = self._ages[trait] = _Ages()
        ages.offer(candidate, last_use)

    def withdraw(self, candidate: Candidate) -> None:
        """Forget a candidate; nothing happens when it is not on offer."""
        trait = self._traits.pop(candidate, None)
        if trait is not None:
            self._ages[trait].withdraw(candidate)
            self._tidy(trait)

    def take(self) -> tuple[Candidate, int] | None:
        """Return the candidate with least worth, and the age at which it was offered."""
        if not self._traits:
            return None
        self._demand.refresh()
        trait, youngest = self._choice()
        candidate, age = self._ages[trait].take(youngest=youngest)
        del self._traits[candidate]
        self._tidy(trait)
        return candidate, age

    def next_age(self) -> int | None:
        """The age of the oldest candidate, whether or not that goes next: so models are compared by what they keep."""
        ages = [age for queue in self._ages.values() if (age := queue.oldest.next_age()) is not None]
        return min(ages, default=None)

    def offered_at(self, candidate: Candidate) -> int | None:
        """The age at which the candidate is on offer; None when it is not."""
        trait = self._traits.get(candidate)
        return None if trait is None else self._ages[trait].oldest.offered_at(candidate)

    def _choice(self) -> tuple[int, bool]:
        """The trait to take from, and whether its youngest."""
        worth = self._demand.worth
        lru_age, lru_trait = None, 0
        least, choice = 0.0, None
        for trait, queue in self._ages.items():
            age, newest = queue.oldest.next_age(), queue.youngest.next_age()
            assert age is not None
            assert newest is not None
            if lru_age is None or age < lru_age:
                lru_age, lru_trait = age, trait
            old, young = worth(trait, age), worth(trait, -newest)
            if choice is None or min(old, young) < least:
                least, choice = min(old, young), (trait, young < old)
        assert lru_age is not None
        assert choice is not None
        if least < self.CLEARLY_LESS * self._demand.confidence * worth(lru_trait, lru_age):
            return choice
        return lru_trait, False

    def _tidy(self, trait: int) -> None:
        if not len(self._ages[trait].oldest):
            del self._ages[trait]

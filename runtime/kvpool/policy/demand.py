"""Which blocks are asked for again, and when: learned from one model's requests.

A block's *trait* is a byte: how often it was asked for (1 to 5 and more; once, as a prompt's last, is of its own kind,
since that is often where prompts part) and how deep it lies in its prompt (in powers of eight). For each trait it is
counted after how long blocks with it were asked for again. What was evicted is remembered for a while, so that its
return counts too, and finds its trait again: else the policy would learn only from what it had kept. Both fade, and
both are bounded.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from math import isqrt

from kvpool.policy.lru_window import LruWindow
from kvpool.policy.remembered import Remembered

KEY_BYTES = 16
MOST_USES = 5
DEPTHS = 3
"""Depths 0 to 6, 7 to 62, and beyond."""
BINS = 40
"""Two to an octave of age: see `bin_of`."""
PRIOR_REQUESTS = 20
"""What is known of a trait counts as much as what is known of all together once so many requests' blocks had it."""
DOUBTFUL_REQUESTS = 100
"""After so many requests half of the confidence is there."""
DOUBTFUL_TURNOVERS = 1
"""After LRU would have replaced all that is held so often, half of the confidence is there."""
MOST_HAZARD = 0.95
REFRESH_USES = 64
"""At least so many uses lie between two looks at what was counted, and an eighth of all that are counted."""
REFRESH_AT_LEAST_USES = 4_096
"""No more than so many."""
TRAITS_AT_ONCE = 3
"""How many are looked at together; a divisor of how many there are."""
HALF_LIFE_USES = 1 << 16
"""After so many uses all counts are halved."""
CLEARLY_LESS = 0.6
"""What is worth that much less than LRU's choice goes in its place: with all the confidence that there can be."""
PROVEN_GAIN = 0.003
"""Share of the blocks asked for that was hit beyond LRU: from there on, what is worth less is worth less."""
MOST_REGRET = 0.001
"""Share of the blocks asked for that LRU would have hit in addition: beyond, its order is kept to for a while."""
FREE_REGRET = 128
"""In blocks, beside that share."""
BARRED_REQUESTS = 256
"""For so many, then twice as many the next time, and so on: what is learned meanwhile is worth another trial."""
_PENDING = 64
_WIDTH = 8
"""Values of a byte for each depth; of which 1 to `_LAST` are in use."""
_LAST = MOST_USES + 1
"""Asked for once, as the last of its prompt."""


def bin_of(age: int) -> int:
    """The bin of an age: bin b holds ages from 2^((b-1)/2) to below 2^(b/2); bin 0 what was used just now."""
    return min((age * age).bit_length(), BINS - 1) if age > 0 else 0


def _starts() -> Iterator[float]:
    yield 0.0
    for at in range(BINS):
        yield 2.0 ** (at / 2)


_START = tuple(_starts())
BIN_END = tuple(isqrt((1 << at) - 1) + 1 for at in range(128))
"""The first age after each bin, as many as there are before `bin_of` puts the oldest together."""
_LENGTH = tuple(_START[at + 1] - _START[at] for at in range(BINS))


def _fresh_traits() -> bytes:
    depths = (8**depth - 1 for depth in range(1, DEPTHS))  # where the next of the depths begins
    ends = [*depths, 8**DEPTHS]
    traits, first = [], 0
    for depth, end in enumerate(ends):
        traits.append(bytes([depth * _WIDTH + 1]) * (end - first))
        first = end
    return b"".join(traits)


_FRESH = _fresh_traits()
_DEEPEST = _FRESH[-1:]
_TRAITS = tuple(depth * _WIDTH + uses for depth in range(DEPTHS) for uses in range(1, _LAST + 1))


def _stepped(trait: int) -> int:
    depth, uses = divmod(trait, _WIDTH)
    return min(depth * _WIDTH + (2 if uses == _LAST else min(uses + 1, MOST_USES)), 0xFF)


class Demand:
    """What is known of one model's demand. Guarded by the index's lock; deterministic.

    Times are those of a clock that advances with each use of the index.
    """

    step = bytes(map(_stepped, range(256)))
    """For `bytes.translate`: the traits of blocks after one more use."""

    def __init__(self) -> None:
        self.now = 0
        self.clearly_less = 0.0
        """What is worth less than this share of what LRU's choice is worth goes in its place."""
        self.worth_version = 0
        """Advances when `worth` was brought up to date."""
        self._born = 0
        """When the first request came; the clock is the index's, which may be older."""
        self._since = 0
        """Since when what is counted was counted."""
        self._pending: list[tuple[bytes, int]] = []
        self._returns = {trait: [0.0] * BINS for trait in _TRAITS}
        """Blocks with this trait that were asked for again, by age."""
        self._begun = dict.fromkeys(_TRAITS, 0.0)
        """Blocks that have got this trait."""
        self._requests = 1.0
        self._blocks_asked = 0.0
        self._gain = 0.0
        """Blocks that were hit and would not have been under LRU, less those that only LRU would have hit."""
        self._asks = 0
        self._barred_until = 0
        """Up to so many requests the order is LRU's, for that would have hit more."""
        self._bar_requests = BARRED_REQUESTS
        self._forgiven = 0.0
        """What of `gain`, lost before the latest trial, is not held against that."""
        self._lru = LruWindow()
        self._remembered = Remembered()
        self.worths = {trait: _to_any_age([1 / (1 + _START[at]) for at in range(BINS)]) for trait in _TRAITS}
        """Before anything is known the least recently used is worth least."""
        self._next_worth: dict[int, list[float]] = {}
        self._refreshed = 0
        self._to_learn: list[int] = []
        self._overall: list[float] = [0.0] * BINS

    @property
    def remembered(self) -> int:
        """How many evicted blocks are remembered; never more than `2 * MOST_REMEMBERED`."""
        return len(self._remembered)

    @property
    def gain(self) -> float:
        """Share of the blocks asked for that was hit beyond what an LRU of the same size would have hit."""
        return self._gain / self._blocks_asked if self._blocks_asked else 0.0

    # -- what happens --------------------------------------------------------------------------------------------------

    def used(self, traits: bytes, last_use: int) -> None:
        """Blocks with these traits, used at `last_use` before, are asked for now."""
        blocks = len(traits)
        if last_use:
            self._pending.append((traits, self.now - last_use))
        self._blocks_asked += blocks
        self._gain += blocks - self._lru.use(blocks, last_use, self.now)

    def asked(self) -> None:
        """A request's known blocks have been told."""
        if not self._born:
            self._born = self._since = self.now
        self._requests += 1
        self._asks += 1
        if len(self._pending) > _PENDING:
            self._digest()

    def entered(self, keys: bytes, depth: int, now: int) -> bytes:
        """Blocks that were nowhere are stored, the first at `depth`: return their traits."""
        self.now = now
        blocks = len(keys) // KEY_BYTES
        traits = _FRESH[depth : depth + blocks]
        if len(traits) < blocks:
            traits += _DEEPEST * (blocks - len(traits))
        returned = self._returned(keys) if self._remembered else b""
        if returned:
            traits = returned + traits[len(returned) :]
        last = traits[-1]
        if last % _WIDTH == 1:
            last += _LAST - 1
            traits = traits[:-1] + bytes((last,))
        for trait in set(traits):
            self._begun[trait] += traits.count(trait)
        self._lru.enter(blocks, blocks - len(returned), now + 1)  # dated when the lease is lengthened over them
        self._blocks_asked += blocks
        return traits

    def extended(self, traits: bytes) -> bytes:
        """The last block with these traits, which might have been a prompt's last, was not."""
        last = traits[-1]
        if last % _WIDTH != _LAST:
            return traits
        fresh = last - _LAST + 1
        self._begun[last] -= 1
        self._begun[fresh] += 1
        return traits[:-1] + bytes([fresh])

    def lost(self, keys: Sequence[bytes], trait: int, last_use: int) -> None:
        """Blocks of one trait, used at one time, leave for good."""
        self._lru.leave(len(keys))
        self._remembered.add(keys, trait, last_use, self._lru.held)

    def erased(self, blocks: int, last_use: int) -> None:
        """Blocks used at one time leave because they must, and are not remembered."""
        self._lru.leave(blocks)
        self._lru.forget(blocks, last_use)

    def adopted(self, blocks: int) -> None:
        """So many blocks came from another account, of which nothing is known here; or went there, if negative."""
        if blocks < 0:
            self._lru.leave(-blocks)
        else:
            self._lru.enter(blocks, blocks, self.now)

    def _returned(self, keys: bytes) -> bytes:
        """The traits, one use on, of as many of the first blocks as are remembered.

        A block is forgotten no later than those above it, so that none after the first unknown one is remembered.
        """
        traits = bytearray()
        for at in range(0, len(keys), KEY_BYTES):
            known = self._remembered.pop(keys[at : at + KEY_BYTES])
            if known is None:
                break
            trait, last_use = known
            self._returns[trait][bin_of(self.now - last_use)] += 1
            self._gain -= self._lru.use(1, last_use, self.now + 1)
            traits.append(self.step[trait])
        return bytes(traits)

    def _digest(self) -> None:
        by_bin: dict[int, bytearray] = {}
        for traits, age in self._pending:
            by_bin.setdefault(bin_of(age), bytearray()).extend(traits)
        for at, together in by_bin.items():
            for trait in set(together):
                blocks = together.count(trait)
                self._returns[trait][at] += blocks
                self._begun[self.step[trait]] += blocks
        self._pending.clear()

    # -- what follows from it ------------------------------------------------------------------------------------------

    def worth(self, trait: int, last_use: int) -> float:
        """Hits that a block promises for each unit of time for which it is kept, if that is ended when it is best."""
        age = self.now - last_use
        return self.worths[trait][(age * age).bit_length()]

    def refresh(self) -> None:
        """Bring `worth` and `clearly_less` up to date, a few traits a call: some 100 us, so that nobody waits long."""
        self.clearly_less = self._trust()
        if self._to_learn:
            for _ in range(TRAITS_AT_ONCE):
                self._learn(self._to_learn.pop())
            if not self._to_learn:
                self.worths, self._next_worth = self._next_worth, {}
                self.worth_version += 1
        elif self.now - self._refreshed >= min(max(REFRESH_USES, (self.now - self._since) // 8), REFRESH_AT_LEAST_USES):
            self._digest()
            if self.now - self._since > HALF_LIFE_USES:
                self._fade()
            self._refreshed = self.now
            self._overall = self._hazards(_summed(self._returns.values()), sum(self._begun.values()), None)
            self._to_learn = list(_TRAITS)

    def _trust(self) -> float:
        """What `clearly_less` should be now."""
        if self._asks < self._barred_until:
            self._forgiven = -self._gain - FREE_REGRET / 2
            return 0.0
        if self._gain + self._forgiven < -FREE_REGRET - MOST_REGRET * self._blocks_asked:
            self._barred_until = self._asks + self._bar_requests
            self._bar_requests *= 2
            return 0.0
        most = 1.0 if self._gain > PROVEN_GAIN * self._blocks_asked else CLEARLY_LESS
        return most * self._confidence()

    def _confidence(self) -> float:
        """From 0, while nothing was seen for longer than LRU would have held it, to 1."""
        turnovers = max((self.now - self._born) / max(self._lru.age(self.now), 1) - 1, 0)
        of_turnovers = turnovers / (turnovers + DOUBTFUL_TURNOVERS)
        return of_turnovers * self._requests / (self._requests + DOUBTFUL_REQUESTS)

    def _fade(self) -> None:
        self._since += (self.now - self._since) // 2
        self._requests /= 2
        self._blocks_asked /= 2
        self._gain /= 2
        self._forgiven /= 2
        for trait in _TRAITS:
            self._begun[trait] /= 2
            self._returns[trait] = [blocks / 2 for blocks in self._returns[trait]]

    def _learn(self, trait: int) -> None:
        uses = trait % _WIDTH
        alike = [depth * _WIDTH + uses for depth in range(DEPTHS)]
        begun = sum(self._begun[other] for other in alike)
        prior = self._hazards(_summed(self._returns[other] for other in alike), begun, self._overall)
        densities = best_density(self._hazards(self._returns[trait], self._begun[trait], prior))
        self._next_worth[trait] = _to_any_age(densities)

    def _hazards(self, returns: Sequence[float], begun: float, prior: Sequence[float] | None) -> list[float]:
        """For each bin: the share of the blocks that come to this age which are asked for within the bin.

        As Kaplan and Meier estimate it: those that began too late to have come to this age do not count. What few
        blocks tell is mixed with `prior`.
        """
        weight = 0.0 if prior is None else PRIOR_REQUESTS * sum(self._begun.values()) / self._requests
        elapsed = max(self.now - self._since, 1)
        surviving, hazards = 1.0, []
        for at in range(BINS):
            came = max(begun * surviving * (1 - _START[at] / elapsed), 0.0)
            here = returns[at]
            expected = weight * prior[at] if prior is not None else 0.0
            base = max(came + weight, here + expected, 1.0)
            hazards.append(min((here + expected) / base, MOST_HAZARD))
            surviving *= 1 - min(here / max(came, here, 1.0), MOST_HAZARD)
        return hazards


def best_density(hazards: Sequence[float]) -> list[float]:
    """For each bin: the most hits for each unit of time, over all times until which a block of this age may be kept.

    This is Gittins' index. From the last bin backwards, a stretch is joined to the next as long as that is denser.
    """
    stretches: list[tuple[float, float, float]] = []
    densities = [0.0] * len(hazards)
    for at in range(len(hazards) - 1, -1, -1):
        hazard = hazards[at]
        hits, time, surviving = hazard, (_LENGTH[at] or 1.0) * (1 - hazard / 2), 1 - hazard
        while stretches and stretches[-1][0] * time >= hits * stretches[-1][1]:
            more_hits, more_time, still = stretches.pop()
            hits, time, surviving = hits + surviving * more_hits, time + surviving * more_time, surviving * still
        stretches.append((hits, time, surviving))
        densities[at] = hits / time
    return densities


def _to_any_age(densities: Sequence[float]) -> list[float]:
    """By the length in bits of an age's square."""
    return [*densities, *repeat(densities[-1], len(BIN_END) - len(densities))]


def _summed(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]

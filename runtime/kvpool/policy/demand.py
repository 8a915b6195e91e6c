"""Which blocks are asked for again, and when: learned from one model's requests.

A block's *trait* is a byte: how often it was asked for (1 to 5 and more; once, as a prompt's last, is of its own kind,
since that is often where prompts part) and how deep it lies in its prompt (in powers of four). For each trait it is
counted after how long blocks with it were asked for again. What was evicted is remembered for a while, so that its
return counts too, and finds its trait again: else the policy would learn only from what it had kept. Both fade, and
both are bounded.
"""

from collections.abc import Iterable, Iterator, Sequence

KEY_BYTES = 16
MOST_USES = 5
DEPTHS = 6
"""Depths 0 to 2, 3 to 14, 15 to 62, 63 to 254, 255 to 1022, and beyond."""
BINS = 64
"""Two to an octave of age: see `bin_of`."""
PRIOR_REQUESTS = 10
"""What is known of a trait counts as much as what is known of all together once so many requests' blocks had it."""
DOUBTFUL_REQUESTS = 200
"""After so many requests half of the confidence is there."""
MOST_HAZARD = 0.95
REFRESH_USES = 64
"""At least so many uses lie between two looks at what was counted, and a twentieth of all that are counted."""
HALF_LIFE_USES = 1 << 16
"""After so many uses all counts are halved."""
LEAST_REMEMBERED = 1_024
MOST_REMEMBERED = 1 << 16
REMEMBERED_PER_HELD = 4
_PENDING = 64
_WIDTH = 8
"""Values of a byte for each depth; of which 1 to `_LAST` are in use."""
_LAST = MOST_USES + 1
"""Asked for once, as the last of its prompt."""
_SHIFT = 8


def bin_of(age: int) -> int:
    """The bin of an age: bin b holds ages from 2^((b-1)/2) to below 2^(b/2); bin 0 what was used just now."""
    return min((age * age).bit_length(), BINS - 1) if age > 0 else 0


def _starts() -> Iterator[float]:
    yield 0.0
    for at in range(BINS):
        yield 2.0 ** (at / 2)


_START = tuple(_starts())
_LENGTH = tuple(_START[at + 1] - _START[at] for at in range(BINS))


def _fresh_traits() -> bytes:
    depths = (4**depth - 1 for depth in range(1, DEPTHS))  # where the next of the depths begins
    ends = [*depths, 2 * 4**DEPTHS]
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
        self._since = 0
        self._pending: list[tuple[bytes, int]] = []
        self._returns = {trait: [0.0] * BINS for trait in _TRAITS}
        """Blocks with this trait that were asked for again, by age."""
        self._begun = dict.fromkeys(_TRAITS, 0.0)
        """Blocks that have got this trait."""
        self._requests = 1.0
        self._young: dict[bytes, int] = {}
        """Evicted blocks: the clock when they were used last, and their trait, in one number."""
        self._old: dict[bytes, int] = {}
        self._worth = {trait: [1 / (1 + _START[at]) for at in range(BINS)] for trait in _TRAITS}
        """Before anything is known the least recently used is worth least."""
        self._refreshed = 0
        self._stale: list[int] = []
        self._overall: list[float] = [0.0] * BINS

    @property
    def remembered(self) -> int:
        """How many evicted blocks are remembered; never more than `2 * MOST_REMEMBERED`."""
        return len(self._young) + len(self._old)

    @property
    def confidence(self) -> float:
        """From 0, nothing was seen yet, to 1."""
        return self._requests / (self._requests + DOUBTFUL_REQUESTS)

    # -- what happens --------------------------------------------------------------------------------------------------

    def used(self, traits: bytes, last_use: int) -> None:
        """Blocks with these traits, used at `last_use` before, are asked for now."""
        if last_use:
            self._pending.append((traits, self.now - last_use))

    def asked(self) -> None:
        """A request's known blocks have been told."""
        self._requests += 1
        if len(self._pending) > _PENDING:
            self._digest()

    def entered(self, keys: bytes, depth: int, now: int) -> bytes:
        """Blocks that were nowhere are stored, the first at `depth`: return their traits."""
        self.now = now
        blocks = len(keys) // KEY_BYTES
        traits = _FRESH[depth : depth + blocks]
        if len(traits) < blocks:
            traits += _DEEPEST * (blocks - len(traits))
        if self._young or self._old:
            traits = bytes(self._returned(keys, traits))
        if traits[-1] % _WIDTH == 1:
            traits = traits[:-1] + bytes([traits[-1] - 1 + _LAST])
        for trait in set(traits):
            self._begun[trait] += traits.count(trait)
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

    def lost(self, keys: Iterable[bytes], traits: bytes, last_uses: Iterable[int], held: int) -> None:
        """Blocks leave for good, and `held` of the model are left."""
        most = min(max(REMEMBERED_PER_HELD * held // 2, LEAST_REMEMBERED), MOST_REMEMBERED)
        for key, trait, last_use in zip(keys, traits, last_uses, strict=True):
            if len(self._young) >= most:
                self._old, self._young = self._young, {}
            self._young[key] = last_use << _SHIFT | trait

    def _returned(self, keys: bytes, traits: bytes) -> Iterator[int]:
        """The traits, with those of remembered blocks one use on."""
        young, old, step = self._young, self._old, self.step
        for at, trait in zip(range(0, len(keys), KEY_BYTES), traits, strict=True):
            key = keys[at : at + KEY_BYTES]
            known = young.pop(key, 0) or old.pop(key, 0)
            if known:
                before, last_use = known & 0xFF, known >> _SHIFT
                self._returns[before][bin_of(self.now - last_use)] += 1
                trait = step[before]
            yield trait

    def _digest(self) -> None:
        step = self.step
        for traits, age in self._pending:
            at = bin_of(age)
            for trait in set(traits):
                blocks = traits.count(trait)
                self._returns[trait][at] += blocks
                self._begun[step[trait]] += blocks
        self._pending.clear()

    # -- what follows from it ------------------------------------------------------------------------------------------

    def worth(self, trait: int, last_use: int) -> float:
        """Hits that a block promises for each unit of time for which it is kept, if that is ended when it is best."""
        return self._worth[trait][bin_of(self.now - last_use)]

    def refresh(self) -> None:
        """Bring `worth` up to date, a trait a call: some 50 us, so that nobody waits long."""
        if self._stale:
            self._learn(self._stale.pop())
        elif self.now - self._refreshed >= max(REFRESH_USES, (self.now - self._since) // 20):
            self._digest()
            if self.now - self._since > HALF_LIFE_USES:
                self._fade()
            self._refreshed = self.now
            self._overall = self._hazards(_summed(self._returns.values()), sum(self._begun.values()), None)
            self._stale = list(_TRAITS)

    def _fade(self) -> None:
        self._since += (self.now - self._since) // 2
        self._requests /= 2
        for trait in _TRAITS:
            self._begun[trait] /= 2
            self._returns[trait] = [blocks / 2 for blocks in self._returns[trait]]

    def _learn(self, trait: int) -> None:
        uses = trait % _WIDTH
        alike = [depth * _WIDTH + uses for depth in range(DEPTHS)]
        begun = sum(self._begun[other] for other in alike)
        prior = self._hazards(_summed(self._returns[other] for other in alike), begun, self._overall)
        self._worth[trait] = best_density(self._hazards(self._returns[trait], self._begun[trait], prior))

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


def _summed(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]

"""How much a use should count beside how long ago it was: learned from one model's requests.

LRU goes by the time of the last use alone. Where prompts are of several kinds, a block that was used more often
deserves a later date: a *head start*, which grows with the uses (`HEAD_STARTS`) times one number, the *stretch*, in
ticks of the clock. Stretch 0 is LRU; a long one comes to LFU. Which is best depends on the requests and on how much is
held, so it is measured: a tier of n blocks under any stretch holds about those n that have the latest dates, whatever
really is held (the stack property). From how many blocks of each number of uses were used last at which time follows,
for each stretch, up from which date a block would be held; and each use of a block then tells which stretches would
have hit. The best of late is taken; LRU is among them.

What was evicted is remembered for a while, so that its return counts too, and finds its uses again.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpool.policy.remembered import Remembered

KEY_BYTES = 16
MOST_USES = 16
LAST = MOST_USES + 1
"""The trait of a prompt's last block that was asked for once: prompts part there, so that it is worth less. Other
traits are the number of uses."""
_CLASS_OF = bytes([0, 0, 1, 2, *[3] * 2, *[4] * 2, *[5] * 4, *[6] * 4, 7, 8]).ljust(256, b"\0")
"""For `bytes.translate`: traits to classes, of which each has one head start."""
HEAD_STARTS = np.array([*np.sqrt(np.array([1, 2, 3, 4, 6, 8, 12, 16]) - 1), -1.0])
"""By class, in stretches: the root of how often a block was used again; what was a prompt's last block has one less."""
CLASSES = len(HEAD_STARTS)
STRETCHES = np.array([0.0, *(2.0**power for power in range(2, 21))])
"""In ticks of the clock, of which each match is one."""
TIMES = 2_048
"""So many spans of time are told apart, the first for all that was before."""
SPANS_HELD = 64
"""How finely what LRU would hold is divided, at least; then all spans together are 32 times as long."""
NEAR = 16
"""So many spans on either side of where it was the date is looked for first."""
DIGESTED_BLOCKS = 96
"""After so many blocks it is computed anew what each stretch would hold, or after ..."""
DIGESTED_SHARE = 1 / 32
"""... this share of what is held, whichever is more."""
HALF_LIFE_BLOCKS = 2_048
HALF_LIFE_TURNOVERS = 8
"""After so many blocks asked for, or so many times what is held, all hits are halved."""
LEAVE_LRU = (0.0005, 4.0)
CHANGE = (0.0003, 4.0)
"""What another stretch must have hit in addition, as a share of the blocks asked for and in blocks, to be taken. LRU is
gone back to as soon as it would have hit more."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Use = tuple[int, int, int, int, int]
"""Class and time of the use before (0: none), class and time now, and how many blocks."""


def class_of(trait: int) -> int:
    """The class of a trait."""
    return _CLASS_OF[trait]


class Demand:
    """What is known of one model's demand. Guarded by the index's lock; deterministic.

    Times are those of a clock that advances with each use of the index. `copies` are how many blocks each tier holds:
    kept by the index, and looked at here, for what is best for one tier need not be for another.
    """

    step = bytes([*range(1, MOST_USES + 1), MOST_USES, 2]).ljust(256, bytes([MOST_USES]))
    """For `bytes.translate`: the traits of blocks after one more use."""

    def __init__(self, copies: Sequence[int]) -> None:
        self.now = 0
        self.stretches = [0.0 for _ in copies]
        """For each tier, the one by which its blocks are ordered."""
        self.head_starts: list[list[int]] = [[0] * CLASSES for _ in copies]
        """For each tier and class, in ticks."""
        self._copies = copies
        self._held_at = list(copies)
        """The same when the last request came: before room was made for what it stored."""
        self._due = False
        """Whether what has happened is to be digested."""
        self._uses: list[_Use] = []
        self._undigested = 0
        self._digested = 0
        """When it was digested last."""
        self._asked = 0.0
        self._hits: _Floats = np.zeros((len(copies), len(STRETCHES)))
        """By tier and stretch, as an exact cache would have had them."""
        self._held_from: _Floats = np.full((len(copies), len(STRETCHES)), -np.inf)
        """The date from which on a block would be held."""
        self._blocks: _Ints = np.zeros((CLASSES, TIMES), dtype=np.int64)
        """How many blocks of each class were used last in each span. One can lack a few that another has too many:
        leases that overlap date blocks again unseen."""
        self._since = 0
        """When the first span begins."""
        self._span = 1
        """Ticks."""
        self._held = 0
        self._remembered = Remembered()

    @property
    def remembered(self) -> int:
        """How many evicted blocks are remembered; never more than `2 * MOST_REMEMBERED`."""
        return len(self._remembered)

    def would_hit(self, level: int) -> list[float]:
        """By stretch, the share of the blocks asked for that a tier as large would have hit, of late; LRU's first."""
        self._digest()
        return [float(hits) for hits in self._hits[level] / max(self._asked, 1.0)]

    # -- what happens --------------------------------------------------------------------------------------------------

    def used(self, traits: bytes, last_use: int) -> None:
        """Blocks with these traits, used at `last_use` before, are asked for now."""
        self._note(traits, last_use, self.now)

    def asked(self) -> None:
        """A request's known blocks have been told."""
        self._held_at = list(self._copies)
        self._due = self._undigested >= max(DIGESTED_BLOCKS, self._held * DIGESTED_SHARE)

    def entered(self, keys: bytes, depth: int, now: int) -> bytes:
        """Blocks that were nowhere are stored, the first at `depth`: return their traits."""
        if self._due:
            self._digest()
        self.now = now
        blocks = len(keys) // KEY_BYTES
        dated = now + 1  # when the lease is lengthened over them
        returned = self._returned(keys, dated) if self._remembered else b""
        fresh = blocks - len(returned)
        self._held += blocks
        if fresh:
            returned += bytes([1]) * (fresh - 1) + bytes([LAST])
            self._note_new(_CLASS_OF[1], fresh - 1, dated)
            self._note_new(_CLASS_OF[LAST], 1, dated)
        return returned

    def extended(self, traits: bytes) -> bytes:
        """The last block with these traits, which might have been a prompt's last, was not."""
        if traits[-1] != LAST:
            return traits
        return traits[:-1] + bytes([1])

    def lost(self, keys: Sequence[bytes], trait: int, last_use: int) -> None:
        """Blocks of one trait, used at one time, leave for good."""
        self._held = max(self._held - len(keys), 0)
        self._remembered.add(keys, trait, last_use, self._held)

    def erased(self, blocks: int, trait: int, last_use: int) -> None:
        """Blocks used at one time leave because they must, and are not remembered."""
        self._held = max(self._held - blocks, 0)
        self._digest()
        self._count(_CLASS_OF[trait], last_use, -blocks)

    def adopted(self, blocks: int) -> None:
        """So many blocks came from another account, of which nothing is known here; or went there, if negative."""
        self._held = max(self._held + blocks, 0)
        if blocks > 0:
            self._note_new(_CLASS_OF[1], blocks, self.now)

    def _returned(self, keys: bytes, dated: int) -> bytes:
        """The traits, one use on, of as many of the first blocks as are remembered.

        A block is forgotten no later than those above it, so that none after the first unknown one is remembered.
        """
        traits = bytearray()
        for at in range(0, len(keys), KEY_BYTES):
            known = self._remembered.pop(keys[at : at + KEY_BYTES])
            if known is None:
                break
            trait, last_use = known
            self._note(bytes([trait]), last_use, dated)
            traits.append(self.step[trait])
        return bytes(traits)

    def _note(self, traits: bytes, last_use: int, now: int) -> None:
        blocks = len(traits)
        self._undigested += blocks
        step = self.step
        if traits.count(traits[0]) == blocks:
            trait = traits[0]
            self._uses.append((_CLASS_OF[trait], last_use, _CLASS_OF[step[trait]], now, blocks))
        else:
            for trait in set(traits):
                self._uses.append((_CLASS_OF[trait], last_use, _CLASS_OF[step[trait]], now, traits.count(trait)))

    def _note_new(self, in_class: int, blocks: int, now: int) -> None:
        self._undigested += blocks
        self._uses.append((in_class, 0, in_class, now, blocks))

    # -- what follows from it ------------------------------------------------------------------------------------------

    def _digest(self) -> None:
        """Count what each stretch would have hit, then what it would hold now, and choose: some 200 us."""
        self._due = False
        if not self._uses:
            return
        self._make_room(self._uses[-1][3])
        before, last_use, after, now, blocks = np.array(self._uses, dtype=np.int64).T
        levels = [level for level, copies in enumerate(self._held_at) if copies]
        known = np.flatnonzero(last_use)
        np.add.at(self._blocks, (after, self._at(now)), blocks)
        np.subtract.at(self._blocks, (before[known], self._at(last_use[known])), blocks[known])
        self._uses.clear()
        held_from = self._held_from[levels]
        self._look_what_is_held(levels)
        self._asked += self._undigested
        dates = last_use[:, None] + HEAD_STARTS[before][:, None] * STRETCHES
        since = ((now - self._digested) / max(self.now - self._digested, 1))[:, None]
        for level, then in zip(levels, held_from, strict=True):
            # what was asked for meanwhile met what was held then, or now, or in between
            moved = np.where(np.isfinite(then), self._held_from[level] - np.nan_to_num(then, neginf=0.0), 0.0)
            self._hits[level] += np.where(last_use, blocks, 0) @ (dates > then + since * moved)
        self._digested = self.now
        self._undigested = 0
        if self._asked > max(HALF_LIFE_BLOCKS, HALF_LIFE_TURNOVERS * self._held):
            self._asked /= 2
            self._hits /= 2
        for level in levels:
            self._choose(level, self._hits[level])

    def _choose(self, level: int, hits: _Floats) -> None:
        current = int(np.flatnonzero(self.stretches[level] == STRETCHES)[0])
        best = int(np.argmax(hits))
        share, least = CHANGE if current else LEAVE_LRU
        if hits[best] <= hits[current] + share * self._asked + least:
            if not current or hits[0] <= hits[current]:
                return
            best = 0
        self.stretches[level] = float(STRETCHES[best])
        self.head_starts[level] = [round(head_start) for head_start in HEAD_STARTS * STRETCHES[best]]

    def _look_what_is_held(self, levels: Sequence[int]) -> None:
        """For each of these tiers and every stretch, find the date from which on it would hold its blocks."""
        later = np.zeros((CLASSES, TIMES + 1), dtype=np.int64)
        later[:, :TIMES] = self._blocks[:, ::-1].cumsum(axis=1)[:, ::-1]
        shifts = np.rint(np.outer(STRETCHES, HEAD_STARTS) / self._span).astype(np.int64)
        rows = np.arange(CLASSES) * (TIMES + 1)

        def held_from_span(at: _Ints) -> _Ints:
            spans = at[..., None] - shifts
            held: _Ints = later.reshape(-1)[np.minimum(np.maximum(spans, 0), TIMES) + rows].sum(axis=-1)
            return held

        copies = np.array([self._held_at[level] for level in levels])[:, None]
        full = later[:, 0].sum() > copies
        last = TIMES + shifts.max(axis=1)
        before = np.nan_to_num(self._held_from[levels], neginf=0.0)
        near = ((before - self._since) // self._span).astype(np.int64)
        low, high = np.clip(near - NEAR, 0, last), np.clip(near + NEAR, 1, last)
        low = np.where(held_from_span(low) >= copies, low, 0)
        high = np.where(held_from_span(high) < copies, high, last)
        while (high - low > 1).any():
            middle = (low + high) // 2
            enough = held_from_span(middle) >= copies
            low, high = np.where(enough, middle, low), np.where(enough, high, middle)
        beyond = held_from_span(high)
        in_span = np.maximum(held_from_span(low) - beyond, 1)
        dates = self._since + self._span * (high - (copies - beyond) / in_span)
        self._held_from[levels] = np.where(full, dates, -np.inf)

    def _at(self, times: _Ints) -> _Ints:
        at: _Ints = np.clip((times - self._since) // self._span, 0, TIMES - 1)
        return at

    def _count(self, in_class: int, time: int, blocks: int) -> None:
        self._blocks[in_class, min(max((time - self._since) // self._span, 0), TIMES - 1)] += blocks

    def _make_room(self, now: int) -> None:
        """Have `now` lie in one of the spans: by longer ones, or by letting the first go into one."""
        blocks = self._blocks
        while (now - self._since) // self._span >= TIMES:
            oldest = self._held_from[:, 0].min()
            of_lru = now - (oldest if np.isfinite(oldest) else 0)
            if self._span * SPANS_HELD < of_lru:
                blocks[:, : TIMES // 2] = blocks[:, ::2] + blocks[:, 1::2]
                blocks[:, TIMES // 2 :] = 0
                self._span *= 2
            else:
                gone = TIMES // 4
                blocks[:, 0] = blocks[:, : gone + 1].sum(axis=1)
                blocks[:, 1 : TIMES - gone] = blocks[:, gone + 1 :].copy()
                blocks[:, TIMES - gone :] = 0
                self._since += gone * self._span

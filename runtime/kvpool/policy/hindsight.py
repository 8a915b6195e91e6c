"""What a tier would have hit had uses counted more or less beside time, computed from what was asked for.

A block's *date* is the time of its last use and a *head start*, which grows with the uses (`HEAD_STARTS`) times one
number, the *stretch*, in ticks of the clock. Stretch 0 is LRU; a long one comes to LFU. A tier of n blocks that keeps
those with the latest dates holds about the n latest, whatever really is held (the stack property). From how many blocks
of each number of uses were used last at which time follows, for each stretch, up from which date a block would be held;
and each use of a block then tells which stretches would have hit.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpool.policy.traits import CLASS_OF, CLASSES, STEP

HEAD_STARTS = np.array([*np.sqrt(np.array([1, 2, 3, 4, 6, 8, 12, 16]) - 1), -1.0])
"""By class, in stretches: the root of how often a block was used again; what was a prompt's last block has one less."""
STRETCHES = np.array([0.0, *(2.0**power for power in range(2, 21))])
"""In ticks of the clock, of which each match is one."""
TIMES = 2_048
"""So many spans of time are told apart, the first for all that was before."""
SPANS_HELD = 64
"""How finely what LRU would hold is divided, at least; then all spans together are 32 times as long."""
NEAR = 16
"""So many spans on either side of where it was the date is looked for first."""
HALF_LIFE_BLOCKS = 2_048
HALF_LIFE_TURNOVERS = 8
"""After so many blocks asked for, or so many times what is held, all hits are halved."""
LEAVE_LRU = (0.0005, 4.0)
CHANGE = (0.0003, 4.0)
"""What another stretch must have hit in addition, as a share of the blocks asked for and in blocks, to be taken. LRU is
gone back to as soon as it would have hit more."""

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

Event = tuple[bytes, int, int]
"""Blocks with these traits; when they were used last, 0 for those that are new; and when they are used now, 0 for those
that were erased. New ones have the traits that they are given, others those that they had."""


class Hindsight:
    """Of one model. Each tier has the stretch that would have hit most of late; none is changed for next to nothing."""

    def __init__(self, levels: int) -> None:
        self._stretches = [0] * levels
        """For each tier, which of `STRETCHES`."""
        self.head_starts: list[list[int]] = [[0] * CLASSES for _ in range(levels)]
        """For each tier and class, in ticks. A tier's list is replaced as a whole."""
        self.asked = 0.0
        """Blocks, of late."""
        self._hits: _Floats = np.zeros((levels, len(STRETCHES)))
        """By tier and stretch."""
        self._held_from: _Floats = np.full((levels, len(STRETCHES)), -np.inf)
        """The date from which on a block would be held."""
        self._blocks: _Ints = np.zeros((CLASSES, TIMES), dtype=np.int64)
        """How many blocks of each class were used last in each span. One can lack a few that another has too many:
        leases that overlap date blocks again unseen."""
        self._since = 0
        """When the first span begins."""
        self._span = 1
        """Ticks."""
        self._digested = 0
        """When something was digested last."""

    def would_hit(self, level: int) -> list[float]:
        """By stretch, the share of the blocks asked for that a tier as large would have hit, of late; LRU's first."""
        return [float(hits) for hits in self._hits[level] / max(self.asked, 1.0)]

    def digest(self, events: Sequence[Event], now: int, copies: Sequence[int], held: int) -> None:
        """Count what each stretch would have hit, then what it would hold now, and choose: some 150 us.

        `copies` are how many blocks lie in each tier at `now`, `held` how many in all of them.
        """
        before, last_use, after, used, blocks = _by_class(events)
        known, there = np.flatnonzero(last_use), np.flatnonzero(used)
        self._make_room(now)
        np.add.at(self._blocks, (after[there], self._at(used[there])), blocks[there])
        np.subtract.at(self._blocks, (before[known], self._at(last_use[known])), blocks[known])
        levels = [level for level, holds in enumerate(copies) if holds]
        held_from = self._held_from[levels]
        self._look_what_is_held(levels, copies)
        again = np.flatnonzero(last_use * used)
        dates = last_use[again, None] + HEAD_STARTS[before[again], None] * STRETCHES
        since = ((used[again] - self._digested) / max(now - self._digested, 1))[:, None]
        for level, then in zip(levels, held_from, strict=True):
            # what was asked for meanwhile met what was held then, or now, or in between
            moved = np.where(np.isfinite(then), self._held_from[level] - np.nan_to_num(then, neginf=0.0), 0.0)
            self._hits[level] += blocks[again] @ (dates > then + since * moved)
        self._digested = now
        self.asked += float(blocks[there].sum())
        if self.asked > max(HALF_LIFE_BLOCKS, HALF_LIFE_TURNOVERS * held):
            self.asked /= 2
            self._hits /= 2
        for level in levels:
            self._choose(level, self._hits[level])

    def _choose(self, level: int, hits: _Floats) -> None:
        current, better = self._stretches[level], int(np.argmax(hits))
        share, least = CHANGE if current else LEAVE_LRU
        if hits[better] <= hits[current] + share * self.asked + least:
            if hits[0] <= hits[current]:
                return
            better = 0
        self._stretches[level] = better
        self.head_starts[level] = [round(head_start) for head_start in HEAD_STARTS * STRETCHES[better]]

    def _look_what_is_held(self, levels: Sequence[int], copies: Sequence[int]) -> None:
        """For each of these tiers and every stretch, find the date from which on it would hold its blocks."""
        later = np.zeros((CLASSES, TIMES + 1), dtype=np.int64)
        later[:, :TIMES] = self._blocks[:, ::-1].cumsum(axis=1)[:, ::-1]
        shifts = np.rint(np.outer(STRETCHES, HEAD_STARTS) / self._span).astype(np.int64)
        rows = np.arange(CLASSES) * (TIMES + 1)

        def held_from_span(at: _Ints) -> _Ints:
            spans = at[..., None] - shifts
            held: _Ints = later.reshape(-1)[np.minimum(np.maximum(spans, 0), TIMES) + rows].sum(axis=-1)
            return held

        wanted = np.array([copies[level] for level in levels])[:, None]
        full = later[:, 0].sum() > wanted
        last = TIMES + shifts.max(axis=1)
        before = np.nan_to_num(self._held_from[levels], neginf=0.0)
        near = ((before - self._since) // self._span).astype(np.int64)
        low, high = np.clip(near - NEAR, 0, last), np.clip(near + NEAR, 1, last)
        low = np.where(held_from_span(low) >= wanted, low, 0)
        high = np.where(held_from_span(high) < wanted, high, last)
        while (high - low > 1).any():
            middle = (low + high) // 2
            enough = held_from_span(middle) >= wanted
            low, high = np.where(enough, middle, low), np.where(enough, high, middle)
        beyond = held_from_span(high)
        in_span = np.maximum(held_from_span(low) - beyond, 1)
        dates = self._since + self._span * (high - (wanted - beyond) / in_span)
        self._held_from[levels] = np.where(full, dates, -np.inf)

    def _at(self, times: _Ints) -> _Ints:
        at: _Ints = np.clip((times - self._since) // self._span, 0, TIMES - 1)
        return at

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


def _by_class(events: Sequence[Event]) -> _Ints:
    """Rows: the class before; when used last; the class now; when used now; and how many blocks."""
    rows: list[tuple[int, int, int, int, int]] = []
    for traits, last_use, used in events:
        uniform = traits.count(traits[0]) == len(traits)
        for trait in traits[:1] if uniform else sorted(set(traits)):
            after = STEP[trait] if last_use and used else trait
            rows.append((CLASS_OF[trait], last_use, CLASS_OF[after], used, traits.count(trait)))
    return np.array(rows, dtype=np.int64).reshape(-1, 5).T

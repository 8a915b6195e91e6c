"""What is out: a set of degradations, what it is called, and how it came to be. Pure; the time is a parameter.

Every set of the five is a state, and every event leads from one to one that differs in one degradation at most:

    event           leads to
    out(part)       the state with it; its reason is the latest one
    back(part)      the state without it

A state says nothing of how it was reached: the same parts out is the same state, the same mode.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple


class Degradation(StrEnum):
    """A tier, or part of one, that is out."""

    NO_GPU = "no-gpu"
    NO_DRAGONFLY = "no-dragonfly"
    NO_POSTGRES = "no-postgres"
    NO_QDRANT = "no-qdrant"
    NO_SSD = "no-ssd"


NORMAL, MEMORY_ONLY = "normal", "memory-only"
REMEMBERED_CHANGES = 256
_ALL_BELOW_MEMORY = {Degradation.NO_DRAGONFLY, Degradation.NO_POSTGRES, Degradation.NO_SSD}


def mode(degradations: Iterable[Degradation]) -> str:
    """The mode that these degradations make: `normal`, `memory-only`, or their names in order, joined by `+`."""
    names = set(degradations)
    if names >= _ALL_BELOW_MEMORY:
        return MEMORY_ONLY
    return "+".join(sorted(names)) or NORMAL


class Change(NamedTuple):
    """One change of state."""

    at_s: float
    part: Degradation
    is_out: bool
    reason: str


class Degradations:
    """The state machine. Not safe for several threads: one chore feeds it, others read `state`."""

    def __init__(self) -> None:
        self.state: Mapping[Degradation, Change] = {}
        """What is out, and since when. Replaced as a whole with each change."""
        self.changes: deque[Change] = deque(maxlen=REMEMBERED_CHANGES)
        """The last changes, oldest first."""

    @property
    def mode(self) -> str:
        """The mode as of now."""
        return mode(self.state)

    def out(self, part: Degradation, reason: str, at_s: float) -> bool:
        """A part cannot be used; whether that is new."""
        known = self.state.get(part)
        change = Change(at_s if known is None else known.at_s, part, True, reason)
        self.state = {**self.state, part: change}
        if known is None:
            self.changes.append(change)
        return known is None

    def back(self, part: Degradation, at_s: float) -> bool:
        """A part can be used; whether that is new."""
        if part not in self.state:
            return False
        self.state = {other: change for other, change in self.state.items() if other is not part}
        self.changes.append(Change(at_s, part, False, ""))
        return True

    def observe(self, out: Mapping[Degradation, str], at_s: float) -> list[Change]:
        """Take over which parts are out now, each with its reason; the changes that makes, in the parts' order."""
        found = []
        for part in Degradation:
            changed = self.out(part, out[part], at_s) if part in out else self.back(part, at_s)
            if changed:
                found.append(self.changes[-1])
        return found

"""What of that which the configuration asks for is out now, and how it came to be."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from kvpool.pool.engine import Engine
from kvpool.resilience import Change, Degradation, Degradations
from kvpool.tiers.tier import TierName

_OF_TIER = {TierName.DRAGONFLY: Degradation.NO_DRAGONFLY, TierName.DATABASE: Degradation.NO_POSTGRES}
_log = logging.getLogger(__name__)


def outages(engine: Engine) -> dict[Degradation, str]:
    """What is out, and why. Asks nobody: it is what the last calls have shown."""
    found: dict[Degradation, str] = {}
    if engine.gpu is not None and engine.gpu.store.tier is None:
        found[Degradation.NO_GPU] = engine.gpu.store.last_error
    if engine.remote is not None:
        found |= {_OF_TIER[store.name]: store.last_error for store in engine.remote.stores if store.degraded}
    if engine.prompts is not None and not engine.prompts.usable:
        found[Degradation.NO_QDRANT] = engine.prompts.last_error
    if engine.store.degraded:
        found[Degradation.NO_SSD] = engine.store.last_error
    return found


class OutageWatch:
    """Notices each change of the mode, and logs it. Safe from any thread."""

    def __init__(self, engine: Engine, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._wall_clock = wall_clock
        self._degradations = Degradations()
        self._lock = threading.Lock()

    def look(self) -> Mapping[Degradation, Change]:
        """What is out, and since when, in seconds since the epoch."""
        with self._lock:
            changes = self._degradations.observe(outages(self._engine), self._wall_clock())
            state, mode = self._degradations.state, self._degradations.mode
        for change in changes:
            what = f"is out: {change.reason}" if change.is_out else "is back"
            _log.info("mode %s: %s %s", mode, change.part.removeprefix("no-"), what)
        return state

    def note(self) -> None:
        """`look`, as a chore."""
        self.look()

    def changes(self) -> tuple[Change, ...]:
        """The last changes that `look` has noticed, oldest first."""
        with self._lock:
            return tuple(self._degradations.changes)

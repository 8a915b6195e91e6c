"""Circuit breakers: what keeps a tier that fails from holding anybody up. Pure but for the clock it is given."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kvpool.resilience.retry import FullJitter


class BreakerState(StrEnum):
    """Closed: calls go through. Open: none does. Half-open: one does, and decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """When a breaker opens, and for how long.

    It opens after `failures` failures in a row, or when of the last `window_calls` calls, all within `window_s`, at
    least `bad_ratio` failed or took longer than `slow_s`. It stays open for a random time below a ceiling that starts
    at `first_backoff_s` and doubles up to `last_backoff_s` (full jitter: many processes do not come back all at once).
    """

    failures: int = 5
    window_calls: int = 32
    window_s: float = 30.0
    bad_ratio: float = 0.5
    slow_s: float = float("inf")
    first_backoff_s: float = 1.0
    last_backoff_s: float = 60.0


class CircuitBreaker:
    """Stands before a tier. Ask `allows` before each call, and report how each call went. Safe from any thread.

    Reports of calls that began before it opened change nothing while it is open. A probe that is never reported is
    given up after `last_backoff_s`.
    """

    def __init__(
        self,
        limits: BreakerLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._limits = limits or BreakerLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._in_a_row = 0
        self._window: deque[tuple[float, bool]] = deque(maxlen=self._limits.window_calls)
        self._pauses = FullJitter(self._limits.first_backoff_s, self._limits.last_backoff_s, rng=rng)
        self._next_probe = 0.0
        self._last_error: str | None = None
        self._opened_total = 0

    @property
    def state(self) -> BreakerState:
        """Its state; open turns into half-open when `allows` lets a probe through."""
        return self._state

    @property
    def last_error(self) -> str | None:
        """What the last bad call reported, also after the breaker closed again."""
        return self._last_error

    @property
    def opened_total(self) -> int:
        """How often it went from closed to open."""
        return self._opened_total

    def allows(self) -> bool:
        """Whether to make a call now. When it says so while open, that call is the probe, and must be reported."""
        if self._state is BreakerState.CLOSED:
            return True
        with self._lock:
            if self.state is BreakerState.CLOSED:
                return True
            now = self._clock()
            if now < self._next_probe:
                return False
            self._state = BreakerState.HALF_OPEN
            self._next_probe = now + self._limits.last_backoff_s
            return True

    def succeeded(self, seconds: float = 0.0) -> None:
        """A call came back well, after `seconds`. Closes a half-open breaker."""
        with self._lock:
            if self._state is BreakerState.HALF_OPEN:
                self._close()
            elif self._state is BreakerState.CLOSED:
                self._in_a_row = 0
                slow = seconds > self._limits.slow_s
                if slow:
                    self._last_error = f"a call took {seconds:.3g} s"
                if self._too_many_bad(slow):
                    self._open()

    def failed(self, reason: str) -> None:
        """A call failed. Opens a half-open breaker again; opens a closed one when there were too many."""
        with self._lock:
            self._last_error = reason
            if self._state is BreakerState.CLOSED:
                self._in_a_row += 1
                if self._too_many_bad(True) or self._in_a_row >= self._limits.failures:
                    self._open()
            elif self._state is BreakerState.HALF_OPEN:
                self._open()

    def trip(self, reason: str) -> None:
        """A call timed out, or the tier says that it is out as a whole: open at once."""
        with self._lock:
            self._last_error = reason
            if self._state is not BreakerState.OPEN:
                self._open()

    def _too_many_bad(self, this_one: bool) -> bool:
        now = self._clock()
        self._window.append((now, this_one))
        full = len(self._window) == self._limits.window_calls and self._window[0][0] >= now - self._limits.window_s
        if not this_one or not full:
            return False
        return sum(bad for _, bad in self._window) >= self._limits.bad_ratio * self._limits.window_calls

    def _open(self) -> None:
        if self._state is BreakerState.CLOSED:
            self._opened_total += 1
        self._state = BreakerState.OPEN
        self._next_probe = self._clock() + self._pauses.next_s()
        self._window.clear()

    def _close(self) -> None:
        self._state = BreakerState.CLOSED
        self._in_a_row = 0
        self._pauses.reset()
        self._window.clear()

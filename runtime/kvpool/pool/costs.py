"""What reading from a tier costs, as measured, and whether it pays: a tier slower than recomputing is not asked."""

import threading
import time
from collections.abc import Callable

_DECAY_PER_OBSERVATION = 0.95
_HALF_LIFE_S = 10.0
"""Old observations count less with time too, so that one probe of a tier that recovered is soon believed."""
PROBE_INTERVAL_S = 10.0


class TierCosts:
    """Latency and bandwidth of one tier's reads. Safe from any thread.

    The line `seconds = latency + bytes / bandwidth` through all observations, by least squares with exponentially
    decreasing weights. Reads of one size alone cannot tell latency from bandwidth; then all is counted as bandwidth.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._observed_at = self._asked_at = clock()
        self._line: tuple[float, float] | None = None

    @property
    def latency_s(self) -> float | None:
        """Seconds before the first byte; None while nothing was observed."""
        return None if self._line is None else self._line[0]

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        """Bytes per second after that; infinite when size made no difference, None while nothing was observed."""
        if self._line is None:
            return None
        return 1 / self._line[1] if self._line[1] else float("inf")

    def observe(self, nbytes: int, seconds: float) -> None:
        """Count one finished read. Nothing is learnt from reads of no bytes or of no time."""
        if nbytes <= 0 or seconds <= 0:
            return
        with self._lock:
            now = self._clock()
            keep = _DECAY_PER_OBSERVATION * 0.5 ** (max(0.0, now - self._observed_at) / _HALF_LIFE_S)
            self._observed_at = self._asked_at = now
            self._weight = keep * self._weight + 1
            self._x = keep * self._x + nbytes
            self._y = keep * self._y + seconds
            self._xx = keep * self._xx + nbytes * nbytes
            self._xy = keep * self._xy + nbytes * seconds
            self._line = self._fit()

    def expected_seconds(self, nbytes: int) -> float | None:
        """How long a read of `nbytes` takes; None while nothing was observed. Never less for more bytes."""
        line = self._line
        return None if line is None else line[0] + nbytes * line[1]

    def worth_asking(self, nbytes: int, tokens: int, prefill_tokens_per_second: float | None) -> bool:
        """Whether reading `nbytes` is no slower than computing their `tokens`.

        True as well while the tier or the model's prefill rate is not measured, and once every 10 s, as a probe, for a
        tier that has not been read since: so a tier that got faster is found out.
        """
        expected_s = self.expected_seconds(nbytes)
        if expected_s is None or prefill_tokens_per_second is None:
            return True
        with self._lock:
            now = self._clock()
            if expected_s * prefill_tokens_per_second > tokens and now - self._asked_at < PROBE_INTERVAL_S:
                return False
            self._asked_at = now
            return True

    def _fit(self) -> tuple[float, float]:
        """Seconds before the first byte and seconds per byte, neither below zero."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance <= 1e-6 * mean_x * mean_x:  # one size, and rounding
            return 0.0, mean_y / mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        if slope <= 0:
            return mean_y, 0.0
        if slope * mean_x >= mean_y:
            return 0.0, mean_y / mean_x
        return mean_y - slope * mean_x, slope

"""Pauses between tries: random below a ceiling that doubles, so that many processes do not come back all at once.

For calls that may be made twice without harm only. Source:
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import random


class FullJitter:
    """The pauses of one series of tries. Not safe for several threads."""

    def __init__(self, first_s: float, last_s: float, *, rng: random.Random | None = None) -> None:
        self._first_s, self._last_s = first_s, last_s
        self._ceiling_s = first_s
        self._rng = rng or random.Random()  # noqa: S311 - it spreads retries, it guards nothing

    def next_s(self) -> float:
        """How long to wait after a try that failed."""
        pause_s = self._rng.uniform(0.0, self._ceiling_s)
        self._ceiling_s = min(2 * self._ceiling_s, self._last_s)
        return pause_s

    def reset(self) -> None:
        """A try went well."""
        self._ceiling_s = self._first_s

"""How long a call has moved nothing. A budget is time without progress, not time in all."""

import time


class Patience:
    """One call's budget. Not safe for several threads: a call has one."""

    __slots__ = ("_end_s", "budget_s")

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._end_s = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        """Seconds until it is used up, if nothing moves; 0 when it is."""
        left_s = self._end_s - time.monotonic()
        return left_s if left_s > 0.0 else 0.0

    def moved(self) -> None:
        """Bytes went or came: it begins anew."""
        self._end_s = time.monotonic() + self.budget_s

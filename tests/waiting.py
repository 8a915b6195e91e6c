"""Waits for what another thread, process or server has to do."""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE_S = 20.0
PROCESS_S = 60.0
"""For what takes processes to start, or to end."""
_POLL_S = 0.005


def eventually(condition: Callable[[], object], what: str = "it is so", deadline_s: float = DEADLINE_S) -> None:
    """Wait until `condition` holds; fail after `deadline_s`."""
    ends = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends, f"not within {deadline_s} s: {what}"
        time.sleep(_POLL_S)

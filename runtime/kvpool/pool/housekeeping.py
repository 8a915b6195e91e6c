"""Once a second, or when woken: what no caller should wait for, and what time alone brings on.

It takes back what was erased, opens the ssd tier again, probes it when it was out, frees segments and memory that a
lowered capacity no longer allows. A pool has one for memory and one for the disk, so that a disk that hangs holds up
nothing else. Nearly idle when there is nothing to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

PERIOD_S = 1.0
_log = logging.getLogger(__name__)


class Housekeeper:
    """Runs chores one after the other. A chore that fails is logged, and tried again at the next round."""

    def __init__(self, name: str) -> None:
        self._wake = threading.Event()
        self._closed = False
        self._chores: Sequence[Callable[[], None]] = ()
        self._thread = threading.Thread(target=self._run, name=f"kvpool-{name}", daemon=True)

    def start(self, chores: Sequence[Callable[[], None]]) -> None:
        """Begin to run `chores`."""
        self._chores = chores
        self._thread.start()

    def wake(self) -> None:
        """Run the chores now."""
        self._wake.set()

    def close(self, until_s: float) -> bool:
        """End after the chore that runs now; False where it has not ended at `until_s`, on `time.monotonic`."""
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(max(0.0, until_s - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(PERIOD_S)
            self._wake.clear()
            for chore in self._chores:
                if self._closed:
                    return
                try:
                    chore()
                except Exception:  # the loop's top: the other chores must go on
                    _log.exception("housekeeping")

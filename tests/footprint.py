"""What this process holds of the system's: what is not given back grows with every use."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import NamedTuple

from tests.waiting import DEADLINE_S


class Footprint(NamedTuple):
    """At one moment, without what is only garbage."""

    descriptors: int
    threads: int


def footprint() -> Footprint:
    """What is held now. Garbage is collected first: a test before may have left some, which would go in the middle."""
    gc.collect()
    return Footprint(len(os.listdir("/proc/self/fd")), threading.active_count())  # noqa: PTH208 - a number is asked for


def holds_no_more_than(before: Footprint, deadline_s: float = DEADLINE_S) -> None:
    """Fail unless it is soon no more than that."""
    ends = time.monotonic() + deadline_s
    while (now := footprint()).descriptors > before.descriptors or now.threads > before.threads:
        assert time.monotonic() < ends, f"{now} is more than {before}"
        time.sleep(0.01)

"""What the ssd tier counts, and a snapshot of it, collected when it is asked for."""

import threading
from typing import NamedTuple


class SsdStats(NamedTuple):
    """Bytes and calls since the tier was opened, and what it holds now.

    `physical_bytes` are all files; `live_bytes` the records that can be read; `dead_bytes` the records' pages that can
    not: dropped ones and gaps. `dropped` is what recovery dropped. `spent_today_bytes` is the daily budget's count.
    """

    bytes_written: int
    bytes_read: int
    write_calls: int
    read_calls: int
    records_written: int
    records_read: int
    read_failures: int
    write_failures: int
    seal_failures: int
    refused_no_room: int
    refused_budget: int
    live_records: int
    live_bytes: int
    dead_bytes: int
    physical_bytes: int
    dropped: int
    segments: int
    free_segments: int
    spent_today_bytes: int


_COUNTED = SsdStats._fields[: SsdStats._fields.index("live_records")]


class Counts:
    """Adds up the first fields of `SsdStats`. Safe from any thread, and under any other lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(_COUNTED, 0)

    def add(self, **increases: int) -> None:
        """Count each of these up."""
        with self._lock:
            for name, increase in increases.items():
                self._counts[name] += increase

    def snapshot(self) -> dict[str, int]:
        """All of them, by field."""
        with self._lock:
            return dict(self._counts)

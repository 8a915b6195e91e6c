"""What the ssd tier counted; a snapshot, collected when it is asked for."""

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

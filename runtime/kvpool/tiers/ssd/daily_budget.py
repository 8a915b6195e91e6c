"""How many bytes the tier may write per UTC day, so that a disk's write endurance lasts. Restarts and crashes count.

What is on disk is a mark at or above what was spent: before spending passes the mark, a higher one is made durable. So
a crash can only charge too much (at most one step, 1/256 of the budget), and the file is written at most some 256 times
a day. Safe from any thread; `keep_mark` and `close` do I/O, and no other call waits for them.
"""

import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.small_file import read_small_file, replace_small_file

BUDGET_NAME = "BUDGET"
_LINE = re.compile(rb"day=(\d{1,9}) spent=(\d{1,18})\n")
_SECONDS_PER_DAY = 86_400
_STEPS = 256
_UNLIMITED_STEP_BYTES = 1 << 30
_log = logging.getLogger(__name__)


class DailyBudget:
    """Spent and allowed bytes of the current UTC day. `limit_bytes` None: counted, never refused."""

    def __init__(self, disk: Disk, directory: Path, limit_bytes: int | None, clock: Callable[[], float]) -> None:
        self.limit_bytes = limit_bytes
        self._disk = disk
        self._path = directory / BUDGET_NAME
        self._clock = clock
        self._lock = threading.Lock()
        self._file_lock = threading.Lock()
        self._day, self._spent = self._read()
        self._mark_day, self._mark = self._day, self._spent

    @property
    def spent_bytes(self) -> int:
        """Written today."""
        with self._lock:
            self._roll_over()
            return self._spent

    def allows(self, nbytes: int) -> bool:
        """Whether there is room for `nbytes` more today."""
        limit_bytes = self.limit_bytes
        return limit_bytes is None or self.spent_bytes + nbytes <= limit_bytes

    def charge(self, nbytes: int) -> None:
        """Count `nbytes` as spent, whether they were allowed or not."""
        with self._lock:
            self._roll_over()
            self._spent += nbytes

    def keep_mark(self) -> None:
        """Make the mark durable if spending has passed it. Raises `OSError`."""
        if self._wanted_mark() is None:
            return
        with self._file_lock:
            mark = self._wanted_mark()
            if mark is not None:
                self._write(*mark)

    def close(self) -> None:
        """Write what was spent exactly. Raises `OSError`."""
        with self._file_lock:
            with self._lock:
                self._roll_over()
                day, spent = self._day, self._spent
            self._write(day, spent)

    def _wanted_mark(self) -> tuple[int, int] | None:
        """The day and the mark that ought to be on disk; None where what is there will do."""
        with self._lock:
            if self._mark_day == self._day and self._spent <= self._mark:
                return None
            limit_bytes = self.limit_bytes
            step = _UNLIMITED_STEP_BYTES if limit_bytes is None else max(PAGE_BYTES, limit_bytes // _STEPS)
            return self._day, self._spent + step

    def _roll_over(self) -> None:
        today = self._today()
        # A clock that was set back by a few hours must not buy a second budget; one that was years ahead must not last.
        if today != self._day and today != self._day - 1:
            self._day, self._spent = today, 0

    def _today(self) -> int:
        return int(self._clock() // _SECONDS_PER_DAY)

    def _read(self) -> tuple[int, int]:
        text = read_small_file(self._disk, self._path)
        match = _LINE.fullmatch(text) if text else None
        if text and match is None:
            _log.warning("ssd tier: %s is damaged; today's written bytes count from 0", self._path)
        return (int(match[1]), int(match[2])) if match else (self._today(), 0)

    def _write(self, day: int, spent: int) -> None:
        replace_small_file(self._disk, self._path, b"day=%d spent=%d\n" % (day, spent))
        with self._lock:
            self._mark_day, self._mark = day, spent

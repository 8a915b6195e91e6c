"""Reads from SSD into RAM slots, on threads of its own, verified there, and given up without harm when they stall.

Ownership: a job's slots are the job's until it is `done` and was not abandoned; then they are its maker's. A job that
was abandoned frees its slots itself when its read has ended, never before: bytes that arrive late find nobody else
there.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence

from kvpool.blocks.record import Buffer, CorruptRecordError, Head, open_record
from kvpool.pool.encodings import Encodings
from kvpool.pool.memory import Memory
from kvpool.pool.ssd_store import SsdStore, TierOutError
from kvpool.prefix.accounts import Account
from kvpool.tiers.ssd.place import bytes_of, offset_of, segment_of

UNREADABLE = "unreadable"
"""What is said of a record that did not come whole."""
TIER_OUT = "tier-out"
"""What is said of a record where it is the disk that cannot be read."""
_log = logging.getLogger(__name__)


class ReadJob:
    """Some records of one chain, to be read side by side into RAM slots, or other memory."""

    __slots__ = (
        "_abandoned", "_lock", "account", "buffers", "done", "faults", "heads", "nbytes", "places", "progress_s",
        "slots",
    )  # fmt: skip

    def __init__(
        self,
        places: Sequence[int],
        buffers: Sequence[Buffer],
        heads: Sequence[Head],
        *,
        slots: list[int],
        account: Account,
    ) -> None:
        self.places = places
        self.buffers = buffers
        """Where the records go, one each."""
        self.slots = slots
        """The slots of these buffers, where they are some."""
        self.heads = heads
        self.account = account
        """Whom the slots are charged to."""
        self.nbytes = sum(map(bytes_of, places))
        self.faults: list[str | None] = []
        """Once done, per record: None, or why it is not the one that was asked for."""
        self.progress_s = 0.0
        """When its last read began, on the store's clock; 0 while it waits for a thread."""
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._abandoned = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody wants it any more."""
        return self._abandoned

    def abandon(self) -> bool:
        """Want it no more; True when the slots are the caller's to free, for it is done."""
        with self._lock:
            self._abandoned = True
            return self.done.is_set()

    def finish(self, faults: list[str | None]) -> bool:
        """It has ended; True when the slots are to be freed by who ran it, for nobody wants it."""
        with self._lock:
            self.faults = faults
            self.done.set()
            return self._abandoned


class Readers:
    """A few threads that run jobs in the order in which they came."""

    def __init__(self, store: SsdStore, memory: Memory, encodings: Encodings, *, threads: int = 2) -> None:
        self._store = store
        self._memory = memory
        self._encodings = encodings
        self._jobs: queue.SimpleQueue[ReadJob | None] = queue.SimpleQueue()
        self._count_lock = threading.Lock()
        self.pending = 0
        """Jobs that were submitted and have not ended."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kvpool-read-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: ReadJob) -> None:
        """Run a job as soon as a thread is free."""
        with self._count_lock:
            self.pending += 1
        self._jobs.put(job)

    def wait(self, job: ReadJob, budget_s: float) -> bool:
        """Wait for a job; False once it has made no progress for `budget_s`.

        While it waits for a thread, every read of the tier is progress; from then on, its own are.
        """
        began = self._store.clock()
        left_s = budget_s
        while not job.done.wait(left_s):
            progress_s = job.progress_s or self._store.last_progress
            left_s = max(began, progress_s) + budget_s - self._store.clock()
            if left_s <= 0:
                return False
        return True

    def close(self, until_s: float) -> bool:
        """End the threads once the queued jobs have run; False where one is stuck in a read at `until_s`.

        Such a thread is left behind. `until_s` is on `time.monotonic`.
        """
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            job = None  # while it waits for the next one, it holds no view of memory that may be cut anew

    def _do(self, job: ReadJob) -> None:
        faults: list[str | None] = []
        try:
            if not job.abandoned:
                self._read(job, faults)
        except TierOutError:
            pass  # counted, and said, where it was noticed
        except Exception:  # the loop's top: a job that fails must still end, and its slots be freed
            _log.exception("reading %d records from ssd", len(job.places))
        with self._count_lock:
            self.pending -= 1
        if job.finish(faults + [TIER_OUT] * (len(job.places) - len(faults))):
            self._memory.free(job.account, job.slots)

    def _read(self, job: ReadJob, faults: list[str | None]) -> None:
        """Read and verify the records, those that lie side by side at once; what became of them is added to `faults`.

        Raises `TierOutError`: the rest was not read.
        """
        for run in side_by_side(job.places):
            job.progress_s = self._store.clock()
            arrived = self._store.read(job.places[run], job.buffers[run])
            for buffer, head, came in zip(job.buffers[run], job.heads[run], arrived, strict=True):
                faults.append(self._fault(buffer, head) if came else UNREADABLE)

    def _fault(self, buffer: Buffer, head: Head) -> str | None:
        """Why the bytes are not the record's, or not to be served; None when they are."""
        try:
            self._encodings.check(open_record(buffer, head), buffer)
        except CorruptRecordError as error:
            return error.reason.value
        return None


def side_by_side(places: Sequence[int]) -> Iterator[slice]:
    """Cut places on SSD into runs that one call reads."""
    first = 0
    for at in range(1, len(places) + 1):
        if at < len(places):
            before, place = places[at - 1], places[at]
            adjacent = offset_of(before) + bytes_of(before) == offset_of(place)
            if adjacent and segment_of(before) == segment_of(place):
                continue
        yield slice(first, at)
        first = at

"""What was reported and is not written yet, in memory: bounded by bytes, the oldest goes. Safe from any thread."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvpool.blocks.identity import Fingerprint
from kvpool.catalog.rows import (
    Alone,
    BlocksStored,
    ModelForgotten,
    ModelSeen,
    Op,
    PromptAsked,
    SharedReport,
    UsageReport,
    held_bytes,
    row_count,
    split,
)

BATCH_ROWS = 4_096
BATCH_OPS = 4_096
"""About so much is written at once: enough for the database, and little enough to be repeated."""
MAX_MODELS = 1_024


class Backlog:
    """A queue of reports. A batch of it names the models that it is about, so that it can be written by itself."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._ops: deque[Op] = deque()
        self._models: dict[Fingerprint, ModelSeen] = {}
        self._closed = False
        self._hurried = 0
        self.nbytes = 0
        self.rows = 0
        self.dropped_rows = 0

    @property
    def is_filled(self) -> bool:
        """Whether anything waits."""
        return bool(self._ops)

    def offer(self, op: Op) -> None:
        """Put a report at the end; the oldest are dropped, and counted, where there is no room."""
        nbytes, rows = held_bytes(op), row_count(op)
        with self._lock:
            if isinstance(op, ModelSeen):
                self._remember(op)
            was_ready, was_empty = self.rows >= BATCH_ROWS, not self._ops
            self._ops.append(op)
            self.nbytes += nbytes
            self.rows += rows
            while self.nbytes > self._max_bytes:
                self.dropped_rows += row_count(self._pop())
            if was_empty or (self.rows >= BATCH_ROWS and not was_ready):
                self._filled.notify()

    def wait(self, seconds: float, *, linger_s: float) -> None:
        """Return when there is something, and it is a whole batch or `linger_s` have passed; or after `seconds`."""
        with self._lock:
            if not self._ops and not self._closed:
                self._filled.wait(seconds)
            until = time.monotonic() + linger_s
            while self._ops and self.rows < BATCH_ROWS and not self._closed and not self._hurried:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    break
                self._filled.wait(left_s)

    def take(self) -> tuple[Op, ...]:
        """The oldest reports, as many as one batch has; a report that is written alone comes alone."""
        with self._lock:
            if self._ops and isinstance(self._ops[0], Alone):
                op = self._pop()
                if isinstance(op, ModelForgotten):
                    self._models.pop(op.fingerprint, None)
                return (op,)
            ops: list[Op] = []
            rows = 0
            while self._ops and rows < BATCH_ROWS and len(ops) < BATCH_OPS and not isinstance(self._ops[0], Alone):
                op, rest = split(self._pop(), BATCH_ROWS)
                if rest is not None:
                    self._push_front(rest)
                ops.append(op)
                rows += row_count(op)
            return (*self._models_of(ops), *ops)

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Nothing lingers meanwhile: somebody waits for what is there."""
        with self._lock:
            self._hurried += 1
            self._filled.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._hurried -= 1

    def close(self) -> None:
        """Wake who waits, now and from now on."""
        with self._lock:
            self._closed = True
            self._filled.notify_all()

    def _pop(self) -> Op:
        op = self._ops.popleft()
        self.nbytes -= held_bytes(op)
        self.rows -= row_count(op)
        return op

    def _push_front(self, op: Op) -> None:
        self._ops.appendleft(op)
        self.nbytes += held_bytes(op)
        self.rows += row_count(op)

    def _remember(self, op: ModelSeen) -> None:
        self._models.pop(op.fingerprint, None)
        self._models[op.fingerprint] = op
        if len(self._models) > MAX_MODELS:
            del self._models[next(iter(self._models))]

    def _models_of(self, ops: Iterable[Op]) -> list[ModelSeen]:
        """What is known of the models that these reports are about, without those that they name themselves."""
        named = {op.fingerprint for op in ops if isinstance(op, ModelSeen)}
        wanted = dict.fromkeys(fingerprint for op in ops for fingerprint in _about(op))
        return [self._models[model] for model in wanted if model in self._models and model not in named]


def _about(op: Op) -> list[Fingerprint]:
    match op:
        case BlocksStored() | PromptAsked():
            return [op.tree.fingerprint]
        case UsageReport():
            return [op.fingerprint]
        case SharedReport():
            return [prefix.tree.fingerprint for prefix in op.prefixes]
        case _:
            return []

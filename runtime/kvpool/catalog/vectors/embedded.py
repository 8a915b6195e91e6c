"""Prompts' vectors on this machine's disk, in Qdrant's engine, which runs in a process of its own (see `edge`)."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from kvpool.blocks.identity import Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding.encoder import Vector
from kvpool.catalog.vectors.collection import checked, hit_of, payload_of, tree_digest
from kvpool.catalog.vectors.contract import BATCH_POINTS, MAX_POINTS, Hit, Point, VectorsUnavailableError
from kvpool.catalog.vectors.edge.process import EdgeProcess, Service
from kvpool.errors import DirectoryInUseError

INDEX_AFTER = 10_000
"""The graph is built anew after so many changes: until then new prompts are compared one by one, 0.25 us each."""
_OPEN_S = 30.0
_CLOSE_S = 10.0
_RESTART_PAUSE_S = 1.0

_log = logging.getLogger(__name__)


class EmbeddedVectors:
    """`PromptVectors` in a directory, for one process at a time. A process that dies is started again.

    The disk holds at most `max_points` points of about 3 KB, twice that while a graph is built, and a log of 150 MB.
    `budget_s` is how long a call other than a search may take.
    """

    def __init__(
        self, directory: Path, *, max_points: int = MAX_POINTS, budget_s: float = 10.0, index_after: int = INDEX_AFTER
    ) -> None:
        """Open, or begin, the collection. Raises as `EdgeProcess.wait_until_open` does, within 30 s."""
        self._service = Service(directory=directory, max_points=max_points, index_after=index_after)
        self._budget_s = budget_s
        self._lock = Lock()
        self._closed = False
        self._next_start = 0.0
        self._process: EdgeProcess | None = None
        process = self._living()
        try:
            self._wait_until_open(process, time.monotonic() + _OPEN_S)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The process that has the points open, for those who look after processes."""
        process = self._process
        return None if process is None or process.has_ended else process.pid

    def upsert(self, points: Sequence[Point]) -> None:
        """As `PromptVectors` says."""
        size = min(BATCH_POINTS, self._service.max_points)
        for begin in range(0, len(points), size):
            batch = points[begin : begin + size]
            said = [[point.id.hex, payload_of(point)] for point in batch]
            vectors = np.concatenate([checked(point.vector) for point in batch]).astype("<f4").tobytes()
            self._update({"ask": "upsert", "points": said}, vectors)

    def search(self, vector: Vector, tree: TreeId, k: int = 10, *, deadline_s: float) -> list[Hit]:
        """As `PromptVectors` says."""
        deadline = time.monotonic() + deadline_s
        said = {"ask": "search", "tree": tree_digest(tree), "k": k}
        answer = self._open(deadline).searches.ask(said, checked(vector).astype("<f4").tobytes(), deadline)
        _log_fault(answer)
        hits = (hit_of(score, payload, tree) for score, payload in answer["hits"])
        return [hit for hit in hits if hit is not None]

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        """As `PromptVectors` says."""
        return self._update({"ask": "erase", "tenant": tenant.hex(), "before_epoch": before_epoch})

    def forget_model(self, fingerprint: Fingerprint) -> int:
        """As `PromptVectors` says."""
        return self._update({"ask": "forget", "model": fingerprint.hex()})

    def count(self) -> int:
        """As `PromptVectors` says."""
        return int(self._counts()["count"])

    def outside_graph(self) -> int:
        """About how many prompts a search compares one by one."""
        return int(self._counts()["outside_graph"])

    def close(self) -> None:
        """As `PromptVectors` says; takes a second or two. Safe to call again."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.stop(_CLOSE_S)

    def _counts(self) -> Mapping[str, Any]:
        deadline = time.monotonic() + self._budget_s
        answer = self._open(deadline).searches.ask({"ask": "count"}, b"", deadline)
        _log_fault(answer)
        return answer

    def _update(self, said: Mapping[str, Any], vectors: bytes = b"") -> int:
        deadline = time.monotonic() + self._budget_s
        answer = self._open(deadline).updates.ask(said, vectors, deadline)
        _log_fault(answer)
        return int(answer["count"])

    def _open(self, deadline: float) -> EdgeProcess:
        """The process, with the points open."""
        process = self._living()
        try:
            self._wait_until_open(process, deadline)
        except DirectoryInUseError as error:
            raise VectorsUnavailableError(str(error)) from None
        return process

    def _living(self) -> EdgeProcess:
        """The process, which is started again where it has ended, but not more than once a second."""
        with self._lock:
            if self._closed:
                raise VectorsUnavailableError("it was closed")
            if self._process is not None and not self._process.has_ended:
                return self._process
            now = time.monotonic()
            if now < self._next_start:
                raise VectorsUnavailableError("its process has ended; it is started again in a moment")
            self._next_start = now + _RESTART_PAUSE_S
            if self._process is not None:
                result = self._process.result
                self._process.kill()
                _log.warning("the process that keeps prompts' vectors ended with %s; it is started again", result)
            self._process = EdgeProcess(self._service)
            return self._process

    def _wait_until_open(self, process: EdgeProcess, deadline: float) -> None:
        process.wait_until_open(deadline)
        unreadable, process.unreadable = process.unreadable, ""
        if unreadable:
            _log.warning("prompts' vectors in %s could not be opened: %s", self._service.directory, unreadable)


def _log_fault(answer: Mapping[str, Any]) -> None:
    if "fault" in answer:
        _log.warning("prompts' vectors: %s", answer["fault"])

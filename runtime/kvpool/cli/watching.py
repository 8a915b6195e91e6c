"""Watches a pool's file while the pool is open, and takes over what is changed in it.

By polling: an editor's rename, a ConfigMap's switch of a linked directory, and a network file system are all the same
to it, and a look twice a second costs microseconds. Links are followed anew at each look. A file is read once it has
been the same for two looks, so that one which is being written is not read in the middle.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from kvpool.config import Change, RuntimeConfig, changes, load_config
from kvpool.errors import KvpoolError, PoolClosedError
from kvpool.pool.results import ReloadReport

POLL_S = 0.5
"""A change is in force after two looks."""
_log = logging.getLogger(__name__)


class Reloadable(Protocol):
    """What watching needs of a pool."""

    @property
    def config(self) -> RuntimeConfig:
        """What it runs with."""
        ...

    def reload(self, config: RuntimeConfig) -> ReloadReport:
        """Take over what can change while it is open."""
        ...


class State(NamedTuple):
    """By what another content of a file is told, without reading it."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int
    changed_ns: int


def state_of(path: Path) -> State | None:
    """The file behind `path`, links followed; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class FileWatch:
    """Tells when a file has another content than what was read when it was in state `known`."""

    def __init__(self, path: Path, known: State | None) -> None:
        self.path = path
        self._known = known
        self._seen = known

    def has_changed(self) -> bool:
        """Look once: whether there is something new to read, complete by now. True once for each change."""
        seen, self._seen = self._seen, state_of(self.path)
        if self._seen != seen or self._seen == self._known:
            return False
        self._known = self._seen
        return True

    @property
    def is_gone(self) -> bool:
        """Whether the last look found no file."""
        return self._seen is None


@contextmanager
def watching(pool: Reloadable, watch: FileWatch) -> Iterator[None]:
    """Within it, a thread takes over each change of the file; it has ended when the context has."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(POLL_S):
            try:
                if watch.has_changed():
                    take_over(pool, watch)
            except Exception:
                _log.exception("%s: watching it has failed; the configuration stays as it is", watch.path)

    thread = threading.Thread(target=look, name="kvpool-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def take_over(pool: Reloadable, watch: FileWatch) -> None:
    """Load the file and reload the pool; what came of it is logged. A file that is wrong changes nothing."""
    if watch.is_gone:
        _log.warning("%s is gone; the configuration stays as it is", watch.path)
        return
    before = pool.config
    try:
        config = load_config(watch.path)
        report = pool.reload(config)
    except PoolClosedError:
        return
    except KvpoolError as error:
        for line in str(error).splitlines():
            _log.error("%s", line)
        _log.error("%s was not taken over; the configuration stays as it is", watch.path)
        return
    logging.getLogger().setLevel(pool.config.telemetry.log_level.upper())
    _tell(watch.path, report, {change.path: change for change in changes(before, config)})


def _tell(path: Path, report: ReloadReport, found: dict[str, Change]) -> None:
    for name in report.applied:
        _log.info("%s: %s", path, _said(name, found))
    for name in report.needs_restart:
        _log.warning("%s: %s needs a restart; until then the old value is in force", path, _said(name, found))
    if report.applied or not report.needs_restart:
        _log.info("%s was taken over, %d changes are in force", path, len(report.applied))


def _said(name: str, found: dict[str, Change]) -> str:
    change = found.get(name)
    return name if change is None else f"{name} {change.old} -> {change.new}"

"""`kvpool run`: opens a pool and shows it until it is told to end."""

import logging
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.logging import RichHandler

from kvpool.blocks.identity import Fingerprint
from kvpool.cli.ending import Ending, told_by
from kvpool.cli.output import print_json
from kvpool.cli.picture import line, screen
from kvpool.cli.sharing import as_object as shared_object
from kvpool.cli.sharing import shared_table
from kvpool.cli.watching import FileWatch, state_of, watching
from kvpool.config import load_config
from kvpool.pool.pool import CLOSE_DEADLINE_S, Pool

LIVE_S = 0.5
SHARED_EVERY_S = 5.0
SHARED_ON_SCREEN, SHARED_IN_JSON = 5, 10


def run(config: Path, *, directory: Path | None, every_s: float, as_json: bool) -> None:
    """Open the pool, show it until SIGINT or SIGTERM, close it; take over what is changed in the file meanwhile.

    Raises as `Pool.open` does.
    """
    watch = FileWatch(config, state_of(config))
    resolved = load_config(config)
    out = Console(highlight=False, soft_wrap=True)
    live = out.is_terminal and not as_json
    _log_to(out if live else None, resolved.telemetry.log_level.upper())
    with Pool.open(resolved, directory=directory) as pool:
        with told_by((signal.SIGINT, signal.SIGTERM)) as ended, watching(pool, watch):
            if live:
                _show(pool, ended, out)
            else:
                _print_every(pool, ended, every_s, as_json=as_json)
        notice = f"closing {pool.directory}: writing what is in ram to ssd, for at most {CLOSE_DEADLINE_S:.0f} s"
        print(notice, file=sys.stderr if as_json else sys.stdout, flush=True)


def as_object(pool: Pool) -> dict[str, object]:
    """The object that `--json` prints: all counters, the most used shared prefixes, and the time."""
    stats, names = pool.stats(), _names(pool)
    return {
        "at_s": round(time.time(), 3),
        **asdict(stats),
        "hit_ratio": stats.hit_ratio,
        "write_amplification": stats.write_behind.write_amplification,
        "shared_prefixes": [shared_object(prefix, names) for prefix in pool.shared_prefixes(SHARED_IN_JSON)],
    }


def _show(pool: Pool, ended: Ending, out: Console) -> None:
    opened_s = time.monotonic()
    shared = _SharedTable(pool)

    def picture() -> RenderableType:
        now_s = time.monotonic()
        return screen(pool.stats(), pool.directory, now_s - opened_s, shared=shared.at(now_s))

    with Live(picture(), console=out, auto_refresh=False) as live:
        while not ended.wait(LIVE_S):
            live.update(picture(), refresh=True)
        live.update(picture(), refresh=True)


def _print_every(pool: Pool, ended: Ending, every_s: float, *, as_json: bool) -> None:
    if not as_json:
        print(f"pool {pool.config.name} is open in {pool.directory}", flush=True)
    while True:
        if as_json:
            print_json(as_object(pool))
        else:
            print(line(pool.stats()), flush=True)
        if ended.wait(every_s):
            return


class _SharedTable:
    """The shared prefixes used most, looked up anew every few seconds: that takes longer than all the rest."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._due_s = 0.0
        self._table: RenderableType | None = None

    def at(self, now_s: float) -> RenderableType | None:
        """The table as of about now; None where nothing is shared."""
        if now_s >= self._due_s:
            prefixes = self._pool.shared_prefixes(SHARED_ON_SCREEN)
            self._table = shared_table(prefixes, _names(self._pool)) if prefixes else None
            self._due_s = now_s + SHARED_EVERY_S
        return self._table


def _names(pool: Pool) -> dict[Fingerprint, str]:
    return {identity.fingerprint: identity.name for identity in pool.known_models()}


def _log_to(out: Console | None, level: str) -> None:
    """Above the live picture, or to standard error."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request to Qdrant
    handler = logging.StreamHandler() if out is None else RichHandler(console=out, show_path=False)
    logging.basicConfig(level=level, handlers=[handler], format="%(message)s" if out else "%(levelname)s %(message)s")

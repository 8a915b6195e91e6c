"""What the pool logs, among what the demo prints."""

import logging
from pathlib import Path

from rich.console import Console


class LogLines(logging.Handler):
    """Each record as one faint line; `hidden` is a directory whose long name does not matter."""

    def __init__(self, console: Console, *, hidden: Path) -> None:
        super().__init__()
        self._console = console
        self._hidden = f"{hidden.absolute()}/"

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        try:
            line = " ".join(self.format(record).replace(self._hidden, "").split())
            self._console.print(f"  log: {line}", style="dim", markup=False, highlight=False)
        except Exception:  # as all handlers: what cannot be printed must not end the thread that logs
            self.handleError(record)

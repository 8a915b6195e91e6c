"""Where a pool keeps its files when nobody says where."""

import os
from pathlib import Path


def default_directory(name: str) -> Path:
    """`$XDG_DATA_HOME/kvpool/NAME`, else `~/.local/share/kvpool/NAME`. A relative XDG_DATA_HOME counts as unset."""
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():
        data_home = Path.home() / ".local" / "share"
    return data_home / "kvpool" / name

"""`kvpool status --config`: the settings that are in force."""

from pathlib import Path

from kvpool.cli.output import console, print_json, table
from kvpool.config import effective_settings, load_pool


def show(config: Path, *, as_json: bool) -> None:
    """Print every setting, in the order of the specification. Raises `ConfigError`."""
    settings = effective_settings(load_pool(config))
    if as_json:
        for setting in settings:
            print_json(setting._asdict())
    else:
        console().print(table(("setting", "value", "from"), settings))

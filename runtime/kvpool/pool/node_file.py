"""Who this pool is among those that share a catalog: a random number, kept in the pool's directory."""

import logging
from pathlib import Path
from uuid import UUID, uuid4

from kvpool.errors import ConfigError
from kvpool.pool.durable_file import replace_file

NODE_NAME = "NODE"
_log = logging.getLogger(__name__)


def load_or_create_node(directory: Path) -> UUID:
    """The directory's node; another one where the file is damaged, which leaves rows of the old one to grow old.

    The caller holds the directory's lock. Raises `ConfigError` where the file can be neither read nor written.
    """
    path = directory / NODE_NAME
    try:
        if path.exists():
            with path.open("rb") as file:
                text = file.read(64)
            try:
                return UUID(text.decode("ascii").strip())
            except ValueError:
                _log.warning("%s is damaged: this pool is a new node in the catalog", path)
        node = uuid4()
        replace_file(path, f"{node}\n".encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read or written ({error.strerror or error})") from error
    return node

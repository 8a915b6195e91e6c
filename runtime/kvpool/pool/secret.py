"""The pool secret: 32 random bytes that seed every key and digest. Pools share blocks only with equal secrets.

It never leaves this module but as bytes in memory, and is never logged. A lost secret costs every stored block, which
nothing can match any more, and never a wrong answer.
"""

import logging
import os
import secrets
import stat
from pathlib import Path

from kvpool.blocks.identity import SECRET_BYTES
from kvpool.errors import ConfigError
from kvpool.pool.durable_file import replace_file

SECRET_NAME = "SECRET"  # noqa: S105 - the file's name
_log = logging.getLogger(__name__)


def load_or_create_secret(directory: Path, secret_file: Path | None = None) -> bytes:
    """Return the secret in `secret_file`, which must exist, or else the directory's own, which is made at need.

    Raises `ConfigError` where the file cannot be read, has another length or may be read by others. The caller holds
    the directory's lock.
    """
    if secret_file is not None:
        return _load(secret_file)
    path = directory / SECRET_NAME
    if not os.path.lexists(path):
        _create(path)
    return _load(path)


def _create(path: Path) -> None:
    try:
        replace_file(path, secrets.token_bytes(SECRET_BYTES))
    except OSError as error:
        raise ConfigError(f"the pool secret {path} cannot be written ({error.strerror or error})") from error
    _log.info("made a new pool secret in %s", path.parent)


def _load(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe must not hold us up
        try:
            return _checked(path, os.fstat(fd), os.read(fd, SECRET_BYTES + 1))
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"the pool secret {path} cannot be read ({error.strerror or error})") from error


def _checked(path: Path, status: os.stat_result, data: bytes) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the pool secret {path} is no regular file")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"the pool secret {path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}"
        )
    if len(data) != SECRET_BYTES or status.st_size != SECRET_BYTES:
        raise ConfigError(
            f"the pool secret {path} has {status.st_size} bytes; it must be {SECRET_BYTES} random bytes "
            f"(head -c {SECRET_BYTES} /dev/urandom)"
        )
    return data

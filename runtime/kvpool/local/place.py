"""The directory of one server, 0700, and what lies in it.

LOCK             held while the server, or anything that it started, runs (`lock`)
service/         url, username, password: as `kvpool.config.service` reads them
data/            the server's own
server.conf      the server's settings, written anew at each start
server.log       what the server printed since its last start; server.log.1 before that (`log_file`)
run              its unix socket, or a link to where that lies (`sockets`)
"""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvpool.config.service import PASSWORD, URL, USERNAME

PASSWORD_BYTES = 24
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server keeps what."""

    home: Path
    sockets: Path

    @property
    def data(self) -> Path:
        """The server's own files."""
        return self.home / "data"

    @property
    def settings(self) -> Path:
        """The file that the server reads at its start."""
        return self.home / "server.conf"

    @property
    def log(self) -> Path:
        """What the server printed."""
        return self.home / "server.log"

    @property
    def service(self) -> Path:
        """The folder that tells others how to reach the server."""
        return self.home / "service"

    @property
    def password(self) -> Path:
        """The file of the password; made once, and kept."""
        return self.service / PASSWORD

    @property
    def secret(self) -> str:
        """The password, as readers of the service folder see it."""
        return self.password.read_text().rstrip("\r\n")

    def introduce(self, url: str, username: str) -> None:
        """Write the service folder: this address and user, and the password, which is made up if there is none."""
        make_private(self.service)
        if not self.password.exists():
            write_private(self.password, secrets.token_urlsafe(PASSWORD_BYTES))
        write_private(self.service / USERNAME, username)
        write_private(self.service / URL, url)


def make_private(directory: Path) -> None:
    """Make the directory, if need be, and close it to others."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Give `path` this text, readable by nobody else, for good: whoever reads it sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    with os.fdopen(os.open(temporary, _FLAGS, 0o600), "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Return once the names in `directory` are durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

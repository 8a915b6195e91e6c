"""How a service that the pool uses is reached: a folder with a file for each key, as Kubernetes mounts a Secret.

    url        where: redis://host:6379, rediss://..., unix:///path; postgresql://host:5432/name; http://host:6333
    username   optional
    password   optional; never in the url, so that a url can be logged
    ca.crt     optional: the certificate authority that TLS is verified against; else the system's

The files are read anew for each connection, so that a rotated password is used from the next one on.
"""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from kvpool.errors import ConfigError

URL, USERNAME, PASSWORD, CA = "url", "username", "password", "ca.crt"
MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAddress:
    """Where a service is and who we are to it. Its text never holds the password."""

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    @property
    def parts(self) -> SplitResult:
        """The url, taken apart."""
        return urlsplit(self.url)


def read_service(folder: Path, *, schemes: tuple[str, ...]) -> ServiceAddress:
    """Read the folder of a service whose url has one of `schemes`. Raises `ConfigError` that names the file."""
    url = _read(folder / URL)
    if url is None:
        raise ConfigError(f"{folder / URL}: there is no such file; it must hold the address, as {schemes[0]}://...")
    parts = urlsplit(url)
    if parts.scheme not in schemes:
        raise ConfigError(f"{folder / URL}: it must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if parts.password is not None:
        raise ConfigError(f"{folder / URL}: a password does not belong here, but in {folder / PASSWORD}")
    ca_file = folder / CA
    return ServiceAddress(
        url=url,
        username=_read(folder / USERNAME) or parts.username,
        password=_read(folder / PASSWORD),
        ca_file=ca_file if ca_file.is_file() else None,
    )


def _read(path: Path) -> str | None:
    """The text of a file, without the line end that editors add; None where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    return text.rstrip("\r\n")

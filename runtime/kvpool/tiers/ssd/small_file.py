"""Small files that are replaced whole: after a crash either the old text is there or the new one, never a mixture."""

from contextlib import suppress
from pathlib import Path

from kvpool.tiers.ssd.disk import Disk

TEMPORARY_SUFFIX = ".tmp"
MAX_SMALL_FILE_BYTES = 4096


def read_small_file(disk: Disk, path: Path) -> bytes | None:
    """The first 4 KiB of `path`, or None where there is no such file. Raises `OSError`."""
    try:
        fd = disk.open(path)
    except FileNotFoundError:
        return None
    try:
        data = b""
        while len(data) < MAX_SMALL_FILE_BYTES:
            buffer = bytearray(MAX_SMALL_FILE_BYTES - len(data))
            count = disk.preadv(fd, [buffer], len(data))
            if count == 0:
                break
            data += buffer[:count]
        return data
    finally:
        disk.close(fd)


def replace_small_file(disk: Disk, path: Path, data: bytes) -> None:
    """Write `data` beside `path` and give it that name, durably. Raises `OSError`; `path` is as before then, or new."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with suppress(FileNotFoundError):
        disk.unlink(temporary)
    fd = disk.open(temporary, create=True)
    try:
        if disk.pwritev(fd, [data], 0) != len(data):
            raise OSError(f"short write of {temporary.name}")
        disk.fdatasync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, path)
    disk.sync_directory(path.parent)

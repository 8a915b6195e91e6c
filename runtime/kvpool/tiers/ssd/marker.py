"""The file that says in which format a directory is, so that an older program leaves a newer one's data alone.

Its first line, `kvpool-ssd format=1 record=1`, keeps this shape in every version to come.
"""

import re
from pathlib import Path

from kvpool.blocks.record import VERSION as RECORD_VERSION
from kvpool.errors import IncompatibleDataError
from kvpool.tiers.ssd.disk import Disk
from kvpool.tiers.ssd.segment import FORMAT_VERSION
from kvpool.tiers.ssd.small_file import read_small_file, replace_small_file

MARKER_NAME = "FORMAT"
_LINE = re.compile(rb"kvpool-ssd format=(\d{1,9}) record=(\d{1,9})\n")
_OURS = b"kvpool-ssd format=%d record=%d\n" % (FORMAT_VERSION, RECORD_VERSION)


def check_marker(disk: Disk, directory: Path) -> None:
    """Raise `IncompatibleDataError` if a newer program wrote `directory`. Writes nothing. Raises `OSError`."""
    text = read_small_file(disk, directory / MARKER_NAME)
    if not text:
        return
    match = _LINE.match(text)
    if match is None:
        raise IncompatibleDataError(
            f"{directory / MARKER_NAME} is no marker of kvpool's ssd tier; move it away, or use another directory"
        )
    format_version, record_version = int(match[1]), int(match[2])
    if format_version > FORMAT_VERSION or record_version > RECORD_VERSION:
        raise IncompatibleDataError(
            f"{directory} holds ssd format {format_version} with record version {record_version}; this kvpool reads up "
            f"to format {FORMAT_VERSION} with record version {RECORD_VERSION}: use a newer one, or another directory"
        )


def write_marker(disk: Disk, directory: Path) -> None:
    """Say that the directory is in our format, unless it says so already. The caller holds its lock.

    Raises as `check_marker` does: a newer program may have had the directory until the lock was ours.
    """
    check_marker(disk, directory)
    if read_small_file(disk, directory / MARKER_NAME) != _OURS:
        replace_small_file(disk, directory / MARKER_NAME, _OURS)

"""Keeps which prefixes are shared over a restart: those that were declared, and those whose other branches are gone.

Written when a pool with an ssd tier closes, read when it is opened, and left there: after a crash the marks of the
close before are taken, for a mark protects a prefix from the policy and does nothing else. Layout, little-endian:

    0     8   magic "kvpool\\0S"           8    4   format version
    12    4   number of marks
    16    ..  per mark: 32 bytes fingerprint, 16 bytes tenant digest, 16 bytes key of the prefix's last block,
              8 bytes epoch, 8 bytes hits, 4 bytes depth in blocks
    end   8   xxh3-64 of all before
"""

import logging
import struct
from collections.abc import Sequence
from pathlib import Path

import xxhash

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.pool.durable_file import replace_file
from kvpool.prefix.index import PrefixIndex
from kvpool.prefix.sharing import SharedMark, shared_marks

SHARED_NAME = "SHARED"
FORMAT_VERSION = 1
MAX_MARKS = 16_384
"""Beyond it those with fewest hits are not kept; 1.4 MB."""
_MAGIC = b"kvpool\0S"
_START = struct.Struct("<8sII")
_MARK = struct.Struct("<32s16s16sQQI")
_SUM = struct.Struct("<Q")
_MAX_BYTES = _START.size + MAX_MARKS * _MARK.size + _SUM.size
_log = logging.getLogger(__name__)


def load_shared(directory: Path) -> list[SharedMark]:
    """The marks of the process before; none where there is no file, or a damaged one, which is logged."""
    path = directory / SHARED_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        _log.warning("%s cannot be used (%s); declared prefixes are not protected until declared again", path, error)
        return []
    marks = unpacked(data)
    if marks is None:
        _log.warning("%s is damaged; declared prefixes are not protected until declared again", path)
    return marks or []


def save_shared(directory: Path, index: PrefixIndex) -> None:
    """Keep the index's shared prefixes for the next process; a disk that cannot is logged."""
    path = directory / SHARED_NAME
    try:
        replace_file(path, packed(shared_marks(index, MAX_MARKS)))
    except OSError as error:
        _log.warning("%s cannot be written (%s); declared prefixes are to be declared again", path, error)


def packed(marks: Sequence[SharedMark]) -> bytes:
    """The file's bytes."""
    rows = [
        _MARK.pack(mark.tree.fingerprint, mark.tree.tenant, mark.key, mark.tree.epoch, mark.hits, mark.depth)
        for mark in marks
    ]
    body = _START.pack(_MAGIC, FORMAT_VERSION, len(rows)) + b"".join(rows)
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def unpacked(data: bytes) -> list[SharedMark] | None:
    """What `packed` has packed; None where the bytes are not ours, of another format, or damaged."""
    if len(data) < _START.size + _SUM.size:
        return None
    body = memoryview(data)[: -_SUM.size]
    magic, version, count = _START.unpack_from(body)
    if magic != _MAGIC or version != FORMAT_VERSION or len(body) != _START.size + count * _MARK.size:
        return None
    if xxhash.xxh3_64_intdigest(body) != _SUM.unpack_from(data, len(body))[0]:
        return None
    return [
        SharedMark(TreeId(Fingerprint(fingerprint), TenantDigest(tenant), epoch), depth, BlockKey(key), hits)
        for fingerprint, tenant, key, epoch, hits, depth in _MARK.iter_unpack(body[_START.size :])
    ]

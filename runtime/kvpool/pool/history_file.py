"""Keeps what became of lost blocks over a restart, so that `explain` can answer for the process before.

Written when a pool closes and removed when it has opened: after a crash there is none, and the history begins anew.
Layout, little-endian:

    0     8   magic "kvpool\\0H"           8    4   format version
    12    4   number of losses            16   8   complete since (double, unix seconds; 0: nothing was forgotten)
    24    ..  per loss: 16 bytes key, 8 bytes time (double), 1 byte reason, 1 byte tier
    end   8   xxh3-64 of all before
"""

import logging
import struct
import time
from contextlib import suppress
from pathlib import Path

import xxhash

from kvpool.blocks.identity import BlockKey
from kvpool.pool.durable_file import replace_file
from kvpool.prefix.history import Fate, History, Loss
from kvpool.prefix.index import LEVEL_NAMES, PrefixIndex
from kvpool.prefix.node import NOWHERE, RAM, SSD, Node

CAPACITY = 16_384
FORMAT_VERSION = 1
_MAGIC = b"kvpool\0H"
_START = struct.Struct("<8sIId")
_ENTRY = struct.Struct("<16sdBB")
_SUM = struct.Struct("<Q")
_LOSSES = tuple(Loss)
"""By number: new reasons are added at the end."""
_MAX_BYTES = _START.size + 2 * CAPACITY * _ENTRY.size + _SUM.size
_log = logging.getLogger(__name__)


def load_history(path: Path, *, is_new: bool) -> History:
    """Return the history of the process before; a new one, complete since now, where that is not known."""
    history = History(CAPACITY)
    if is_new:
        return history
    try:
        data = path.read_bytes()[: _MAX_BYTES + 1]
    except FileNotFoundError:
        return _begun_anew()
    except OSError as error:
        _log.warning("%s cannot be used (%s); misses of the process before cannot be explained", path, error)
        return _begun_anew()
    since = _unpack(data, history)
    if since is None:
        _log.warning("%s is damaged; misses of the process before cannot be explained", path)
        return _begun_anew()
    history.complete_since_s = since or None
    return history


def discard_history(path: Path) -> None:
    """Remove the file, once the pool is open: a crash must not leave an old one behind."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s cannot be removed (%s)", path, error)


def _begun_anew() -> History:
    """A history that knows nothing of the time before now."""
    history = History(CAPACITY)
    history.complete_since_s = time.time()
    return history


def save_history(path: Path, index: PrefixIndex) -> None:
    """Keep the index's history for the next process; a disk that cannot is logged.

    What lies in RAM alone goes with this process, and is not listed: the next one knows only what came after.
    """
    with index.lock:
        losses = list(index.history.items())
        since = index.history.complete_since_s or 0.0
        if any(_lies_in_ram_alone(node) for tree in index.trees.values() for node in tree.nodes()):
            since = time.time()
    try:
        replace_file(path, _packed(losses, since))
    except OSError as error:
        _log.warning("%s cannot be written (%s)", path, error)
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _lies_in_ram_alone(node: Node) -> bool:
    """Whether some block of the edge does. On SSD lie its first ones, unless a record was lost."""
    saved = node.places[SSD]
    return len(node.places[RAM] or ()) > len(saved or ()) or (saved is not None and NOWHERE in saved)


def _packed(losses: list[tuple[BlockKey, Fate]], since: float) -> bytes:
    rows = [_ENTRY.pack(key, fate.at_s, _LOSSES.index(fate.loss), LEVEL_NAMES.index(fate.tier)) for key, fate in losses]
    body = _START.pack(_MAGIC, FORMAT_VERSION, len(rows), since) + b"".join(rows)
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def _unpack(data: bytes, history: History) -> float | None:
    """Fill `history`; since when it is complete, or None where the bytes are not ours or damaged."""
    if len(data) < _START.size + _SUM.size:
        return None
    body = memoryview(data)[: -_SUM.size]
    magic, version, count, since = _START.unpack_from(body)
    if magic != _MAGIC or version != FORMAT_VERSION or len(body) != _START.size + count * _ENTRY.size:
        return None
    if xxhash.xxh3_64_intdigest(body) != _SUM.unpack_from(data, len(body))[0]:
        return None
    for key, at_s, loss, level in _ENTRY.iter_unpack(body[_START.size :]):
        if loss >= len(_LOSSES) or level >= len(LEVEL_NAMES):
            return None
        history.note(BlockKey(key), Fate(_LOSSES[loss], LEVEL_NAMES[level], at_s))
    return float(since)

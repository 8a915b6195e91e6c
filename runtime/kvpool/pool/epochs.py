"""The epochs of tenants: numbers in the seed of their keys, raised by erasure, that never decrease.

A tenant's epoch is the larger of its own number and the pool's *floor*. The floor is raised to erase all tenants at
once; then no tenant needs a number of its own any more. That also happens when more than `MAX_TENANTS` have one, which
costs everybody's blocks and keeps the file bounded.

The file `EPOCHS`, all little-endian:

    0      8   magic "kvpool\\0E"
    8      4   format version
    12     16  BLAKE2b-128 of the 12 bytes before
    28     8   floor                        36   4   number of tenants
    40     ..  per tenant, in order: 16 bytes digest, 8 bytes epoch
    end    16  BLAKE2b-128 of all before

The first 28 bytes keep this shape in every version to come. The file is written whole and synced, with its directory,
before a raised epoch is used.
"""

import hashlib
import logging
import struct
import threading
from pathlib import Path

from kvpool.blocks.identity import TenantDigest
from kvpool.errors import IncompatibleDataError, InputError
from kvpool.pool.durable_file import replace_file

EPOCHS_NAME = "EPOCHS"
FORMAT_VERSION = 1
MAX_TENANTS = 1_000_000
MAX_EPOCH = 2**62
_MAGIC = b"kvpool\0E"
_START = struct.Struct("<8sI")
_COUNTS = struct.Struct("<QI")
_ENTRY = struct.Struct("<16sQ")
_SUM_BYTES = 16
_ENTRIES_AT = _START.size + _SUM_BYTES + _COUNTS.size
_MAX_BYTES = _ENTRIES_AT + MAX_TENANTS * _ENTRY.size + _SUM_BYTES
_log = logging.getLogger(__name__)

_State = tuple[int, dict[TenantDigest, int]]
"""The floor, and the epochs above it."""


class Epochs:
    """Epochs by tenant digest. Safe from any thread; `of` takes no lock, the others do I/O under theirs.

    `trusted` is False after the file was lost or damaged: which tenants were erased is unknown then, so records that
    were written before must not be believed. The caller calls `distrust_up_to` with the largest epoch that it has seen
    in any of them (0 when it has dropped them all), after which none can be matched. Until then nothing can be raised
    or saved, for the next start would believe that file.
    """

    def __init__(
        self, path: Path, state: _State = (0, {}), *, trusted: bool = True, max_tenants: int = MAX_TENANTS
    ) -> None:
        self._path = path
        self._state = state
        self._trusted = trusted
        self._saved = False
        self._max_tenants = max_tenants
        self._lock = threading.Lock()

    @classmethod
    def load(cls, directory: Path, *, is_new: bool, max_tenants: int = MAX_TENANTS) -> "Epochs":
        """Read the directory's file; where `is_new`, none is expected, and the first one is written.

        Raises `IncompatibleDataError` if a newer program wrote it, and `OSError`.
        """
        path = directory / EPOCHS_NAME
        state = _read(path)
        epochs = cls(path, state or (0, {}), trusted=is_new or state is not None, max_tenants=max_tenants)
        epochs._saved = state is not None
        if not epochs.trusted:
            _log.warning("%s is lost or damaged; blocks that were stored before it are not used", path)
        elif state is None:
            epochs.save()
        return epochs

    @property
    def trusted(self) -> bool:
        """Whether every erasure of the past is known."""
        return self._trusted

    @property
    def floor(self) -> int:
        """The epoch of every tenant that has none of its own."""
        return self._state[0]

    def __len__(self) -> int:
        return len(self._state[1])

    def of(self, tenant: TenantDigest) -> int:
        """The tenant's epoch; the floor, which starts at 0, when it has none of its own."""
        floor, own = self._state
        return max(floor, own.get(tenant, 0))

    def raise_epoch(self, tenant: TenantDigest) -> int:
        """Raise one tenant's epoch and return it once it is durable. Raises `OSError`; then it is as before."""
        with self._lock:
            floor, own = self._state
            epoch = self.of(tenant) + 1
            self._replace(self._bounded((floor, {**own, _checked(tenant): epoch})))
            return self.of(tenant)

    def raise_all(self) -> int:
        """Raise every tenant's epoch above all of today's, and return it once durable. Raises `OSError` likewise."""
        with self._lock:
            self._replace((_largest(self._state) + 1, {}))
            return self.floor

    def at_least(self, tenant: TenantDigest, epoch: int) -> bool:
        """Adopt an epoch that was seen elsewhere if it is higher; whether it was.

        It is used at once and durable after `save`, so that many can be adopted while records are read.
        """
        if not 0 <= epoch <= MAX_EPOCH:
            raise InputError(f"epoch {epoch} is none: 0 to {MAX_EPOCH}")
        with self._lock:
            if epoch <= self.of(tenant):
                return False
            floor, own = self._state
            own[_checked(tenant)] = epoch
            self._state = self._bounded((floor, own))
            self._saved = False
            return True

    def floor_at_least(self, epoch: int) -> bool:
        """Adopt a floor that was seen elsewhere if it is higher; whether it was. Durable after `save`."""
        if not 0 <= epoch <= MAX_EPOCH:
            raise InputError(f"epoch {epoch} is none: 0 to {MAX_EPOCH}")
        with self._lock:
            floor, own = self._state
            if epoch <= floor:
                return False
            self._state = epoch, {tenant: higher for tenant, higher in own.items() if higher > epoch}
            self._saved = False
            return True

    def known(self) -> tuple[int, dict[TenantDigest, int]]:
        """The floor, and a copy of all epochs above it."""
        with self._lock:
            floor, own = self._state
            return floor, {tenant: epoch for tenant, epoch in own.items() if epoch > floor}

    def save(self) -> None:
        """Make what was adopted durable; nothing is written when it is. Raises `OSError`."""
        with self._lock:
            if not self._saved:
                self._replace(self._state)

    def distrust_up_to(self, epoch: int) -> None:
        """Let no record of `epoch` or an earlier one be matched from now on, and be trusted again. Raises `OSError`."""
        with self._lock:
            self._write((max(epoch, _largest(self._state)) + 1, {}))
            self._trusted = True

    def _replace(self, state: _State) -> None:
        if not self._trusted:
            raise RuntimeError("epochs that are not trusted are raised by distrust_up_to first")
        self._write(state)

    def _write(self, state: _State) -> None:
        replace_file(self._path, _packed(state))
        self._state = state
        self._saved = True

    def _bounded(self, state: _State) -> _State:
        if len(state[1]) <= self._max_tenants:
            return state
        _log.warning(
            "more than %d tenants have epochs of their own; all tenants' blocks are dropped", self._max_tenants
        )
        return _largest(state) + 1, {}


def _largest(state: _State) -> int:
    return max(state[0], max(state[1].values(), default=0))


def _checked(tenant: TenantDigest) -> TenantDigest:
    if len(tenant) != 16:
        raise InputError(f"a tenant digest has 16 bytes, not {len(tenant)}")
    return tenant


def _sum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_SUM_BYTES, person=b"kvpool-epochs").digest()


def _packed(state: _State) -> bytes:
    floor, own = state
    start = _START.pack(_MAGIC, FORMAT_VERSION)
    entries = b"".join(_ENTRY.pack(tenant, own[tenant]) for tenant in sorted(own))
    body = start + _sum(start) + _COUNTS.pack(floor, len(own)) + entries
    return body + _sum(body)


def _read(path: Path) -> _State | None:
    """What the file says; None when there is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) < _ENTRIES_AT or _sum(data[: _START.size]) != data[_START.size : _START.size + _SUM_BYTES]:
        return None
    magic, version = _START.unpack_from(data)
    if magic == _MAGIC and version > FORMAT_VERSION:
        raise IncompatibleDataError(
            f"{path} has format {version}; this kvpool reads up to format {FORMAT_VERSION}: use a newer one"
        )
    floor, count = _COUNTS.unpack_from(data, _ENTRIES_AT - _COUNTS.size)
    body = memoryview(data)[:-_SUM_BYTES]
    if magic != _MAGIC or len(body) != _ENTRIES_AT + count * _ENTRY.size or _sum(body) != data[-_SUM_BYTES:]:
        return None
    return floor, {TenantDigest(tenant): epoch for tenant, epoch in _ENTRY.iter_unpack(body[_ENTRIES_AT:])}

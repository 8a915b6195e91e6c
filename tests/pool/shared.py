"""A keyed tier in this process's memory, for what the engine does with one; and pools that share it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.blocks.record import Buffer
from kvpool.config import RuntimeConfig
from kvpool.pool.pool import Pool
from kvpool.pool.remote.share import Limit
from kvpool.tiers.tier import (
    Found,
    Inquiry,
    KeyedTier,
    Moved,
    Sealed,
    TierBusyError,
    TierName,
    TierUnavailableError,
    Usage,
)

from .kv import config

SECRET = bytes(range(32))
"""Of all pools that share."""


class MemoryTier:
    """Keeps records in a dictionary. `fault` makes every call fail; `before_get` runs in each `get`."""

    def __init__(self, name: TierName = TierName.DRAGONFLY) -> None:
        self.name = name
        self.records: dict[tuple[TreeId, BlockKey, int], bytes] = {}
        self.fault = ""
        self.is_busy = False
        self.before_get: Callable[[], None] = lambda: None
        self.calls: list[str] = []
        self.touched: list[BlockKey] = []
        self.withheld: set[tuple[TreeId, BlockKey, int]] = set()
        """What it says it has, and does not give."""
        self._lock = threading.Lock()

    def find(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[Found | None]:
        with self._called("find"):
            return [self._found(tree, key, codecs) for key in keys]

    def inquire(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> Inquiry:
        return _Answered(self.find(tree, keys, codecs))

    def get(self, tree: TreeId, wanted: Sequence[Found], into: Sequence[Buffer]) -> Moved:
        self.before_get()
        with self._called("get"):
            done = []
            for (key, codec, _), buffer in zip(wanted, into, strict=True):
                is_given = (tree, key, codec) not in self.withheld
                record = self.records.get((tree, key, codec), b"") if is_given else b""
                done.append(len(record) == len(buffer))
                if done[-1]:
                    np.copyto(buffer, np.frombuffer(record, np.uint8))
            return Moved(done)

    def put(self, tree: TreeId, records: Sequence[Sealed], ancestors: Sequence[BlockKey]) -> Moved:
        with self._called("put"):
            for key, codec, record in records:
                self.records[tree, key, codec] = bytes(record)
            return Moved([True] * len(records))

    def touch(self, tree: TreeId, keys: Sequence[BlockKey], codecs: Sequence[int]) -> None:
        with self._called("touch"):
            self.touched += keys

    def drop(self, tree: TreeId, found: Sequence[Found]) -> None:
        with self._called("drop"):
            for key, codec, _ in found:
                self.records.pop((tree, key, codec), None)

    def erase(self, tenant: TenantDigest, before_epoch: int) -> int:
        return self._remove(lambda tree: tree.tenant == tenant and tree.epoch < before_epoch)

    def forget_model(self, fingerprint: Fingerprint) -> int:
        return self._remove(lambda tree: tree.fingerprint == fingerprint)

    def usage(self) -> Usage:
        with self._called("usage"):
            return Usage(sum(map(len, self.records.values())), 0)

    def close(self) -> None:
        self.fault = "closed"

    def _found(self, tree: TreeId, key: BlockKey, codecs: Sequence[int]) -> Found | None:
        held = [codec for codec in codecs if (tree, key, codec) in self.records]
        return Found(key, held[0], len(self.records[tree, key, held[0]])) if held else None

    def _remove(self, is_wanted: Callable[[TreeId], bool]) -> int:
        with self._called("remove"):
            gone = [known for known in self.records if is_wanted(known[0])]
            for known in gone:
                del self.records[known]
            return len(gone)

    @contextmanager
    def _called(self, name: str) -> Iterator[None]:
        with self._lock:
            self.calls.append(name)
            if self.is_busy:
                raise TierBusyError(self.name, "all connections are in use")
            if self.fault:
                raise TierUnavailableError(self.name, self.fault)
            yield


class _Answered:
    """An inquiry that needs no waiting."""

    def __init__(self, found: list[Found | None]) -> None:
        self._found = found

    def answer(self) -> list[Found | None]:
        return self._found

    def close(self) -> None:
        """It holds nothing."""


class Shared:
    """Connects pools to one `MemoryTier` after the other."""

    def __init__(self, tier: MemoryTier) -> None:
        self.name = tier.name
        self.tier = tier
        self.refuses: set[Fingerprint] = set()

    def connect(self) -> KeyedTier:
        if self.tier.fault:
            raise TierUnavailableError(self.name, self.tier.fault)
        return _Unclosed(self.tier)

    def is_wanted(self, fingerprint: Fingerprint) -> bool:
        return fingerprint not in self.refuses

    def start(self) -> None:
        """There is no server."""

    def set_limits(self, limits: Mapping[Fingerprint, Limit]) -> None:
        """There are none."""

    def shares(self) -> Mapping[str, Usage]:
        return {}

    def tend(self) -> None:
        """There is nothing to be done."""

    def reconfigure(self, config: RuntimeConfig) -> None:
        """There is nothing to be changed."""

    def close(self) -> None:
        """It outlives each pool."""


class _Unclosed:
    """What one pool uses of a tier that goes on when that pool is closed."""

    def __init__(self, tier: MemoryTier) -> None:
        self._tier = tier

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    def close(self) -> None:
        """The tier is other pools' too."""


def sharing_pool(directory: Path, *tiers: MemoryTier, **options: Any) -> Pool:
    """A pool that shares these tiers with all others that have their directory beside its own."""
    secret = directory.parent / "shared-secret"
    if not secret.exists():
        secret.touch(0o600)
        secret.write_bytes(SECRET)
    sharing = config(**options).model_copy(update={"secret_file": secret})
    return Pool.open(sharing, directory=directory, shared=[Shared(tier) for tier in tiers])

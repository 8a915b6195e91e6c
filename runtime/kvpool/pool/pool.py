"""The pool: what a user of the library opens, registers models with, and closes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from kvpool.api import KVCachePool
from kvpool.blocks.identity import Fingerprint, ModelIdentity
from kvpool.blocks.tokens import Tokens
from kvpool.config import RuntimeConfig, changes, default_directory, load_config, runtime_config, with_live_changes
from kvpool.errors import InputError
from kvpool.pool.assembly import assemble, live_settings, notices, sharing_rules
from kvpool.pool.burying import bury, trees_of
from kvpool.pool.chores import Chores
from kvpool.pool.directory import PoolDirectory
from kvpool.pool.engine import Engine
from kvpool.pool.events import Event
from kvpool.pool.explain import Explainer
from kvpool.pool.finding import FoundEntry, Question, find
from kvpool.pool.gpu_store import GpuOpener, TorchDevice
from kvpool.pool.history_file import discard_history, load_history, save_history
from kvpool.pool.housekeeping import Housekeeper
from kvpool.pool.model import Model
from kvpool.pool.outages import OutageWatch
from kvpool.pool.registry import Registry
from kvpool.pool.remote.connecting import Connector
from kvpool.pool.remote.servers import RunningServer, running_servers
from kvpool.pool.remote.telling import erase_elsewhere
from kvpool.pool.restoring import distrust, use_tier
from kvpool.pool.results import EraseReport, ModelSpec, ReloadReport, UnregisterReport
from kvpool.pool.roster import Roster
from kvpool.pool.shared_file import load_shared, save_shared
from kvpool.pool.snapshot import snapshot
from kvpool.pool.stats import PoolStats
from kvpool.prefix.sharing import SharedPrefix, top_shared
from kvpool.resilience import Degradation
from kvpool.tiers.ssd.disk import Disk

CLOSE_DEADLINE_S = 30.0
"""How long closing may write what is in memory down to SSD."""
ERASE_DEADLINE_S = 5.0
"""How long erasing waits for shared tiers to be cleared and other nodes to confirm."""
GRACE_S = 5.0
"""How much longer it may take in all, for what is in flight to end."""
_log = logging.getLogger(__name__)


class Pool:
    """A cache of keys and values in tiers, for any number of models and tenants. Made by `open`; a context manager.

    Every method may be called from any thread. Faults of a tier are never raised: they are misses, and show in `stats`.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        directory: PoolDirectory,
        disk: Disk | None = None,
        gpu: GpuOpener | None = None,
        shared: Sequence[Connector] | None = None,
    ) -> None:
        """Use `Pool.open`."""
        self.config = config
        self.directory = directory.path
        self.notices = notices(config)
        """What the configuration asks for and this version does not do, a sentence each."""
        self._directory = directory
        self._registry = Registry.load(directory.path)
        self._close_lock = threading.Lock()
        self._closed = False
        self._memory_keeper, self._disk_keeper = Housekeeper("memory-keeper"), Housekeeper("disk-keeper")
        self._encoder, self._gpu_keeper = Housekeeper("encoder"), Housekeeper("gpu-keeper")
        self._remote_keeper = Housekeeper("remote-keeper")
        self._engine: Engine = assemble(
            config,
            directory,
            load_history(directory.history, is_new=directory.is_new),
            identity_of=self._registry.identity,
            is_unregistered=self._registry.is_unregistered,
            is_known_name=self._registry.is_known_name,
            wake=self._memory_keeper.wake,
            disk=disk,
            gpu=gpu or TorchDevice(),
            adopted=self._note_adopted,
            shared=shared,
        )
        self._engine.shared_marks = load_shared(directory.path)
        explainer = Explainer(
            self._engine.index,
            self._engine.tenants,
            self._engine.store,
            self._registry.known,
            () if self._engine.remote is None else self._engine.remote.stores,
            self._engine.encodings.readable,
            None if self._engine.catalog is None else self._engine.catalog.reading.trail,
        )
        self._roster = Roster(self._registry, self._engine, explainer, config, self.directory)
        self._outages = OutageWatch(self._engine)
        self._chores = Chores(self._engine, self._roster.forget_trees)

    @classmethod
    def open(
        cls,
        config: RuntimeConfig | KVCachePool | Path | str,
        *,
        directory: Path | None = None,
        disk: Disk | None = None,
        gpu: GpuOpener | None = None,
        shared: Sequence[Connector] | None = None,
    ) -> Pool:
        """Open the pool of this configuration: one in memory, or the file of one, or of a `KVCachePool`.

        Its directory is `directory`, or what the configuration says, or a place of its own below the user's data
        directory. What lies there on SSD is found again. An ssd tier that cannot be used now (a full or failing disk)
        is left out and tried again; so is a gpu tier without a GPU. To be called in the thread of the engine whose
        model is on the GPU, if there is one. `disk` are the ssd tier's system calls, for those who want to see them
        fail; `gpu` is the device of the gpu tier, `TorchDevice("cuda")` unless it is given. Raises `ConfigError`;
        `DirectoryInUseError`, which names the process that has the pool open; `IncompatibleDataError` for a newer
        program's directory.
        """
        resolved = _resolved(config)
        held = PoolDirectory.open(directory or resolved.directory or default_directory(resolved.name))
        try:
            pool = cls(resolved, held, disk, gpu, shared)
        except BaseException:
            held.close()
            raise
        try:
            pool._start()
        except BaseException:
            pool.close(deadline_s=0)
            raise
        return pool

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def register(self, spec: ModelSpec) -> Model:
        """Return the model of this identity, made if need be, and remembered by name in the pool's directory.

        Registering it again with other quotas or codecs takes those over. Raises `InputError` where its blocks are not
        of the size that the pool is configured for, or too large for RAM, or where it is given quotas for a tier that
        has none, and `ConfigError` where guarantees do not fit.
        """
        self._engine.gate.check()
        return self._roster.register(spec)

    def unregister(self, name: str, *, fingerprint: Fingerprint | None = None) -> UnregisterReport:
        """Forget the model of this name, all its revisions or the one of that `fingerprint`, and give its bytes back.

        From before this returns, nothing of it can be matched or stored; what is being read goes when its leases end.
        Raises `InputError` that says which names are known.
        """
        with self._engine.gate:
            return self._roster.unregister(name, fingerprint)

    def model(self, name: str) -> Model:
        """Return the model of this name that was registered last, by this process or an earlier one.

        Raises `InputError` that says which names are known, and as `register` does.
        """
        self._engine.gate.check()
        return self._roster.model(name)

    def models(self) -> list[Model]:
        """The models that this process uses."""
        return self._roster.models()

    def known_models(self) -> list[ModelIdentity]:
        """Every model that the directory remembers, the one registered last first."""
        return self._registry.known()

    def stats(self) -> PoolStats:
        """Return a snapshot of all counters."""
        return snapshot(self.config.name, self._engine, self.models(), self._outages)

    def shared_prefixes(self, count: int = 10) -> list[SharedPrefix]:
        """Return the `count` shared prefixes that requests use most; of 10,000, that takes some 30 ms."""
        self._engine.gate.check()
        return top_shared(self._engine.index, count)

    def degradations(self) -> frozenset[Degradation]:
        """What is out of that which the configuration asks for."""
        return frozenset(self._outages.look())

    def local_servers(self) -> list[RunningServer]:
        """The servers that run here for managed tiers, in the waterfall's order. One that ended is started again."""
        return running_servers(self._engine)

    def release_device_memory(self, nbytes: int) -> int:
        """The engine is out of device memory: hold `nbytes` less of it; how many bytes it was given back by now.

        Blocks move down to RAM as far as there is room. Leased ones go when their leases end. The gpu tier grows again,
        up to its capacity, after a while. 0 where there is no gpu tier.
        """
        with self._engine.gate:
            gpu = self._engine.gpu
            if gpu is None:
                return 0
            given_back = gpu.memory.give_back(nbytes)
            gpu.note_capacity()
            return given_back

    def erase(self, *, tenant: str, deadline_s: float = ERASE_DEADLINE_S) -> EraseReport:
        """See that nothing which this tenant has stored can be matched any more, from before this call returns.

        Its epoch is raised, durably, before anything else; then its blocks are given back in every tier, but those that
        are being read now: they go when their leases end. Other nodes are told, through the catalog and Dragonfly; the
        report names those that have not confirmed within `deadline_s`, and what goes on in the background. Raises
        `InputError` where tenants share one scope, and
        `OSError` where the new epoch cannot be made durable; nothing is erased then.
        """
        tenants = self._engine.tenants
        if tenants.shared:
            raise InputError(
                "sharing.scope is pool: all tenants' blocks are one, so one tenant's cannot be erased; "
                "use scope tenant, or a new directory"
            )
        with self._engine.gate:
            digest = tenants.digest(tenant)
            with self._engine.burying:
                epoch = tenants.epochs.raise_epoch(digest)
                with tenants.lock:
                    for model in self.models():
                        model.forget_tree(tenant)
                    for tree in trees_of(self._engine, lambda one: one.tenant == digest and one.epoch < epoch):
                        self._engine.index.erase(tree)
                buried = bury(self._engine, lambda tree: tree.id.tenant == digest)
            told = erase_elsewhere(self._engine, digest, epoch, deadline_s=deadline_s)
        return EraseReport(
            epoch=tenants.epochs.of(digest),
            blocks={**buried.blocks, **told.removed},
            bytes=buried.bytes,
            leased_blocks=buried.leased_blocks,
            pending_tiers=told.pending_tiers,
            unconfirmed_nodes=told.unconfirmed_nodes,
            catalog_told=told.catalog_told,
        )

    def find(
        self,
        model: str,
        tenant: str | None = None,
        *,
        prefix: Tokens | None = None,
        similar_to: Tokens | None = None,
        older_than: timedelta | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int = 1000,
    ) -> list[FoundEntry]:
        """Find blocks that this pool or others with its catalog hold: all that is given must hold of them.

        `prefix`: those that begin with these tokens, from the last block of it on. `similar_to`: the last blocks of the
        prompts most like these tokens, best first. `older_than`: not used for so long. `where`: their metadata has
        these JSON values. At most `limit`, those used longest ago first. Asks the catalog, and shared tiers whether
        they have what it says; seconds old, for the catalog is written behind. Raises `InputError` for what cannot be
        asked of this pool, and `SharedTierOutError` where the catalog or Qdrant does not answer.
        """
        self._engine.gate.check()
        identity = self._roster.model(model).identity
        older_than_s = None if older_than is None else older_than.total_seconds()
        question = Question(identity, tenant, prefix, similar_to, older_than_s, where or {}, limit)
        return find(self._engine, question)

    def reload(self, config: RuntimeConfig) -> ReloadReport:
        """Take over what of `config` can change while the pool is open; the report names what cannot."""
        self._engine.gate.check()
        found = changes(self.config, config)
        live = [change.path for change in found if change.live]
        fixed = [change.path for change in found if not change.live]
        self._apply(with_live_changes(self.config, config))
        if self._engine.catalog is not None:
            self._engine.catalog.set_prices(self.config.prices)
        return ReloadReport(applied=tuple(live), needs_restart=tuple(fixed))

    def flush(self, deadline_s: float | None = None) -> bool:
        """Wait until all that is wanted on SSD and in shared tiers is there, or was dropped; False at the deadline."""
        self._engine.gate.check()
        until_s = None if deadline_s is None else time.monotonic() + deadline_s
        remote = self._engine.remote
        return self._engine.writer.flush(deadline_s) and (
            remote is None or remote.flush(None if until_s is None else until_s - time.monotonic())
        )

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener`, on a thread of its own, with every block stored or removed; returns what ends that."""
        self._engine.gate.check()
        self._engine.tell_listeners_of_removals()
        return self._engine.events.subscribe(listener)

    def close(self, *, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Write what is in memory down to SSD, for at most `deadline_s`, and give everything back.

        Leases that are still open raise `PoolClosedError` from now on. An operation in flight ends first. A disk that
        does not answer is left behind after some seconds more. Calling it again does nothing.
        """
        with self._close_lock:
            if not self._closed:
                self._engine.gate.shut()
                self._close(deadline_s)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        engine = self._engine
        if engine.gpu is not None:
            engine.gpu.store.open()
        self._roster.start()
        if engine.remote is not None:  # before what lies on SSD is believed: who was erased meanwhile?
            engine.remote.connect()
        if engine.catalog is not None:
            engine.catalog.start(self.config.prices)
        if engine.prompts is not None:
            engine.prompts.start()
        if engine.prefetcher is not None:
            engine.prefetcher.start()
        tier = engine.store.open() if engine.epoch_sync.trusted else None
        if tier is not None:
            use_tier(engine, tier)
        if not engine.tenants.epochs.trusted:
            distrust(engine.tenants.epochs)
        discard_history(self._directory.history)
        for notice in self.notices:
            _log.warning("%s", notice)
        self._memory_keeper.start([*self._chores.in_memory(), self._outages.note])
        self._disk_keeper.start(self._chores.on_disk())
        engine.index.on_overdue = self._memory_keeper.wake
        engine.ram_encoder.wake = self._encoder.wake
        self._encoder.start([engine.ram_encoder.run])
        if engine.gpu is not None:
            engine.gpu.capacity_changed = self._roster.note_gpu_capacity
            engine.gpu.store.wake = self._gpu_keeper.wake
            self._gpu_keeper.start(engine.gpu.chores())
        if engine.remote is not None:
            engine.remote.eraser.wake = self._remote_keeper.wake
            self._remote_keeper.start(self._chores.in_shared(engine.remote, self.models))

    def _close(self, deadline_s: float) -> None:
        """Whatever happens on the way, also Ctrl-C, everything below is given back."""
        engine = self._engine
        until_s = time.monotonic() + deadline_s + GRACE_S
        with ExitStack() as stack:
            stack.callback(self._note_closed)
            stack.callback(self._directory.close)
            stack.callback(self._roster.keep_rates)
            stack.callback(engine.ram.close)
            if engine.gpu is not None:
                stack.callback(engine.gpu.store.close)
            stack.callback(engine.events.close)
            stack.callback(_by, until_s, self._close_ssd)
            stack.callback(_by, until_s, lambda: save_history(self._directory.history, engine.index))
            stack.callback(_by, until_s, self._save_shared)
            if engine.remote is not None:
                stack.callback(engine.remote.close, until_s)
            if engine.catalog is not None:
                stack.callback(engine.catalog.close, self.models(), until_s)
            if engine.prompts is not None:
                stack.callback(engine.prompts.close, until_s)
            if engine.prefetcher is not None:
                stack.callback(engine.prefetcher.close, until_s)
            if engine.remote is not None:
                stack.callback(self._remote_keeper.close, until_s)
            stack.callback(engine.readers.close, until_s)
            stack.callback(engine.writer.close, until_s)
            stack.callback(self._disk_keeper.close, until_s)
            stack.callback(self._memory_keeper.close, until_s)
            stack.callback(self._encoder.close, until_s)
            stack.callback(self._gpu_keeper.close, until_s)
            engine.gate.wait_empty(GRACE_S)
            self._flush_to_close(deadline_s)

    def _flush_to_close(self, deadline_s: float) -> None:
        engine = self._engine
        engine.store.accept()
        until_s = time.monotonic() + deadline_s
        if deadline_s > 0 and engine.store.writable:
            engine.writer.want_everything()
            if not engine.writer.flush(deadline_s):
                _log.warning("closing: %d edges were not written to ssd in time", engine.writer.queued)
        if deadline_s > 0 and engine.remote is not None and not engine.remote.flush(until_s - time.monotonic()):
            _log.warning("closing: not all that is new was sent to the shared tiers in time")

    def _close_ssd(self) -> None:
        if self._engine.store.tier is not None:
            self._engine.store.tier.close()

    def _save_shared(self) -> None:
        if self._engine.store.tier is not None:  # else nothing that is shared outlives this process
            save_shared(self.directory, self._engine.index)

    def _note_adopted(self) -> None:
        """Epochs were raised elsewhere: what is older cannot be matched from now on."""
        tenants, index = self._engine.tenants, self._engine.index
        with tenants.lock:
            for model in self.models():
                model.forget_trees_unlocked()
            stale = trees_of(self._engine, lambda one: one.epoch < tenants.epochs.of(one.tenant))
            for tree in stale:
                index.erase(tree)
        catalog = self._engine.catalog
        if catalog is not None:
            for tenant in {tree.id.tenant for tree in stale}:
                catalog.tenant_was_erased(tenant, tenants.epochs.of(tenant))
        self._memory_keeper.wake()

    def _note_closed(self) -> None:
        self._closed = True

    def _apply(self, config: RuntimeConfig) -> None:
        engine = self._engine
        self._roster.check(config)
        if config.ssd is not None:
            engine.store.resize(config.ssd)
        self._roster.reconfigure(config)
        engine.settings = live_settings(config)
        if engine.remote is not None:
            engine.remote.reconfigure(config)
        engine.index.sharing = sharing_rules(config)
        engine.index.limit_bytes = config.ram.index_bytes
        if config.ram.capacity_bytes != engine.ram.capacity_bytes:
            self._chores.leaving = engine.ram.resize(config.ram.capacity_bytes)
            engine.ram.start_prefault()
        self.config = config
        self._memory_keeper.wake()
        self._disk_keeper.wake()


def _resolved(config: RuntimeConfig | KVCachePool | Path | str) -> RuntimeConfig:
    if isinstance(config, RuntimeConfig):
        return config
    return runtime_config(config) if isinstance(config, KVCachePool) else load_config(Path(config))


def _by(until_s: float, act: Callable[[], None]) -> None:
    """Run `act` on a thread of its own, and wait for it no longer than that: a stalled disk must not hold us up."""
    thread = threading.Thread(target=act, name="kvpool-close", daemon=True)
    thread.start()
    thread.join(max(0.1, until_s - time.monotonic()))
    if thread.is_alive():
        _log.warning("closing: the disk does not answer; it is left behind")

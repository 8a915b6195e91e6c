"""The models of an open pool: those that its directory remembers, those that this process uses, and their quotas."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from kvpool.api.codec import Codec
from kvpool.blocks.identity import Fingerprint, ModelIdentity
from kvpool.blocks.layout import PAGE_BYTES
from kvpool.codecs import check_available
from kvpool.config import RuntimeConfig
from kvpool.config.runtime import QuotaConfig, QuotaTier
from kvpool.errors import ConfigError, InputError
from kvpool.pool.burying import bury, trees_of
from kvpool.pool.engine import Engine
from kvpool.pool.explain import Explainer
from kvpool.pool.gpu_store import extent_bytes_of
from kvpool.pool.model import Model
from kvpool.pool.quotas import LEVEL_OF, check_guarantees, quotas_of
from kvpool.pool.registry import Registry, Terms
from kvpool.pool.remote.share import Limit
from kvpool.pool.results import ModelSpec, UnregisterReport
from kvpool.prefix.accounts import Quotas
from kvpool.prefix.history import Loss
from kvpool.prefix.node import GPU, RAM, SSD
from kvpool.tiers.tier import TierName

SHARED_TIERS: Final[tuple[QuotaTier, ...]] = ("dragonfly", "database")
_log = logging.getLogger(__name__)


class Roster:
    """Registers and unregisters. Safe from any thread."""

    def __init__(
        self, registry: Registry, engine: Engine, explainer: Explainer, config: RuntimeConfig, directory: Path
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._explainer = explainer
        self._config = config
        self._directory = directory
        self._models: dict[Fingerprint, Model] = {}
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        """Held by whoever changes quotas, from looking at what is registered until it is in force."""
        self._gpu_guaranteed = 0

    def start(self) -> None:
        """Take over what the directory remembers. Raises `ConfigError` where guarantees do not fit.

        Those that models were registered with are left out where they do not fit beside the configuration's.
        """
        for identity in self._registry.known():
            self._use_codecs(identity.fingerprint, self._registry.terms(identity.fingerprint).codecs)
        try:
            self._set_quotas(self._config)
        except ConfigError as error:
            self._set_quotas(self._config, {})
            _log.warning("quotas that models were registered with do not fit and are not in force: %s", error)

    def reconfigure(self, config: RuntimeConfig) -> None:
        """Take over the quotas and prefill rates of another configuration.

        Raises `ConfigError` where guarantees do not fit: nothing is changed then.
        """
        with self._changing:
            self._set_quotas(config)
            self._config = config
        rates = {model.name: model.prefill_tokens_per_second for model in config.models}
        for model in self.models():
            if model.name in rates:
                model.use_rate(rates[model.name])

    def register(self, spec: ModelSpec) -> Model:
        """As `Pool.register`."""
        identity = spec.identity
        self._check_layout(identity)
        terms = self._checked_terms(spec)
        with self._lock:
            known = self._models.get(identity.fingerprint)
        if known is not None and terms is None:
            return known
        with self._changing:
            if known is not None and terms is not None:
                self._check_that_codecs_stay(identity, terms)
            if terms is not None and terms.quotas:
                self._set_quotas(self._config, {**self._registry.quotas(), identity.name: terms.quotas})
            self._registry.remember(identity, terms)
            self._use_codecs(identity.fingerprint, self._registry.terms(identity.fingerprint).codecs)
            self._engine.wake()
            with self._lock:
                known = self._models.get(identity.fingerprint)
                return known or self._add_model(identity, spec.prefill_tokens_per_second)

    def unregister(self, name: str, fingerprint: Fingerprint | None) -> UnregisterReport:
        """As `Pool.unregister`."""
        engine = self._engine
        leaving = [
            identity.fingerprint
            for identity in self._known(name)
            if fingerprint is None or identity.fingerprint == fingerprint
        ]
        if not leaving:
            raise InputError(f"model {name!r} has no revision with fingerprint {(fingerprint or b'').hex()}")
        with self._changing, engine.burying:
            with engine.tenants.lock:
                self._take_out(leaving)
                for tree in trees_of(engine, lambda tree_id: tree_id.fingerprint in leaving):
                    engine.index.erase(tree, Loss.UNREGISTERED)
            for gone in leaving:
                engine.encodings.forget(gone)
            self._registry.save()
            self._set_quotas(self._config)
            buried = bury(engine, lambda tree: tree.id.fingerprint in leaving)
        return UnregisterReport(**buried._asdict())

    def _take_out(self, leaving: Sequence[Fingerprint]) -> None:
        """Nothing of these models can be entered any more. Call with the tenants' lock held."""
        with self._lock:
            models = [self._models.pop(gone) for gone in leaving if gone in self._models]
            self._registry.forget(leaving)
        for model in models:
            model.unregister()

    def model(self, name: str) -> Model:
        """As `Pool.model`."""
        identities = self._known(name)
        self._check_layout(identities[0])
        with self._lock:
            self._known(name)  # it may have been unregistered meanwhile
            known_model = self._models.get(identities[0].fingerprint)
            return known_model or self._add_model(identities[0], None)

    def models(self) -> list[Model]:
        """The models that this process uses."""
        with self._lock:
            return list(self._models.values())

    def keep_rates(self) -> None:
        """Have the next process know how fast models were measured to be."""
        measured = {model.identity.fingerprint: model.measured_rate for model in self.models()}
        self._registry.keep_rates({known: rate for known, rate in measured.items() if rate is not None})

    def forget_trees(self) -> None:
        """Have every model look its tenants' trees up anew: epochs may have been raised."""
        for model in self.models():
            model.forget_trees()

    def note_gpu_capacity(self) -> None:
        """Count guarantees in device memory against what is to be had there.

        Where that is less than is guaranteed, they are counted against all of it still: then memory is had first come,
        first served, by each model up to its guarantee.
        """
        engine, guaranteed = self._engine, self._gpu_guaranteed
        usable = 0 if engine.gpu is None else engine.gpu.store.usable_bytes
        with engine.index.lock:
            engine.index.ledger.capacities[GPU] = max(usable, guaranteed)
        if 0 < usable < guaranteed:
            _log.warning(
                "gpu tier: %d bytes are guaranteed, and the device has %d: first come, first served", guaranteed, usable
            )

    def _known(self, name: str) -> list[ModelIdentity]:
        """The revisions of a model, the one registered last first; at least one. Raises `InputError`."""
        identities = self._registry.by_name(name)
        if not identities:
            names = sorted({identity.name for identity in self._registry.known()})
            known = f"known are {', '.join(names)}" if names else "none was ever registered here"
            raise InputError(f"model {name!r} is not known to the pool in {self._directory}; {known}")
        return identities

    def _checked_terms(self, spec: ModelSpec) -> Terms | None:
        """What the model is to be registered with, what the spec leaves open as it was; None: all of it."""
        for tier in spec.quotas:
            has_none = {TierName.GPU: self._config.gpu is None, TierName.SSD: self._config.ssd is None}
            if tier not in LEVEL_OF or has_none.get(tier, False):
                raise InputError(f"model {spec.identity.name!r} has a quota for {tier}, which this pool does not keep")
        for tier, codec in spec.codecs.items():
            if tier not in (TierName.RAM, TierName.SSD):
                raise InputError(f"model {spec.identity.name!r} has codec {codec} for {tier}; choose it for ram or ssd")
        if not (spec.quotas or spec.codecs):
            return None
        if any(codec is not Codec.NONE for codec in spec.codecs.values()):
            check_available()
        known = self._registry.terms(spec.identity.fingerprint)
        return Terms(
            quotas=dict(spec.quotas) or known.quotas,
            codecs=dict(spec.codecs) or known.codecs,
            prefill_tokens_per_second=known.prefill_tokens_per_second,
        )

    def _check_that_codecs_stay(self, identity: ModelIdentity, terms: Terms) -> None:
        """Blocks that are encoded by now could not be served by other codecs."""
        codecs = self._registry.terms(identity.fingerprint).codecs
        if dict(terms.codecs) != dict(codecs):
            raise InputError(
                f"model {identity.name!r} is in use with codecs {dict(codecs) or 'of the tiers'}: unregister it first, "
                "or register it with others after the pool was opened anew"
            )

    def _use_codecs(self, fingerprint: Fingerprint, codecs: Mapping[TierName, Codec]) -> None:
        self._engine.encodings.use(fingerprint, {LEVEL_OF[tier]: codec for tier, codec in codecs.items()})

    def check(self, config: RuntimeConfig) -> None:
        """Raise `ConfigError` where the guarantees of a configuration do not fit."""
        self._checked_quotas(config, self._registry.quotas())

    def _checked_quotas(
        self, config: RuntimeConfig, registered: Mapping[str, Mapping[TierName, QuotaConfig]]
    ) -> Quotas:
        """All models' quotas. Raises `ConfigError` where guarantees do not fit."""
        quotas = quotas_of(config, registered)
        ssd_bytes = config.ssd.capacity_bytes if config.ssd else 0
        check_guarantees(
            quotas,
            RAM,
            capacity_bytes=config.ram.capacity_bytes,
            extent_bytes=self._engine.ram.slab.extent_bytes,
            path="models[].quotas.ram.guaranteed",
        )
        if config.ssd:
            check_guarantees(
                quotas, SSD, capacity_bytes=ssd_bytes, extent_bytes=PAGE_BYTES, path="models[].quotas.ssd.guaranteed"
            )
        if config.gpu:
            check_guarantees(
                quotas,
                GPU,
                capacity_bytes=config.gpu.capacity_bytes,
                extent_bytes=extent_bytes_of(config.gpu),
                path="models[].quotas.gpu.guaranteed",
            )
        return quotas

    def _set_quotas(
        self, config: RuntimeConfig, registered: Mapping[str, Mapping[TierName, QuotaConfig]] | None = None
    ) -> None:
        """Put quotas into force. Raises `ConfigError` where guarantees do not fit: nothing is changed then."""
        quotas = self._checked_quotas(config, self._registry.quotas() if registered is None else registered)
        self._gpu_guaranteed = sum(by_level[GPU].guaranteed for by_level in quotas.values() if GPU in by_level)
        ssd_bytes = config.ssd.capacity_bytes if config.ssd else 0
        self._engine.index.set_quotas(quotas, [self._gpu_guaranteed, config.ram.capacity_bytes, ssd_bytes])
        self.note_gpu_capacity()
        self._set_shared_limits(config)

    def _set_shared_limits(self, config: RuntimeConfig) -> None:
        """Put the limits of shared tiers into force, for all revisions of the models that have one."""
        if self._engine.remote is None:
            return
        identities = self._registry.known()
        limits: dict[TierName, dict[Fingerprint, Limit]] = {}
        for tier in SHARED_TIERS:
            named = {
                model.name: Limit(model.name, quota.limit_bytes)
                for model in config.models
                if (quota := model.quotas.get(tier)) is not None and quota.limit_bytes is not None
            }
            limits[TierName(tier)] = {one.fingerprint: named[one.name] for one in identities if one.name in named}
        self._engine.remote.set_limits(limits)

    def _add_model(self, identity: ModelIdentity, prefill_tokens_per_second: float | None) -> Model:
        if prefill_tokens_per_second is None:
            named = [model for model in self._config.models if model.name == identity.name]
            measured = self._registry.terms(identity.fingerprint).prefill_tokens_per_second
            prefill_tokens_per_second = measured or (named[0].prefill_tokens_per_second if named else None)
        model = Model(
            self._engine, identity, self._explainer, prefill_tokens_per_second=prefill_tokens_per_second
        )  # fmt: skip
        self._models[identity.fingerprint] = model
        self._set_shared_limits(self._config)
        if self._engine.catalog is not None:
            self._engine.catalog.model_is_used(identity)
        return model

    def _check_layout(self, identity: ModelIdentity) -> None:
        layout = identity.layout
        if layout.block_tokens != self._config.block_tokens:
            raise InputError(
                f"model {identity.name!r} has blocks of {layout.block_tokens} tokens; this pool's blockTokens is "
                f"{self._config.block_tokens}: make the layout with block_tokens={self._config.block_tokens}"
            )
        if layout.record_bytes > self._engine.ram.capacity_bytes:
            raise InputError(
                f"a block of model {identity.name!r} takes {layout.record_bytes} bytes; tiers.ram.capacity is "
                f"{self._engine.ram.capacity_bytes}: raise it, or lower blockTokens"
            )

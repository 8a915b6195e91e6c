"""The models that were ever registered in a pool's directory, so that `kvpool explain` and a restart know them by name.

`models.json` is `{"version": 2, "models": [...], "unregistered": [...]}`, least recently registered first. Each model
carries its fingerprint, which is checked when it is read: a file that was changed in any byte that matters is damaged.
Fingerprints that were unregistered are remembered, so that their records, which stay on SSD until their segment is
freed, are not taken up again by the next start.
"""

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvpool.api.codec import Codec
from kvpool.blocks.identity import Fingerprint, ModelIdentity
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.config.runtime import QuotaConfig
from kvpool.errors import IncompatibleDataError
from kvpool.pool.durable_file import replace_file
from kvpool.tiers.tier import TierName

MODELS_NAME = "models.json"
FORMAT_VERSION = 2
MAX_MODELS = 256
MAX_UNREGISTERED = 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a model was registered with beside its identity; and how fast it was measured to be."""

    quotas: Mapping[TierName, QuotaConfig] = field(default_factory=dict)
    codecs: Mapping[TierName, Codec] = field(default_factory=dict)
    prefill_tokens_per_second: float | None = None


class Registry:
    """At most `MAX_MODELS` identities; the one registered longest ago is forgotten first. Safe from any thread."""

    def __init__(
        self, path: Path, models: Iterable[tuple[ModelIdentity, Terms]], unregistered: Iterable[Fingerprint] = ()
    ) -> None:
        self._path = path
        self._models = {model.fingerprint: (model, terms) for model, terms in models}
        self._unregistered = dict.fromkeys(unregistered)
        self._gone: dict[Fingerprint, ModelIdentity] = {}
        self._saved = True
        self._lock = threading.Lock()

    @classmethod
    def load(cls, directory: Path) -> "Registry":
        """Read the directory's file; a damaged one is kept aside, and the registry starts empty.

        Raises `IncompatibleDataError` if a newer program wrote it, and `OSError`.
        """
        path = directory / MODELS_NAME
        try:
            return cls(path, *_parsed(path.read_bytes()))
        except FileNotFoundError:
            return cls(path, [])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            _log.warning("%s is damaged (%s); kept as %s, no model is known", path, error, aside.name)
            return cls(path, [])

    def remember(self, identity: ModelIdentity, terms: Terms | None = None) -> None:
        """Make `identity` the most recent one, durably; `terms` None keeps those that it had.

        A disk that cannot keep it is logged, not raised: the model is known to this process all the same.
        """
        with self._lock:
            known = self._models.get(identity.fingerprint)
            entry = (identity, terms or (known[1] if known else Terms()))
            is_newest = next(reversed(self._models), None) == identity.fingerprint
            if self._saved and is_newest and known == entry:
                return
            self._models.pop(identity.fingerprint, None)
            self._unregistered.pop(identity.fingerprint, None)
            self._models[identity.fingerprint] = entry
            while len(self._models) > MAX_MODELS:
                self._note_gone(self._models.pop(next(iter(self._models))))
            self._save()

    def forget(self, fingerprints: Iterable[Fingerprint]) -> None:
        """These models were unregistered; durable after `save`."""
        with self._lock:
            for fingerprint in fingerprints:
                self._note_gone(self._models.pop(fingerprint, None))
                self._unregistered.pop(fingerprint, None)
                self._unregistered[fingerprint] = None
            while len(self._unregistered) > MAX_UNREGISTERED:
                del self._unregistered[next(iter(self._unregistered))]

    def save(self) -> None:
        """Write the file, as far as the disk allows."""
        with self._lock:
            self._save()

    def keep_rates(self, rates: Mapping[Fingerprint, float]) -> None:
        """Keep how fast models were measured to be, in tokens per second, for the next process."""
        with self._lock:
            for fingerprint, rate in rates.items():
                if (known := self._models.get(fingerprint)) is not None:
                    identity, terms = known
                    kept = Terms(quotas=terms.quotas, codecs=terms.codecs, prefill_tokens_per_second=rate)
                    self._models[fingerprint] = (identity, kept)
            if rates:
                self._save()

    def known(self) -> list[ModelIdentity]:
        """Every model, most recently registered first."""
        with self._lock:
            return [identity for identity, _ in reversed(self._models.values())]

    def identity(self, fingerprint: Fingerprint) -> ModelIdentity | None:
        """The model of this fingerprint; of one that was forgotten by this process too, for it may be in use still."""
        known = self._models.get(fingerprint)
        return known[0] if known else self._gone.get(fingerprint)

    def is_known_name(self, name: str) -> bool:
        """Whether a model of this name is registered. The empty name stands for models that are not known."""
        with self._lock:
            return not name or any(identity.name == name for identity, _ in self._models.values())

    def terms(self, fingerprint: Fingerprint) -> Terms:
        """What the model was registered with last."""
        known = self._models.get(fingerprint)
        return known[1] if known else Terms()

    def quotas(self) -> dict[str, Mapping[TierName, QuotaConfig]]:
        """By the model's name: those of the revision registered last that has any."""
        with self._lock:
            return {identity.name: terms.quotas for identity, terms in self._models.values() if terms.quotas}

    def is_unregistered(self, fingerprint: Fingerprint) -> bool:
        """Whether the model was unregistered, and not registered again since."""
        return fingerprint in self._unregistered

    def by_name(self, name: str) -> list[ModelIdentity]:
        """The models of that name (other weights, layouts, ranks), most recently registered first."""
        return [model for model in self.known() if model.name == name]

    def _note_gone(self, known: tuple[ModelIdentity, Terms] | None) -> None:
        """What is leased of a forgotten model is read still, and needs its layout."""
        if known is not None:
            self._gone[known[0].fingerprint] = known[0]
            while len(self._gone) > MAX_MODELS:
                del self._gone[next(iter(self._gone))]

    def _save(self) -> None:
        content = {
            "version": FORMAT_VERSION,
            "models": [_plain(identity, terms) for identity, terms in self._models.values()],
            "unregistered": [fingerprint.hex() for fingerprint in self._unregistered],
        }
        try:
            replace_file(self._path, (json.dumps(content, indent=1) + "\n").encode())
            self._saved = True
        except OSError as error:
            self._saved = False
            _log.warning("%s cannot be written (%s); the next start does not know its newest model", self._path, error)


def _plain(model: ModelIdentity, terms: Terms) -> dict[str, Any]:
    return {
        **asdict(model),
        "generation": model.generation.hex(),
        "fingerprint": model.fingerprint.hex(),
        "terms": {
            "quotas": {tier: [quota.guaranteed_bytes, quota.limit_bytes] for tier, quota in terms.quotas.items()},
            "codecs": dict(terms.codecs),
            "prefill_tokens_per_second": terms.prefill_tokens_per_second,
        },
    }


def _parsed(text: bytes) -> tuple[list[tuple[ModelIdentity, Terms]], list[Fingerprint]]:
    content = json.loads(text)
    version = content["version"]
    if version > FORMAT_VERSION:
        raise IncompatibleDataError(
            f"{MODELS_NAME} has format {version}; this kvpool reads up to format {FORMAT_VERSION}: use a newer one"
        )
    unregistered = [Fingerprint(bytes.fromhex(text)) for text in content.get("unregistered", [])]
    models = [(_identity(**fields), _terms(**terms)) for terms, fields in map(_split, content["models"])]
    return models, unregistered


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's terms, which format 1 does not have, and the rest."""
    rest = dict(fields)
    return rest.pop("terms", {}), rest


def _terms(
    *,
    quotas: Mapping[str, tuple[int, int | None]] | None = None,
    codecs: Mapping[str, str] | None = None,
    prefill_tokens_per_second: float | None = None,
) -> Terms:
    if prefill_tokens_per_second is not None and not prefill_tokens_per_second > 0:
        raise ValueError("a prefill rate is above 0")
    return Terms(
        quotas={
            TierName(tier): QuotaConfig(guaranteed_bytes=guaranteed, limit_bytes=limit)
            for tier, (guaranteed, limit) in (quotas or {}).items()
        },
        codecs={TierName(tier): Codec(name) for tier, name in (codecs or {}).items()},
        prefill_tokens_per_second=prefill_tokens_per_second,
    )


def _identity(*, layout: dict[str, Any], generation: str, fingerprint: str, **fields: Any) -> ModelIdentity:
    layout = {**layout, "dtype": Dtype(layout["dtype"])}
    identity = ModelIdentity(layout=KVLayout(**layout), generation=bytes.fromhex(generation), **fields)
    if identity.fingerprint.hex() != fingerprint:
        raise ValueError(f"the fingerprint of {identity.name!r} does not match its fields")
    return identity

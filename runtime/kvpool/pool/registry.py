"""The models that were ever registered in a pool's directory, so that `kvpool explain` and a restart know them by name.

`models.json` is `{"version": 1, "models": [...]}`, least recently registered first. Each model carries its fingerprint,
which is checked when it is read: a file that was changed in any byte that matters is damaged.
"""

import json
import logging
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpool.blocks.identity import ModelIdentity
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.errors import IncompatibleDataError
from kvpool.pool.durable_file import replace_file

MODELS_NAME = "models.json"
FORMAT_VERSION = 1
MAX_MODELS = 256
_log = logging.getLogger(__name__)


class Registry:
    """At most `MAX_MODELS` identities; the one registered longest ago is forgotten first. Safe from any thread."""

    def __init__(self, path: Path, models: list[ModelIdentity]) -> None:
        self._path = path
        self._models = {model.fingerprint: model for model in models}
        self._saved = True
        self._lock = threading.Lock()

    @classmethod
    def load(cls, directory: Path) -> "Registry":
        """Read the directory's file; a damaged one is kept aside, and the registry starts empty.

        Raises `IncompatibleDataError` if a newer program wrote it, and `OSError`.
        """
        path = directory / MODELS_NAME
        try:
            return cls(path, _parsed(path.read_bytes()))
        except FileNotFoundError:
            return cls(path, [])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            _log.warning("%s is damaged (%s); kept as %s, no model is known", path, error, aside.name)
            return cls(path, [])

    def remember(self, identity: ModelIdentity) -> None:
        """Make `identity` the most recent one, durably.

        A disk that cannot keep it is logged, not raised: the model is known to this process all the same.
        """
        with self._lock:
            if self._saved and next(reversed(self._models), None) == identity.fingerprint:
                return
            self._models.pop(identity.fingerprint, None)
            self._models[identity.fingerprint] = identity
            while len(self._models) > MAX_MODELS:
                del self._models[next(iter(self._models))]
            self._save()

    def known(self) -> list[ModelIdentity]:
        """Every model, most recently registered first."""
        with self._lock:
            return list(reversed(self._models.values()))

    def by_name(self, name: str) -> list[ModelIdentity]:
        """The models of that name (other weights, layouts, ranks), most recently registered first."""
        return [model for model in self.known() if model.name == name]

    def _save(self) -> None:
        content = {"version": FORMAT_VERSION, "models": [_plain(model) for model in self._models.values()]}
        try:
            replace_file(self._path, (json.dumps(content, indent=1) + "\n").encode())
            self._saved = True
        except OSError as error:
            self._saved = False
            _log.warning("%s cannot be written (%s); the next start does not know its newest model", self._path, error)


def _plain(model: ModelIdentity) -> dict[str, Any]:
    fields = asdict(model)
    return {**fields, "generation": model.generation.hex(), "fingerprint": model.fingerprint.hex()}


def _parsed(text: bytes) -> list[ModelIdentity]:
    content = json.loads(text)
    version = content["version"]
    if version > FORMAT_VERSION:
        raise IncompatibleDataError(
            f"{MODELS_NAME} has format {version}; this kvpool reads up to format {FORMAT_VERSION}: use a newer one"
        )
    return [_identity(**fields) for fields in content["models"]]


def _identity(*, layout: dict[str, Any], generation: str, fingerprint: str, **fields: Any) -> ModelIdentity:
    layout = {**layout, "dtype": Dtype(layout["dtype"])}
    identity = ModelIdentity(layout=KVLayout(**layout), generation=bytes.fromhex(generation), **fields)
    if identity.fingerprint.hex() != fingerprint:
        raise ValueError(f"the fingerprint of {identity.name!r} does not match its fields")
    return identity

"""Changes what people note about models, blocks and prompts: a version against a version, so that none is lost.

The last versions that were replaced are kept, of models and prompts.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import psycopg

from kvpool.blocks.identity import BlockKey, Fingerprint
from kvpool.catalog.statement import Statement
from kvpool.errors import InputError, KvpoolError

Connection: TypeAlias = psycopg.Connection[Any]

KEPT_VERSIONS = 10
MAX_BYTES = 64 << 10


class LostRaceError(KvpoolError):
    """Somebody else changed the metadata meanwhile; read it again, and decide anew. `found` None: it is gone."""

    def __init__(self, expected: int, found: int | None) -> None:
        now = "it is gone" if found is None else f"it has version {found} now"
        super().__init__(f"the metadata was read as version {expected}, and {now}")
        self.found = found


_MODEL = Statement("""
    update kvpool.models set metadata = %(metadata)s::jsonb, version = version + 1, updated_at = now()
    where fingerprint = %(id)b and version = %(version)s returning version
""")
_MODELS_BEFORE = Statement("""
    insert into kvpool.model_history (fingerprint, version, metadata)
    select fingerprint, version, metadata from kvpool.models
    where fingerprint = %(id)b and version = %(version)s for update
""")
_MODELS_OLDEST = Statement("""
    delete from kvpool.model_history where fingerprint = %(id)b and version <= %(version)s - %(kept)s
""")
_MODELS_VERSION = Statement("select version from kvpool.models where fingerprint = %(id)b")

_PROMPT = Statement("""
    update kvpool.prompts set metadata = %(metadata)s::jsonb, version = version + 1
    where id = %(id)s and version = %(version)s returning version
""")
_PROMPTS_BEFORE = Statement("""
    insert into kvpool.prompt_history (prompt, version, metadata)
    select id, version, metadata from kvpool.prompts where id = %(id)s and version = %(version)s for update
""")
_PROMPTS_OLDEST = Statement("""
    delete from kvpool.prompt_history where prompt = %(id)s and version <= %(version)s - %(kept)s
""")
_PROMPTS_VERSION = Statement("select version from kvpool.prompts where id = %(id)s")

_BLOCK = Statement("""
    update kvpool.blocks set metadata = %(metadata)s::jsonb, version = version + 1
    where key = %(id)b and version = %(version)s returning version
""")
_BLOCKS_VERSION = Statement("select version from kvpool.blocks where key = %(id)b")


def describe_model(connection: Connection, model: Fingerprint, metadata: Mapping[str, Any], version: int) -> int:
    """Replace a model's metadata, which was read as `version`; its new version. Raises `LostRaceError`."""
    parameters = _parameters(model, metadata, version)
    with connection.transaction():
        connection.execute(_MODELS_BEFORE, parameters)
        new = _changed(connection, _MODEL, _MODELS_VERSION, parameters)
        connection.execute(_MODELS_OLDEST, parameters)
    return new


def describe_prompt(connection: Connection, prompt: int, metadata: Mapping[str, Any], version: int) -> int:
    """Replace the metadata of the prompt of this id, which was read as `version`. Raises `LostRaceError`."""
    parameters = _parameters(prompt, metadata, version)
    with connection.transaction():
        connection.execute(_PROMPTS_BEFORE, parameters)
        new = _changed(connection, _PROMPT, _PROMPTS_VERSION, parameters)
        connection.execute(_PROMPTS_OLDEST, parameters)
    return new


def describe_block(connection: Connection, key: BlockKey, metadata: Mapping[str, Any], version: int) -> int:
    """Replace a block's metadata, which was read as `version`; no history is kept. Raises `LostRaceError`."""
    return _changed(connection, _BLOCK, _BLOCKS_VERSION, _parameters(key, metadata, version))


def _changed(connection: Connection, change: Statement, look: Statement, parameters: dict[str, Any]) -> int:
    row = connection.execute(change, parameters).fetchone()
    if row is None:
        found = connection.execute(look, parameters).fetchone()
        raise LostRaceError(parameters["version"], None if found is None else found[0])
    new: int = row[0]
    return new


def _parameters(of: Any, metadata: Mapping[str, Any], version: int) -> dict[str, Any]:
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata can hold only what JSON can: {error}") from None
    if len(text) > MAX_BYTES:
        raise InputError(f"metadata has {len(text)} bytes as JSON; at most {MAX_BYTES}")
    return {"id": of, "metadata": text, "version": version, "kept": KEPT_VERSIONS}

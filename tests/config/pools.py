"""Pools for the tests of the configuration, as objects and as files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpool.api import KVCachePool

HEADER = "apiVersion: kvpool.dev/v1alpha1\nkind: KVCachePool\nmetadata: {name: chat}\n"
"""Three lines, so that `spec:` after it stands in line 4."""


def pool(spec: Mapping[str, Any]) -> KVCachePool:
    """The pool of this spec."""
    content = {"apiVersion": "kvpool.dev/v1alpha1", "kind": "KVCachePool", "metadata": {"name": "chat"}, "spec": spec}
    return KVCachePool.model_validate(content, by_alias=True, by_name=False)


def written(directory: Path, text: str, name: str = "pool.yaml") -> Path:
    """A file of this text."""
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file

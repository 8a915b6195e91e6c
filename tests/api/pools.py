"""Pools for the tests of the specification, written as YAML writes them."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kvpool.api import KVCachePool


def pool(spec: Mapping[str, Any] | None = None, name: str = "test") -> KVCachePool:
    """The pool of this spec."""
    return KVCachePool.model_validate(document(spec, name), by_alias=True, by_name=False)


def document(spec: Mapping[str, Any] | None = None, name: str = "test") -> dict[str, Any]:
    """The same as the content of a file."""
    content: dict[str, Any] = {"apiVersion": "kvpool.dev/v1alpha1", "kind": "KVCachePool", "metadata": {"name": name}}
    return content if spec is None else {**content, "spec": spec}


def refused(spec: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with this spec: path below spec -> message. Empty when nothing is."""
    try:
        pool(spec)
    except ValidationError as error:
        return {".".join(map(str, details["loc"][1:])): details["msg"] for details in error.errors()}
    return {}

"""Points and hits as payloads of the collection, whose layout is in `layout`."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvpool.blocks.identity import KEY_BYTES, BlockKey, TreeId
from kvpool.catalog.embedding.encoder import Vector
from kvpool.catalog.vectors.contract import MAX_FOLLOWERS, Hit, Point
from kvpool.catalog.vectors.layout import AT, BLOCKS, EPOCH, LEAF, MODEL, NEXT, SIZE, TENANT, TOKENS, TREE
from kvpool.errors import InputError


def checked(vector: Vector) -> Vector:
    """The vector, if the collection can hold it. Raises `InputError`: an encoder makes something else."""
    if vector.shape != (SIZE,) or not np.isfinite(vector).all():
        raise InputError(f"a prompt's vector has shape {vector.shape}; it must have {SIZE} finite numbers")
    return vector


def payload_of(point: Point) -> dict[str, str | int | list[str]]:
    """What is kept beside the vector."""
    return {
        TREE: tree_digest(point.tree),
        **_tree_fields(point.tree),
        AT: point.at_ms,
        LEAF: point.leaf.hex(),
        BLOCKS: point.blocks,
        TOKENS: point.tokens,
        NEXT: [leaf.hex() for leaf in point.followers[:MAX_FOLLOWERS]],
    }


def tree_digest(tree: TreeId) -> str:
    """The value of the field that every search asks for."""
    whole = tree.fingerprint + tree.tenant + tree.epoch.to_bytes(8, "little")
    return hashlib.blake2b(whole, digest_size=16, person=b"kvpool-tree-1").hexdigest()


def _tree_fields(tree: TreeId) -> dict[str, str | int]:
    return {MODEL: tree.fingerprint.hex(), TENANT: tree.tenant.hex(), EPOCH: tree.epoch}


def hit_of(score: float, payload: Mapping[str, Any] | None, tree: TreeId) -> Hit | None:
    """What a search found; None for what is not ours, or not of this tree, whoever says that it matches."""
    said = payload or {}
    if any(said.get(name) != value for name, value in _tree_fields(tree).items()):
        return None
    try:
        followers = tuple(_key(text) for text in said[NEXT][:MAX_FOLLOWERS])
        return Hit(score, _key(said[LEAF]), int(said[BLOCKS]), int(said[TOKENS]), int(said[AT]), followers)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _key(text: str) -> BlockKey:
    key = bytes.fromhex(text)
    if len(key) != KEY_BYTES:
        raise ValueError("no key of a block")
    return BlockKey(key)

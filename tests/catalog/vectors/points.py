"""Points for tests: every one follows from its number and its tree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.embedding import DIMENSIONS, Vector
from kvpool.catalog.vectors.contract import Point, point_id

VECTORS_S = 30.0
"""For a process that keeps vectors to start, to end, or to build its graph."""


def tree_of(model: int = 0, tenant: int = 0, epoch: int = 0) -> TreeId:
    return TreeId(Fingerprint(bytes([model]) * 32), TenantDigest(bytes([tenant]) * 16), epoch)


TREE = tree_of()


def vector_of(number: int) -> Vector:
    return _of_length_1(np.random.default_rng(number).standard_normal(DIMENSIONS))


def near(vector: Vector, number: int, distance: float = 0.1) -> Vector:
    """A vector that is close to this one; another for another number."""
    return _of_length_1(vector + distance * vector_of(1_000_000 + number))


def _of_length_1(values: npt.NDArray[np.floating]) -> Vector:
    return np.asarray(values / np.linalg.norm(values), np.float32)


def leaf_of(number: int, tree: TreeId = TREE) -> BlockKey:
    return BlockKey(hashlib.blake2b(repr((number, tree)).encode(), digest_size=16).digest())


def point(number: int, tree: TreeId = TREE, *, vector: Vector | None = None, at_ms: int | None = None) -> Point:
    leaf = leaf_of(number, tree)
    return Point(
        id=point_id(leaf),
        vector=vector_of(number) if vector is None else vector,
        tree=tree,
        leaf=leaf,
        blocks=number + 1,
        tokens=64 * number + 70,
        at_ms=1_700_000_000_000 + number if at_ms is None else at_ms,
        followers=tuple(leaf_of(number + after, tree) for after in range(1, 1 + number % 3)),
    )


def points(numbers: Sequence[int], tree: TreeId = TREE) -> list[Point]:
    return [point(number, tree) for number in numbers]

"""What turns a prompt into a vector. A sentence encoder can take the place of the one that we ship."""

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]
"""`DIMENSIONS` finite float32 of length 1, or all zero for a prompt that says nothing."""

DIMENSIONS = 512
"""Of every encoder, for the collection of vectors is made for so many."""


class PromptEncoder(Protocol):
    """Deterministic: equal tokens give equal vectors, in every process that shares a collection. Any thread may call.

    Vectors of one encoder say nothing beside those of another: a collection has one encoder.
    """

    def encode(self, tokens: bytes) -> Vector:
        """The vector of a prompt, as int32 token ids. The dot product of two is their cosine similarity."""
        ...

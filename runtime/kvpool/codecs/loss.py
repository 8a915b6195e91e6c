"""Why a payload is not encoded."""

from enum import StrEnum


class Loss(StrEnum):
    """What would be lost. The block is stored as `none` then; also the label of its counter."""

    NOT_FINITE = "not-finite"
    """It holds an infinity, or what is no number."""
    OUT_OF_RANGE = "out-of-range"
    """It holds a finite value, or a range of values, that the encoded type cannot hold."""

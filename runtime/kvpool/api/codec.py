"""The names of the codecs, as a tier's `codec` takes them."""

from enum import StrEnum


class Codec(StrEnum):
    """How a block's payload is encoded."""

    NONE = "none"
    FP16 = "fp16"
    INT8_SYMMETRIC = "int8-symmetric"
    INT8_ASYMMETRIC = "int8-asymmetric"
    INT4_ASYMMETRIC = "int4-asymmetric"

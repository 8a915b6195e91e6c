"""Kubernetes quantities (`16Gi`, `1.5G`, `500m`, `1e3`), read and printed exactly as Kubernetes does.

The grammar and the canonical form are those of k8s.io/apimachinery/pkg/api/resource. One thing differs: what
Kubernetes would round or cap (finer than 1n, above 2^63-1) is refused here, for nobody asked for another number.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

MOST = (1 << 63) - 1
"""The largest number that Kubernetes keeps in a quantity."""
NANO = 10**9
_MAX_CHARACTERS = 64
_MAX_EXPONENT = 60
_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?"
_QUANTITY = re.compile(rf"([+-]?){_NUMBER}")
NOT_NEGATIVE = "^[+]?" + _NUMBER.replace("(?:", "(") + "$"
"""The pattern of a quantity without a minus, in the dialect of JSON schema."""
_DECIMAL = {-9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_EXPONENT_OF = {suffix: exponent for exponent, suffix in _DECIMAL.items()}
_WHAT_IT_IS = "a number with an optional suffix, such as 512Mi, 16Gi, 1.5G or 1048576"


class Notation(StrEnum):
    """How a quantity was written, and so how it is printed."""

    DECIMAL = "decimal"
    BINARY = "binary"
    EXPONENT = "exponent"


@dataclass(frozen=True, slots=True, order=True)
class Quantity:
    """An exact number in units of 10^-9. Two are equal when their numbers are, however they were written."""

    nano: int
    notation: Notation = field(default=Notation.DECIMAL, compare=False)

    @classmethod
    def parse(cls, text: str) -> "Quantity":
        """Read a quantity. Raises `ValueError` that says what one looks like."""
        match = _QUANTITY.fullmatch(text) if len(text) <= _MAX_CHARACTERS else None
        if match is None:
            raise ValueError(f"must be {_WHAT_IT_IS}")
        sign, digits, suffix = match[1], match[2], match[3] or ""
        whole, _, fraction = digits.partition(".")
        mantissa = int(whole + fraction)
        scale, exponent, notation = _scale(suffix)
        power = exponent + 9 - len(fraction)
        if mantissa == 0:
            return cls(0, notation)
        if abs(power) > _MAX_EXPONENT + 9 + _MAX_CHARACTERS:
            raise ValueError("must be at most 2^63-1, and no finer than 1n")
        nano, rest = divmod(mantissa * scale * 10 ** max(power, 0), 10 ** max(-power, 0))
        if rest or nano > MOST * NANO:
            raise ValueError("must be at most 2^63-1, and no finer than 1n")
        return cls(-nano if sign == "-" else nano, notation)

    @classmethod
    def of_bytes(cls, nbytes: int) -> "Quantity":
        """A whole number of bytes, printed with a binary suffix where one fits."""
        return cls(nbytes * NANO, Notation.BINARY)

    @property
    def is_whole(self) -> bool:
        """Whether it is an integer."""
        return self.nano % NANO == 0

    @property
    def value(self) -> int:
        """The integer that it is. Raises `ValueError` where it is none."""
        if not self.is_whole:
            raise ValueError(f"{self} is not a whole number")
        return self.nano // NANO

    def __str__(self) -> str:
        """The canonical form: nothing lost, no fraction, the largest suffix of the notation that allows it."""
        if self.notation is Notation.BINARY and self.is_whole and abs(self.nano) >= 1024 * NANO:
            number, power = self.value, 0
            while number % 1024 == 0 and power < len(_BINARY) - 1:
                number, power = number // 1024, power + 1
            return f"{number}{_BINARY[power]}"
        number, exponent = self.nano, -9
        while number and number % 1000 == 0 and exponent < 18:
            number, exponent = number // 1000, exponent + 3
        if number == 0 or exponent == 0:
            return str(number)
        return f"{number}e{exponent}" if self.notation is Notation.EXPONENT else f"{number}{_DECIMAL[exponent]}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _validated,
            serialization=core_schema.plain_serializer_function_ser_schema(str, return_schema=core_schema.str_schema()),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": "^[+-]?" + _NUMBER.replace("(?:", "(") + "$",
        }


def _scale(suffix: str) -> tuple[int, int, Notation]:
    """What a suffix multiplies by: an integer, and a power of ten."""
    if suffix in _BINARY[1:]:
        return 1024 ** _BINARY.index(suffix), 0, Notation.BINARY
    if suffix in _EXPONENT_OF:
        return 1, _EXPONENT_OF[suffix], Notation.DECIMAL
    return 1, int(suffix[1:]), Notation.EXPONENT


def _validated(value: object) -> Quantity:
    if isinstance(value, Quantity):
        return value
    # A YAML number is read as Kubernetes reads a JSON number: by its digits.
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return Quantity.parse(str(value))
    raise ValueError(f"must be {_WHAT_IT_IS}")

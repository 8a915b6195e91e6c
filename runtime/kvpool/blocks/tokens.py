"""Token ids as the engine keeps them: little-endian int32 in one bytes object.

The bytes form costs nothing, so an adapter keeps it per request and extends it; lists and arrays are converted here.
"""

import sys
from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

from kvpool.errors import InputError

Tokens: TypeAlias = "bytes | bytearray | memoryview | Sequence[int] | Any"
"""int32 bytes, a list of ints, an `array`, or a one-dimensional numpy or torch array of integers."""

INT32_MAX = 2**31 - 1


def token_bytes(tokens: Tokens) -> bytes:
    """Return `tokens` as int32 bytes, or raise `InputError` naming the first id that is none."""
    if type(tokens) is bytes:
        packed = tokens
    elif isinstance(tokens, bytearray) or (isinstance(tokens, memoryview) and tokens.format == "B"):
        packed = bytes(tokens)
    elif isinstance(tokens, list | tuple):
        packed = _pack(tokens)
    elif isinstance(tokens, array) and tokens.typecode == "i":
        packed = tokens.tobytes()
    else:
        packed = _pack_array(tokens)
    if len(packed) % 4:
        raise InputError(f"tokens as bytes are int32: {len(packed)} bytes are not a multiple of 4")
    return packed


def _pack(tokens: Sequence[int]) -> bytes:
    try:
        return array("i", tokens).tobytes()
    except (OverflowError, TypeError) as error:
        raise InputError(f"tokens{_first_bad(tokens)} is no int32 token id ({error})") from None


def _pack_array(tokens: Any) -> bytes:
    """Arrays are read through their own `tolist` unless they are int32 already, so neither numpy nor torch is needed."""
    if getattr(tokens, "ndim", 1) != 1:
        raise InputError(f"tokens have {tokens.ndim} dimensions; they must be one sequence of ids")
    dtype = str(getattr(tokens, "dtype", ""))
    if dtype == "int32" and hasattr(tokens, "tobytes"):
        return bytes(tokens.tobytes())
    if dtype == "int64" and hasattr(tokens, "astype"):
        low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if low >= -INT32_MAX - 1 and high <= INT32_MAX:
            return bytes(tokens.astype("int32").tobytes())
    values = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    return _pack(values)


def _first_bad(tokens: Sequence[int]) -> str:
    for index, token in enumerate(tokens):
        if type(token) is not int or not -INT32_MAX - 1 <= token <= INT32_MAX:
            return f"[{index}] = {str(token)[:40]}"
    return ""


if sys.byteorder != "little" or array("i").itemsize != 4:  # pragma: no cover - no such machine runs LLM inference
    raise ImportError("kvpool keeps token ids as little-endian int32, which this machine's arrays are not")

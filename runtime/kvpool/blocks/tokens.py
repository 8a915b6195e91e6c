"""Token ids as the engine keeps them: little-endian int32 in one bytes object.

The bytes form costs nothing, so an adapter keeps it per request and extends it; lists and arrays are converted here.
Neither numpy nor torch is imported: their arrays are used through their own methods.
"""

import sys
from array import array
from collections.abc import Sequence
from operator import index as as_int
from typing import Any, TypeAlias

from kvpool.errors import InputError

Tokens: TypeAlias = "bytes | bytearray | memoryview | Sequence[int] | Any"
"""int32 bytes, a list of ints, an `array`, or a one-dimensional numpy or torch array of integers."""

INT32_MAX = 2**31 - 1


def token_bytes(tokens: Tokens) -> bytes:
    """Return `tokens` as int32 bytes, or raise `InputError` naming the first id that is none.

    Floats and booleans are no token ids, even where they are whole; of a list, the first item says if it is a mask.
    """
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
        if tokens and type(tokens[0]) is bool:
            raise TypeError("it is a boolean: is this a mask?")
        return array("i", tokens).tobytes()
    except (OverflowError, TypeError) as error:
        raise InputError(f"tokens{_first_bad(tokens)} is no int32 token id ({error})") from None


def _pack_array(tokens: Any) -> bytes:
    if getattr(tokens, "ndim", 1) != 1:
        raise InputError(f"tokens have {tokens.ndim} dimensions; they must be one sequence of ids")
    dtype = str(getattr(tokens, "dtype", ""))
    if dtype in ("torch.int32", "torch.int64"):
        return _pack_array(tokens.detach().cpu().numpy())
    if dtype == "int32" and hasattr(tokens, "tobytes"):
        return bytes(tokens.tobytes())
    if dtype == "int64" and hasattr(tokens, "astype") and _all_int32(tokens):
        return bytes(tokens.astype("int32").tobytes())
    try:
        values = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    except TypeError:
        raise InputError(f"tokens are {type(tokens).__name__}; they must be a sequence of ids") from None
    return _pack(values)


def _all_int32(tokens: Any) -> bool:
    return len(tokens) > 0 and tokens.min() >= -INT32_MAX - 1 and tokens.max() <= INT32_MAX


def _first_bad(tokens: Sequence[Any]) -> str:
    for index, token in enumerate(tokens):
        try:
            bad = type(token) is bool or not -INT32_MAX - 1 <= as_int(token) <= INT32_MAX
        except TypeError:
            bad = True
        if bad:
            return f"[{index}] = {str(token)[:40]}"
    return ""


if sys.byteorder != "little" or array("i").itemsize != 4:  # pragma: no cover - no such machine runs LLM inference
    raise ImportError("kvpool keeps token ids as little-endian int32, which this machine's arrays are not")

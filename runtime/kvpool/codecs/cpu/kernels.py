"""Calls of the compiled kernels on numpy arrays. ctypes releases the GIL while one runs."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpool.blocks.layout import Dtype
from kvpool.codecs.format import PlaneFormat, QuantizedFormat
from kvpool.codecs.loss import Loss

if TYPE_CHECKING:
    from kvpool.blocks.record import Buffer
    from kvpool.codecs.limits import Floats

LIBRARY = "libkvpool_codecs.so"
_TYPES = {Dtype.FLOAT32: "f32", Dtype.FLOAT16: "f16", Dtype.BFLOAT16: "bf16"}
_NOT_FINITE, _OUT_OF_RANGE, _NO_MEMORY = 1, 2, 4


class _Plane(ctypes.Structure):
    """`plane_t` of `kernels.c`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("layers", "layer_elements", "first_element", "a", "b", "c", "code_bytes", "levels", "symmetric")
    )


@cache
def kernels() -> Kernels | None:
    """The kernels, or None where they were not compiled, or were from other sources than those beside them."""
    place = Path(__file__).with_name(LIBRARY)
    try:
        library = ctypes.CDLL(str(place))
    except OSError:
        return None
    library.kvpool_sources.restype = ctypes.c_char_p
    return Kernels(library) if library.kvpool_sources().decode() == _digest(place.parent) else None


def _digest(sources: Path) -> str:
    text = b"".join(path.read_bytes() for path in sorted(sources.glob("*.[ch]")))
    return hashlib.blake2b(text, digest_size=16).hexdigest()


class Kernels:
    """The functions of `kvpool.codecs.tensors` on one-dimensional numpy uint8 arrays, whose lengths are right."""

    def __init__(self, library: ctypes.CDLL, level: str | None = None) -> None:
        self._library = library
        self.level = level or ("fast" if library.kvpool_is_fast() else "base")

    def to_half(self, payload: Buffer, into: Buffer) -> Loss | None:
        """Encode float32 as float16."""
        count = ctypes.c_int64(len(into) // 2)
        return _loss(self._function("to_half")(_at(payload), _at(into), count))

    def from_half(self, encoded: Buffer, into: Buffer) -> None:
        """Decode float16 into float32."""
        self._function("from_half")(_at(encoded), _at(into), ctypes.c_int64(len(encoded) // 2))

    def quantize(
        self, fmt: QuantizedFormat, payload: Buffer, into: Buffer, bounds: Sequence[Floats] | None
    ) -> Loss | None:
        """Encode; `bounds` of each plane's groups narrow their ranges."""
        flaws = 0
        for number, plane in enumerate(fmt.planes):
            bound = None if bounds is None else ctypes.c_void_p(bounds[number].ctypes.data)
            flaws |= self._of_plane("encode", fmt, plane)(*_arguments(fmt, plane, payload, into), bound)
            if flaws & ~_OUT_OF_RANGE:
                break
        return _loss(flaws)

    def dequantize(self, fmt: QuantizedFormat, encoded: Buffer, into: Buffer) -> None:
        """Decode what `quantize` made."""
        for plane in fmt.planes:
            _loss(self._of_plane("decode", fmt, plane)(*_arguments(fmt, plane, into, encoded)))

    def _of_plane(self, work: str, fmt: QuantizedFormat, plane: PlaneFormat) -> Any:
        groups = "columns" if plane.grouping.over == (1,) else "rows"
        return self._function(f"{_TYPES[fmt.layout.dtype]}_{work}_{groups}")

    def _function(self, name: str) -> Any:
        return getattr(self._library, f"{name}_{self.level}")


def _arguments(fmt: QuantizedFormat, plane: PlaneFormat, payload: Buffer, encoded: Buffer) -> tuple[Any, ...]:
    """The plane, and where payload, zeros, scales and codes begin."""
    numeric, base = fmt.numeric, encoded.ctypes.data
    described = _Plane(
        fmt.layout.layers, fmt.layer_elements, plane.first_element, *plane.grouping.shape, plane.code_bytes,
        numeric.levels, not numeric.asymmetric,
    )  # fmt: skip
    sections = (plane.zeros_at, plane.scales_at, plane.codes_at)
    return ctypes.byref(described), _at(payload), *(ctypes.c_void_p(base + at) for at in sections)


def _at(array: Buffer) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _loss(flaws: int) -> Loss | None:
    if flaws & _NO_MEMORY:
        raise MemoryError
    if flaws & _NOT_FINITE:
        return Loss.NOT_FINITE
    return Loss.OUT_OF_RANGE if flaws & _OUT_OF_RANGE else None

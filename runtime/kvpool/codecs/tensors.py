"""The codecs on torch tensors of any device, in whole-tensor operations that give the same bits on each.

Every step is one float32 operation that IEEE 754 defines (so nothing may be fused, and nothing is divided by a number
on the CPU, which torch turns into a product on a GPU). `kvpool.codecs.format` says where the results lie; for a group
from `lo` to `hi`, both values of the payload's own type:

    asymmetric    zero = lo             scale = up((hi - lo) * (1 / levels))    code = round((x - zero) * (1 / scale))
    symmetric     far = max(-lo, hi)    scale = up(far * (1 / levels))          code = round(x * (1 / scale))
    decoded       code * scale + zero, rounded to the payload's type

`up` rounds up to bfloat16, to 2^-126 at least; `round` takes halves to even. So a value is off by half a scale at most,
which is 1/2 of 1/levels of the group's range, up to 1 % more for the scale's own rounding, and then by the payload
type's own rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from kvpool.blocks.layout import Dtype
from kvpool.codecs.format import Grouping, Numeric, PlaneFormat, QuantizedFormat
from kvpool.codecs.loss import Loss

if TYPE_CHECKING:
    from kvpool.blocks.record import Buffer
    from kvpool.codecs.limits import Floats

DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16}
HALF_MAX = torch.finfo(torch.float16).max
CPU_ELEMENTS = 64 << 10
"""Worked on at once on a CPU: what its caches hold with the steps between."""
_LEAST_SCALE = 0x0080_0000
"""2^-126 as bits: the least normal float32, whose inverse is finite."""


class _Flaws(NamedTuple):
    """Tensors of one boolean each, on the payload's device."""

    infinite: Tensor
    too_far: Tensor


def over(array: Buffer) -> Tensor:
    """A tensor over the memory of a numpy array. It must not be written to where the array must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of arrays that are read-only; we do not write to those
        return torch.from_numpy(array)


def to_half(payload: Tensor, into: Tensor) -> Loss | None:
    """Encode float32 as float16."""
    source, target = payload.view(torch.float32), into.view(torch.float16)
    size = CPU_ELEMENTS if payload.device.type == "cpu" else source.numel()
    flaws = []
    for piece, place in zip(torch.split(source, size), torch.split(target, size), strict=True):
        lo, hi = torch.aminmax(piece)
        far = torch.maximum(-lo, hi)
        flaws.append(_Flaws(~torch.isfinite(far), far > HALF_MAX))
        place.copy_(piece)
    return _loss(flaws)


def from_half(encoded: Tensor, into: Tensor) -> None:
    """Decode float16 into float32."""
    into.view(torch.float32).copy_(encoded.view(torch.float16))


def quantize(fmt: QuantizedFormat, payload: Tensor, into: Tensor, bounds: Sequence[Floats] | None) -> Loss | None:
    """Encode as the module says; `bounds` of each plane's groups narrow `lo` and `hi`: values beyond are cut off."""
    flaws = []
    for number, plane in enumerate(fmt.planes):
        values, sections = _values(fmt, plane, payload), _Sections.of_plane(fmt, plane, into)
        bound = None if bounds is None else torch.from_numpy(bounds[number]).to(payload.device, non_blocking=True)
        for some in _layers_at_once(fmt, plane, payload):
            limit = None if bound is None else bound[some]
            flaws.append(_quantize(fmt.numeric, plane.grouping, values[some], sections.of(some), limit))
    return _loss(flaws)


def dequantize(fmt: QuantizedFormat, encoded: Tensor, into: Tensor) -> None:
    """Decode what `quantize` made."""
    for plane in fmt.planes:
        values, sections = _values(fmt, plane, into), _Sections.of_plane(fmt, plane, encoded)
        for some in _layers_at_once(fmt, plane, encoded):
            _dequantize(fmt.numeric, sections.of(some), values[some])


class _Sections(NamedTuple):
    """A plane's views of an encoded payload: layers, then the axes of the plane's groups, or a layer's code bytes."""

    zeros: Tensor | None
    scales: Tensor
    codes: Tensor

    @classmethod
    def of_plane(cls, fmt: QuantizedFormat, plane: PlaneFormat, encoded: Tensor) -> Self:
        layers, kept = fmt.layout.layers, plane.grouping.kept

        def section(at: int, dtype: torch.dtype) -> Tensor:
            return encoded[at : at + layers * prod(kept) * dtype.itemsize].view(dtype).view(layers, *kept)

        zeros = section(plane.zeros_at, DTYPES[fmt.layout.dtype]) if fmt.numeric.asymmetric else None
        codes = encoded[plane.codes_at : plane.codes_at + layers * plane.code_bytes].view(layers, plane.code_bytes)
        return cls(zeros, section(plane.scales_at, torch.bfloat16), codes)

    def of(self, layers: slice) -> Self:
        zeros = None if self.zeros is None else self.zeros[layers]
        return self._replace(zeros=zeros, scales=self.scales[layers], codes=self.codes[layers])


def _values(fmt: QuantizedFormat, plane: PlaneFormat, payload: Tensor) -> Tensor:
    """A plane's view of a payload: layers, then the axes of the plane's grouping."""
    rows = payload.view(DTYPES[fmt.layout.dtype]).view(fmt.layout.layers, fmt.layer_elements)
    return torch.unflatten(rows.narrow(1, plane.first_element, plane.elements), 1, plane.grouping.shape)


def _layers_at_once(fmt: QuantizedFormat, plane: PlaneFormat, payload: Tensor) -> Iterator[slice]:
    layers = fmt.layout.layers
    step = max(1, CPU_ELEMENTS // plane.elements) if payload.device.type == "cpu" else layers
    return (slice(first, first + step) for first in range(0, layers, step))


def _quantize(numeric: Numeric, grouping: Grouping, values: Tensor, into: _Sections, bound: Tensor | None) -> _Flaws:
    axes = [1 + axis for axis in grouping.over]
    work = values.to(torch.float32, copy=True)
    lo, hi = work.amin(axes, keepdim=True), work.amax(axes, keepdim=True)
    infinite = ~(torch.isfinite(lo) & torch.isfinite(hi)).all()
    if bound is not None:
        lo, hi = lo.clamp(-bound, bound), hi.clamp(-bound, bound)
    if into.zeros is None:
        scale = _scale(torch.maximum(-lo, hi), numeric.levels)
        top = scale * numeric.levels
    else:
        zero = lo + 0.0  # negative zero becomes zero, so that it cannot matter which was found
        into.zeros.copy_(zero)
        scale = _scale(hi - zero, numeric.levels)
        top = scale * numeric.levels + zero
        work.sub_(zero)
    into.scales.copy_(scale)
    work.mul_(scale.reciprocal()).round_()
    if bound is not None:
        work.clamp_(-numeric.levels if into.zeros is None else 0, numeric.levels)
    _write_codes(numeric, work, into.codes)
    return _Flaws(infinite, ~torch.isfinite(top.to(values.dtype)).all())


def _dequantize(numeric: Numeric, encoded: _Sections, values: Tensor) -> None:
    work = _read_codes(numeric, encoded.codes, values.shape)
    work.mul_(encoded.scales.float())
    if encoded.zeros is not None:
        work.add_(encoded.zeros.float())
    values.copy_(work)


def _scale(reach: Tensor, levels: int) -> Tensor:
    """`reach` divided by `levels`, rounded up to bfloat16."""
    bits = (reach * (1 / levels)).view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).clamp_min(_LEAST_SCALE).view(torch.float32)


def _write_codes(numeric: Numeric, work: Tensor, codes: Tensor) -> None:
    if not numeric.asymmetric:
        codes.view(torch.int8).view(work.shape).copy_(work)
    elif numeric.bits == 8:
        codes.view(work.shape).copy_(work)
    else:
        flat = work.flatten(1).to(torch.uint8)
        low, high = flat[:, : codes.shape[1]], flat[:, codes.shape[1] :]
        codes.copy_(low)
        codes[:, : high.shape[1]] |= high << 4


def _read_codes(numeric: Numeric, codes: Tensor, shape: torch.Size) -> Tensor:
    """The codes as float32 in this shape, in memory of their own."""
    if not numeric.asymmetric:
        return codes.view(torch.int8).view(shape).float()
    if numeric.bits == 8:
        return codes.view(shape).float()
    elements = prod(shape[1:])
    both = torch.cat((codes & 0xF, codes >> 4), dim=1)[:, :elements]
    return both.reshape(shape).float()


def _loss(flaws: Sequence[_Flaws]) -> Loss | None:
    """The worst of them, read from the device at once."""
    infinite, too_far = (torch.stack(flags).any() for flags in zip(*flaws, strict=True))
    of_all = torch.stack((infinite, too_far)).tolist()
    if of_all[0]:
        return Loss.NOT_FINITE
    return Loss.OUT_OF_RANGE if of_all[1] else None

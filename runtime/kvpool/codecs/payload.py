"""A codec of one layout: the payloads of its blocks become fewer bytes, and come back nearly as they were."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import PAGE_BYTES, KVLayout, padded
from kvpool.blocks.record import Buffer
from kvpool.codecs.cpu.kernels import kernels
from kvpool.codecs.format import QuantizedFormat
from kvpool.codecs.limits import ClipLimits, Floats
from kvpool.codecs.loss import Loss
from kvpool.errors import ConfigError, InputError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor


class PayloadCodec(ABC):
    """Encodes and decodes the payloads of one layout. Immutable; any thread may call it, and many at once.

    Buffers are one-dimensional, contiguous, of bytes and of exactly the right length, and begin where an element of
    the payload may lie in memory (a multiple of 4 always will do); payload and encoded bytes do not overlap. Anything
    else is an `InputError`. Equal payloads (and limits) give equal bytes, on every device. Long calls release the GIL.
    """

    codec: Codec
    number: int
    """What stands for the codec in a record's head."""
    params: bytes
    """What decoding needs besides the layout and the encoded bytes; lies in the record's head."""

    def __init__(self, layout: KVLayout, codec: Codec, number: int, params: bytes, encoded_bytes: int) -> None:
        self.layout = layout
        self.codec = codec
        self.number = number
        self.params = params
        self.encoded_bytes = encoded_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of a record with an encoded payload: the head page and the payload, padded to whole pages."""
        return PAGE_BYTES + padded(self.encoded_bytes)

    def encode(self, payload: Buffer, into: Buffer, limits: ClipLimits | None = None) -> Loss | None:
        """Encode a numpy uint8 payload into a writable numpy uint8 array of `encoded_bytes`.

        Returns None, or why it cannot be done: then what `into` holds is of no use. `limits` narrow the ranges of
        int codecs; they must be of the same layout.
        """
        _check_array("payload", payload, self.layout.payload_bytes, writable=False)
        _check_array("into", into, self.encoded_bytes, writable=True)
        form, lent = _on_cpu()
        return self._encode(form, lent(payload), lent(into), self._bounds_of(limits))

    def decode(self, encoded: Buffer, into: Buffer) -> None:
        """Decode a numpy uint8 array of `encoded_bytes` into a writable numpy uint8 payload, in the layout's dtype."""
        _check_array("encoded", encoded, self.encoded_bytes, writable=False)
        _check_array("into", into, self.layout.payload_bytes, writable=True)
        form, lent = _on_cpu()
        self._decode(form, lent(encoded), lent(into))

    def encode_tensor(self, payload: Tensor, into: Tensor, limits: ClipLimits | None = None) -> Loss | None:
        """The same on torch uint8 tensors of one device: the same bytes. Waits for a GPU's stream once, at the end."""
        self._check_pair(payload, self.layout.payload_bytes, into, self.encoded_bytes)
        return self._encode(_tensors(), payload, into, self._bounds_of(limits))

    def decode_tensor(self, encoded: Tensor, into: Tensor) -> None:
        """The same on torch uint8 tensors of one device. Never waits for a GPU."""
        self._check_pair(encoded, self.encoded_bytes, into, self.layout.payload_bytes)
        self._decode(_tensors(), encoded, into)

    @abstractmethod
    def _encode(self, form: Any, payload: Any, into: Any, bounds: Sequence[Floats] | None) -> Loss | None:
        """Encode by `form`: the compiled kernels on arrays, or torch on tensors."""

    @abstractmethod
    def _decode(self, form: Any, encoded: Any, into: Any) -> None: ...

    def _bounds_of(self, limits: ClipLimits | None) -> Sequence[Floats] | None:
        """The limits of each plane's groups, where there are groups."""
        if limits is not None:
            limits.check(self.layout)
        return None

    def _check_pair(self, source: Tensor, source_bytes: int, into: Tensor, into_bytes: int) -> None:
        _check_tensor("the tensor to read", source, source_bytes)
        _check_tensor("the tensor to write", into, into_bytes)
        if source.device != into.device:
            raise InputError(f"tensors lie on {source.device} and {into.device}; both must be on one device")


class HalfCodec(PayloadCodec):
    """`fp16`: float32 payloads as float16, in the same order."""

    def __init__(self, layout: KVLayout, number: int, params: bytes) -> None:
        super().__init__(layout, Codec.FP16, number, params, layout.payload_bytes // 2)

    def _encode(self, form: Any, payload: Any, into: Any, bounds: Sequence[Floats] | None) -> Loss | None:
        loss: Loss | None = form.to_half(payload, into)
        return loss

    def _decode(self, form: Any, encoded: Any, into: Any) -> None:
        form.from_half(encoded, into)


class QuantizedCodec(PayloadCodec):
    """The int codecs: codes, and a scale for each group of them (see `kvpool.codecs.format`)."""

    def __init__(self, layout: KVLayout, codec: Codec, number: int, params: bytes, granularity: Granularity) -> None:
        self.format = QuantizedFormat(layout, codec, granularity)
        self._last_bounds: tuple[ClipLimits, tuple[Floats, ...]] | None = None
        super().__init__(layout, codec, number, params, self.format.encoded_bytes)

    def _encode(self, form: Any, payload: Any, into: Any, bounds: Sequence[Floats] | None) -> Loss | None:
        loss: Loss | None = form.quantize(self.format, payload, into, bounds)
        return loss

    def _decode(self, form: Any, encoded: Any, into: Any) -> None:
        form.dequantize(self.format, encoded, into)

    def _bounds_of(self, limits: ClipLimits | None) -> Sequence[Floats] | None:
        """Kept for the next call, which nearly always has the same limits."""
        if limits is None:
            return None
        last = self._last_bounds
        if last is None or last[0] is not limits:
            limits.check(self.layout)
            last = self._last_bounds = limits, limits.of_groups(self.format)
        return last[1]


def _on_cpu() -> tuple[Any, Callable[[Buffer], Any]]:
    """What works in memory, and how an array is lent to it: the compiled kernels where there are any, else torch."""
    compiled = kernels()
    if compiled is not None:
        return compiled, lambda array: array
    tensors = _tensors()
    return tensors, tensors.over


def check_available() -> None:
    """Raise `ConfigError` where this installation can neither encode nor decode."""
    _on_cpu()


def _tensors() -> ModuleType:
    """The module that works with torch. Raises `ConfigError` where torch is not installed."""
    try:
        from kvpool.codecs import tensors
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            "a codec other than none needs torch here, which is not installed: pip install 'kvpool[codecs]'"
        ) from None
    return tensors


def _check_array(name: str, array: Any, nbytes: int, *, writable: bool) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
        raise InputError(f"{name} must be a one-dimensional numpy array of uint8")
    if not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise InputError(f"{name} must be contiguous{' and writable' if writable else ''}")
    _check_place(name, array.nbytes, nbytes, array.ctypes.data)


def _check_tensor(name: str, tensor: Any, nbytes: int) -> None:
    if str(tensor.dtype) != "torch.uint8" or tensor.ndim != 1 or not tensor.is_contiguous():
        raise InputError(f"{name} must be a one-dimensional, contiguous tensor of uint8")
    _check_place(name, tensor.numel(), nbytes, tensor.data_ptr())


def _check_place(name: str, found: int, wanted: int, address: int) -> None:
    if found != wanted:
        raise InputError(f"{name} has {found} bytes; it must have exactly {wanted}")
    if address % 4:
        raise InputError(f"{name} begins at an odd place in memory; it must be a multiple of 4 bytes")

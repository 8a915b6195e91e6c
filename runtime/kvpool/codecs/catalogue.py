"""Which codec has which number, and which one a layout, a configuration or a record asks for."""

from collections.abc import Mapping
from types import MappingProxyType

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.codecs.format import QUANTIZABLE
from kvpool.codecs.payload import HalfCodec, PayloadCodec, QuantizedCodec

NUMBERS: Mapping[Codec, int] = MappingProxyType(
    {
        Codec.NONE: 0,
        Codec.FP16: 1,
        Codec.INT8_SYMMETRIC: 2,
        Codec.INT8_ASYMMETRIC: 3,
        Codec.INT4_ASYMMETRIC: 4,
    }
)
"""What stands for a codec in a record's head. A number is never given to another codec."""
FORMAT_VERSION = 1
"""First byte of the parameters; raised when the bytes of any encoded payload change."""
_GRANULARITIES = (Granularity.AUTO, Granularity.BLOCK, Granularity.CHANNEL)
"""Second byte of an int codec's parameters: the place in here."""
_CODECS = {number: codec for codec, number in NUMBERS.items()}


class UnknownCodecError(Exception):
    """A record says that its codec is one that this program does not know: a miss, never a user's error."""


def codec_for(layout: KVLayout, codec: Codec, granularity: Granularity = Granularity.AUTO) -> PayloadCodec | None:
    """The codec as configured, or None where blocks are to be stored as they are.

    That is so under `none`, and where a record would take as many pages as without: fp16 on 16-bit elements, any codec
    on elements of one byte, blocks so small that scales and the padding to pages eat what is saved.
    """
    if codec is Codec.NONE or not _fits(layout, codec):
        return None
    params = bytes([FORMAT_VERSION])
    if codec is not Codec.FP16:
        params += bytes([_GRANULARITIES.index(granularity)])
    found = codec_of(layout, NUMBERS[codec], params)
    return found if found.record_bytes < layout.record_bytes else None


def codec_of(layout: KVLayout, number: int, params: bytes) -> PayloadCodec:
    """The codec that a record's head names. Raises `UnknownCodecError`; `none` (0) has no codec, and raises it too."""
    codec = _CODECS.get(number, Codec.NONE)
    if codec is Codec.NONE or not _fits(layout, codec):
        raise UnknownCodecError(f"codec {number} of {layout.dtype} payloads")
    if params[:1] != bytes([FORMAT_VERSION]):
        raise UnknownCodecError(f"{codec}: parameters {params.hex()!r} are of another version")
    if codec is Codec.FP16 and len(params) == 1:
        return HalfCodec(layout, number, params)
    if codec is not Codec.FP16 and len(params) == 2 and params[1] < len(_GRANULARITIES):
        return QuantizedCodec(layout, codec, number, params, _GRANULARITIES[params[1]])
    raise UnknownCodecError(f"{codec}: parameters {params.hex()!r}")


def _fits(layout: KVLayout, codec: Codec) -> bool:
    return layout.dtype is Dtype.FLOAT32 if codec is Codec.FP16 else layout.dtype in QUANTIZABLE

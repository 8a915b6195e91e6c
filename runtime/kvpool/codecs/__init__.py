"""Codecs: payloads as fewer bytes. Importing this imports neither torch nor numba; the first encoding does."""

from kvpool.codecs.calibration import Calibrator
from kvpool.codecs.catalogue import FORMAT_VERSION, NUMBERS, UnknownCodecError, codec_for, codec_of
from kvpool.codecs.limits import ClipLimits, DamagedLimitsError
from kvpool.codecs.loss import Loss
from kvpool.codecs.payload import PayloadCodec, check_available

__all__ = [
    "FORMAT_VERSION",
    "NUMBERS",
    "Calibrator",
    "ClipLimits",
    "DamagedLimitsError",
    "Loss",
    "PayloadCodec",
    "UnknownCodecError",
    "check_available",
    "codec_for",
    "codec_of",
]

"""Which codec the blocks of each model get in each tier, and how what is encoded is read.

Codecs are applied in the background only: a store lands as it came. What is encoded already keeps its bytes wherever it
goes. A record is read if its codec is one that the configuration names for the model in some tier, so that a pool
without lossy codecs never serves a lossy block that an earlier configuration has left behind.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from kvpool.api.behaviour import Granularity
from kvpool.api.codec import Codec
from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import PAGE_BYTES, KVLayout
from kvpool.blocks.record import CODEC_NONE, Buffer, Corruption, CorruptRecordError, Head, codec_in, sealed_as
from kvpool.codecs import NUMBERS, PayloadCodec, UnknownCodecError, codec_for, codec_of
from kvpool.pool.calibration import Calibrations
from kvpool.prefix.node import RAM, SSD
from kvpool.tiers.extents import Bytes

DRAGONFLY: Final = 3
DATABASE: Final = 4
"""The tiers that are shared: levels for codecs alone, for the index does not know what lies there."""
ENCODED_LEVELS: Final = (RAM, SSD, DRAGONFLY, DATABASE)
MAX_SCRATCH = 8
"""Buffers for decoding that are kept for the next load."""

Layouts = Callable[[Fingerprint], KVLayout | None]


class Encodings:
    """Safe from any thread. `by_level` are the tiers' codecs; a model may have others, with `use`."""

    def __init__(
        self,
        by_level: Mapping[int, Codec],
        granularity: Granularity,
        *,
        layout_of: Layouts,
        calibrations: Calibrations | None = None,
    ) -> None:
        self._by_level = dict(by_level)
        self._granularity = granularity
        self._layout_of = layout_of
        self._calibrations = calibrations
        self._overrides: dict[Fingerprint, Mapping[int, Codec]] = {}
        self._codecs: dict[tuple[Fingerprint, int], PayloadCodec | None] = {}
        self._readable: dict[Fingerprint, frozenset[int]] = {}
        self._scratch: list[Bytes] = []
        self._lock = threading.Lock()
        self.encoded_blocks: Counter[Codec] = Counter()
        self.raw_bytes: Counter[Codec] = Counter()
        """What was encoded, before."""
        self.encoded_bytes: Counter[Codec] = Counter()
        """And after."""
        self.kept_raw: Counter[str] = Counter()
        """Blocks that were to be encoded and were stored as they are, by reason."""

    def use(self, fingerprint: Fingerprint, by_level: Mapping[int, Codec]) -> None:
        """Let a model have codecs of its own at these levels."""
        with self._lock:
            self._overrides[fingerprint] = dict(by_level)
            self._readable.pop(fingerprint, None)
            for level in ENCODED_LEVELS:
                self._codecs.pop((fingerprint, level), None)

    def forget(self, fingerprint: Fingerprint) -> None:
        """The model was unregistered."""
        self.use(fingerprint, {})
        with self._lock:
            self._overrides.pop(fingerprint, None)
        if self._calibrations is not None:
            self._calibrations.forget(fingerprint)

    def codec(self, fingerprint: Fingerprint, level: int) -> PayloadCodec | None:
        """What the model's blocks are encoded with at this level; None where they stay as they are."""
        known = (fingerprint, level)
        with self._lock:
            if known not in self._codecs:
                layout, name = self._layout_of(fingerprint), self._name(fingerprint, level)
                if layout is None:
                    return None
                self._codecs[known] = codec_for(layout, name, self._granularity) if name is not Codec.NONE else None
            return self._codecs[known]

    def readable(self, fingerprint: Fingerprint) -> frozenset[int]:
        """The numbers of the codecs whose records may be served for this model."""
        with self._lock:
            known = self._readable.get(fingerprint)
            if known is None:
                names = {self._name(fingerprint, level) for level in ENCODED_LEVELS}
                known = self._readable[fingerprint] = frozenset({CODEC_NONE, *(NUMBERS[name] for name in names)})
            return known

    def encode(self, raw: Bytes, head: Head, codec: PayloadCodec, into: Bytes) -> bool:
        """Encode and seal a record that is not encoded; False, and counted, where its values do not allow that.

        `raw` is the whole record, its payload from byte 4,096 on; `into` has `codec.record_bytes`.
        """
        payload = raw[PAGE_BYTES : PAGE_BYTES + head.raw_bytes]
        limits = None
        if self._calibrations is not None:
            limits = self._calibrations.limits(head.fingerprint, codec.layout, payload)
        loss = codec.encode(payload, into[PAGE_BYTES : PAGE_BYTES + codec.encoded_bytes], limits)
        with self._lock:
            if loss is not None:
                self.kept_raw[str(loss)] += 1
                return False
            self.encoded_blocks[codec.codec] += 1
            self.raw_bytes[codec.codec] += len(raw)
            self.encoded_bytes[codec.codec] += len(into)
        sealed_as(into, head, codec.number, codec.params, codec.encoded_bytes)
        return True

    def check(self, head: Head, record: Buffer) -> None:
        """Raise `CorruptRecordError` unless this program can decode the record, and may serve it."""
        if len(record) != head.record_bytes:
            raise CorruptRecordError(Corruption.LENGTH)
        if head.codec == CODEC_NONE:
            return
        layout = self._layout_of(head.fingerprint)
        if layout is None or head.codec not in self.readable(head.fingerprint):
            raise CorruptRecordError(Corruption.CODEC)
        try:
            codec = codec_of(layout, head.codec, head.codec_params)
        except UnknownCodecError:
            raise CorruptRecordError(Corruption.CODEC) from None
        if codec.encoded_bytes != head.payload_bytes or codec.record_bytes >= layout.record_bytes:
            raise CorruptRecordError(Corruption.LENGTH)

    def decode(self, layout: KVLayout, record: Bytes, into: Bytes) -> None:
        """Decode an encoded record of this process, which was checked when it came here."""
        number, params = codec_in(record)
        codec = codec_of(layout, number, params)
        codec.decode(record[PAGE_BYTES : PAGE_BYTES + codec.encoded_bytes], into)

    def borrow(self, nbytes: int) -> Bytes:
        """A buffer for one decoded payload; give it back with `give_back`."""
        with self._lock:
            for at, buffer in enumerate(self._scratch):
                if len(buffer) == nbytes:
                    return self._scratch.pop(at)
        return np.empty(nbytes, np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """The buffer is not looked at any more."""
        with self._lock:
            self._scratch = [*self._scratch, buffer][-MAX_SCRATCH:]

    def _name(self, fingerprint: Fingerprint, level: int) -> Codec:
        override = self._overrides.get(fingerprint, {})
        return override.get(level, self._by_level.get(level, Codec.NONE))

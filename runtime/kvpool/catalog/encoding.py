"""A batch of reports as bytes, for the journal. Pure.

    version (1 byte), session (8), sequence (8), number of reports (4), then for each: its kind (1 byte) and its fields
    in order. Numbers are big-endian; bytes and text are preceded by their length (4 bytes).

A kind keeps its number, and its fields, for as long as the version stays.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from uuid import UUID

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest, TreeId
from kvpool.catalog.rows import (
    Batch,
    BlocksRemoved,
    BlocksStored,
    BlocksUsed,
    ModelForgotten,
    ModelSeen,
    Op,
    PricesSet,
    PromptAsked,
    SharedPrefixRow,
    SharedReport,
    TenantErased,
    TiersCleared,
    UsageReport,
)
from kvpool.tiers.tier import TierName

VERSION = 1
_HEAD = struct.Struct(">BqqI")
_LENGTH = struct.Struct(">I")
_INT = struct.Struct(">q")
_FLOAT = struct.Struct(">d")
_TIERS = tuple(TierName)


class UnreadableBatchError(Exception):
    """Bytes that are no batch, or one of another version."""


class _Reader:
    """Takes fields off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise UnreadableBatchError("it ends in the middle")
        self._at += count
        return part

    def unpack(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]


class _Field(NamedTuple):
    """How a value of some kind is written and read."""

    write: Callable[[Any], bytes]
    read: Callable[[_Reader], Any]


def _sized(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _read_sized(reader: _Reader) -> bytes:
    return reader.take(reader.unpack(_LENGTH))


def _read_tier(reader: _Reader) -> TierName:
    number = reader.take(1)[0]
    if number >= len(_TIERS):
        raise UnreadableBatchError(f"there is no tier {number}")
    return _TIERS[number]


def _read_text(reader: _Reader) -> str:
    try:
        return _read_sized(reader).decode()
    except UnicodeDecodeError:
        raise UnreadableBatchError("a text is none") from None


def _many(field: _Field) -> _Field:
    return _Field(
        lambda values: _LENGTH.pack(len(values)) + b"".join(map(field.write, values)),
        lambda reader: tuple(field.read(reader) for _ in range(reader.unpack(_LENGTH))),
    )


def _together(made: Callable[..., Any], *fields: _Field) -> _Field:
    return _Field(
        lambda values: b"".join(field.write(value) for field, value in zip(fields, values, strict=True)),
        lambda reader: made(*(field.read(reader) for field in fields)),
    )


_bytes = _Field(_sized, _read_sized)
_text = _Field(lambda value: _sized(value.encode()), _read_text)
_int = _Field(_INT.pack, lambda reader: reader.unpack(_INT))
_float = _Field(_FLOAT.pack, lambda reader: reader.unpack(_FLOAT))
_tier = _Field(lambda tier: bytes([_TIERS.index(tier)]), _read_tier)
_key = _Field(bytes, lambda reader: BlockKey(reader.take(16)))
_tenant = _Field(bytes, lambda reader: TenantDigest(reader.take(16)))
_model = _Field(bytes, lambda reader: Fingerprint(reader.take(32)))
_tree = _together(TreeId, _model, _tenant, _int)
_point = _Field(
    lambda point: b"\0" if point is None else b"\1" + point.bytes,
    lambda reader: UUID(bytes=reader.take(16)) if reader.take(1) == b"\1" else None,
)
_prefix = _together(SharedPrefixRow, _tree, _key, _int, _int, _int, _int)

_KINDS: Mapping[int, tuple[type[Any], _Field]] = {
    number: (kind, _together(kind, *fields))
    for number, kind, fields in (
        (1, ModelSeen, (_model, _text, _text, _text, _float)),
        (2, BlocksStored, (_tree, _key, _bytes, _int, _int, _tier, _int, _int, _float)),
        (3, BlocksUsed, (_bytes, _float)),
        (4, BlocksRemoved, (_bytes, _tier, _text, _float)),
        (5, PromptAsked, (_tree, _key, _int, _point, _float)),
        (6, UsageReport, (_model, _tenant, _int, _int, _many(_int), _int, _float, _float)),
        (7, SharedReport, (_many(_prefix), _float)),
        (8, PricesSet, (_float, _float, _float, _float)),
        (9, TiersCleared, (_many(_tier), _text, _float)),
        (10, TenantErased, (_tenant, _int)),
        (11, ModelForgotten, (_model,)),
    )
}
_NUMBERS = {kind: number for number, (kind, _) in _KINDS.items()}


def encode(batch: Batch) -> bytes:
    """The batch as bytes."""
    parts = [_HEAD.pack(VERSION, batch.session, batch.sequence, len(batch.ops))]
    for op in batch.ops:
        number = _NUMBERS[type(op)]
        parts += (bytes([number]), _KINDS[number][1].write(op))
    return b"".join(parts)


def decode(data: bytes) -> Batch:
    """The batch that these bytes are. Raises `UnreadableBatchError`."""
    reader = _Reader(data)
    version, session, sequence, count = _HEAD.unpack(reader.take(_HEAD.size))
    if version != VERSION:
        raise UnreadableBatchError(f"it has version {version}, and this program knows {VERSION}")
    ops = tuple(_read_op(reader) for _ in range(count))
    if not reader.at_end:
        raise UnreadableBatchError("it goes on after its end")
    return Batch(session, sequence, ops)


def _read_op(reader: _Reader) -> Op:
    number = reader.take(1)[0]
    if number not in _KINDS:
        raise UnreadableBatchError(f"there is no report of kind {number}")
    op: Op = _KINDS[number][1].read(reader)
    return op

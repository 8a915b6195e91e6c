"""One block as bytes: the same in a RAM slot, on SSD, in a Redis value and on the wire.

    0      8   magic "kvpool\\0R"
    8      2   format version            10   2   codec
    12     4   length of the codec's parameters
    16     16  key                       32   16  parent key
    48     32  fingerprint               80   16  tenant digest
    96     8   epoch                     104  4   depth, in blocks from the prompt's start
    108    4   length of the token ids   112  4   length of the extra keys
    116    4   zero                      120  8   length of the payload as encoded
    128    8   length of the payload as the engine had it
    136    8   xxh3-64 of the encoded payload
    144    ..  token ids, extra keys, codec parameters, zeros
    4088   8   xxh3-64 of the 4,088 bytes before
    4096   ..  payload, padded with zeros to 4 KiB

All integers are little-endian. A buffer that holds a record starts on a 4 KiB boundary where it is to be read or
written with O_DIRECT. The checksums find damage (in the padding it is found by its zeros); that a record is the one
asked for is found by comparing its head.
"""

import struct
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias

import xxhash

from kvpool.blocks.identity import BlockKey, Fingerprint, TenantDigest
from kvpool.blocks.layout import PAGE_BYTES, padded
from kvpool.errors import InputError

MAGIC = b"kvpool\0R"
VERSION = 1
CODEC_NONE = 0

Buffer: TypeAlias = Any
"""A writable, contiguous buffer of bytes: a numpy uint8 array, memoryview, bytearray or mmap."""

_HEAD = struct.Struct("<8sHHI16s16s32s16sQIIIIQQQ")
_SUM = struct.Struct("<Q")
_SUM_AT = PAGE_BYTES - _SUM.size
MAX_VARIABLE_BYTES = _SUM_AT - _HEAD.size
"""What a head has room for: token ids, extra keys and codec parameters together."""


class Corruption(StrEnum):
    """Why bytes are not the record that was asked for. Also the label of `kvpool_corrupt_blocks_total`."""

    TRUNCATED = "truncated"
    MAGIC = "magic"
    VERSION = "version"
    HEAD_CHECKSUM = "head-checksum"
    LENGTH = "length"
    CODEC = "codec"
    FINGERPRINT = "fingerprint"
    TENANT = "tenant"
    EPOCH = "epoch"
    KEY = "key"
    TOKENS = "tokens"
    PAYLOAD_CHECKSUM = "payload-checksum"


class CorruptRecordError(Exception):
    """Bytes that are no record of ours, or not the one asked for: a miss, never a user's error."""

    def __init__(self, reason: Corruption) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a record says of itself, before its payload."""

    key: BlockKey
    parent: BlockKey
    fingerprint: Fingerprint
    tenant: TenantDigest
    epoch: int
    depth: int
    tokens: bytes
    extra: bytes = b""
    payload_bytes: int
    raw_bytes: int
    codec: int = CODEC_NONE
    codec_params: bytes = b""
    checksum: int = 0

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record, padding included."""
        return PAGE_BYTES + padded(self.payload_bytes)


def seal(record: Buffer, head: Head) -> None:
    """Write `head` in front of the payload that already lies in `record` from byte 4,096 on, and zero its padding.

    `head.checksum` is ignored: it is computed here, from the payload (one read of it).
    """
    view = memoryview(record)
    variable = head.tokens + head.extra + head.codec_params
    if len(variable) > MAX_VARIABLE_BYTES:
        raise InputError(
            f"a block's token ids, extra keys and codec parameters are {len(variable)} bytes; "
            f"the record's head has room for {MAX_VARIABLE_BYTES}"
        )
    end = PAGE_BYTES + head.payload_bytes
    view[end : head.record_bytes] = bytes(head.record_bytes - end)
    page = _HEAD.pack(
        MAGIC, VERSION, head.codec, len(head.codec_params), head.key, head.parent, head.fingerprint, head.tenant,
        head.epoch, head.depth, len(head.tokens), len(head.extra), 0, head.payload_bytes, head.raw_bytes,
        xxhash.xxh3_64_intdigest(view[PAGE_BYTES:end]),
    )  # fmt: skip
    page = (page + variable).ljust(_SUM_AT, b"\0")
    view[:PAGE_BYTES] = page + _SUM.pack(xxhash.xxh3_64_intdigest(page))


def sealed_as(record: Buffer, head: Head, codec: int, params: bytes, payload_bytes: int) -> Head:
    """`seal` a record whose payload is encoded; returns its head."""
    encoded = replace(head, codec=codec, codec_params=params, payload_bytes=payload_bytes)
    seal(record, encoded)
    return encoded


def codec_in(record: Buffer) -> tuple[int, bytes]:
    """The number and the parameters of the codec of a record that this process has sealed or verified."""
    view = memoryview(record)
    _, _, codec, params_len, *_, tokens_len, extra_len, _, _, _, _ = _HEAD.unpack_from(view)
    at = _HEAD.size + tokens_len + extra_len
    return codec, bytes(view[at : at + params_len])


def read_head(page: Buffer) -> Head:
    """Return the head in the first 4 KiB of `page`, or raise `CorruptRecordError`. The payload is not looked at."""
    view = memoryview(page)[:PAGE_BYTES]
    if len(view) < PAGE_BYTES:
        raise CorruptRecordError(Corruption.TRUNCATED)
    (
        magic, version, codec, params_len, key, parent, fingerprint, tenant, epoch, depth, tokens_len, extra_len, zero,
        payload_bytes, raw_bytes, checksum,
    ) = _HEAD.unpack_from(view)  # fmt: skip
    if magic != MAGIC:
        raise CorruptRecordError(Corruption.MAGIC)
    if version != VERSION:
        raise CorruptRecordError(Corruption.VERSION)
    if xxhash.xxh3_64_intdigest(view[:_SUM_AT]) != _SUM.unpack_from(view, _SUM_AT)[0]:
        raise CorruptRecordError(Corruption.HEAD_CHECKSUM)
    if zero or tokens_len + extra_len + params_len > MAX_VARIABLE_BYTES:
        raise CorruptRecordError(Corruption.LENGTH)
    tokens_end = _HEAD.size + tokens_len
    extra_end = tokens_end + extra_len
    return Head(
        key=BlockKey(key),
        parent=BlockKey(parent),
        fingerprint=Fingerprint(fingerprint),
        tenant=TenantDigest(tenant),
        epoch=epoch,
        depth=depth,
        tokens=bytes(view[_HEAD.size : tokens_end]),
        extra=bytes(view[tokens_end:extra_end]),
        payload_bytes=payload_bytes,
        raw_bytes=raw_bytes,
        codec=codec,
        codec_params=bytes(view[extra_end : extra_end + params_len]),
        checksum=checksum,
    )


def check_payload(record: Buffer, head: Head) -> None:
    """Raise `CorruptRecordError` unless the payload in `record` is the one that `head` was sealed with."""
    view = memoryview(record)
    end = PAGE_BYTES + head.payload_bytes
    if len(view) < head.record_bytes:
        raise CorruptRecordError(Corruption.TRUNCATED)
    damaged_padding = bytes(view[end : head.record_bytes]).strip(b"\0")
    if damaged_padding or xxhash.xxh3_64_intdigest(view[PAGE_BYTES:end]) != head.checksum:
        raise CorruptRecordError(Corruption.PAYLOAD_CHECKSUM)


def open_record(record: Buffer, expected: Head) -> Head:
    """Return the head of `record` if it is, byte for byte, the block that `expected` describes.

    Compared are fingerprint, tenant, epoch, key, parent, depth, tokens, extra keys and the raw length; then the
    payload's checksum. `expected`'s codec, payload length and checksum are not looked at: the record says them. Raises
    `CorruptRecordError`, whose reason is the first thing that differs.
    """
    head = read_head(record)
    if head.fingerprint != expected.fingerprint:
        raise CorruptRecordError(Corruption.FINGERPRINT)
    if head.tenant != expected.tenant:
        raise CorruptRecordError(Corruption.TENANT)
    if head.epoch != expected.epoch:
        raise CorruptRecordError(Corruption.EPOCH)
    if (head.key, head.parent, head.depth) != (expected.key, expected.parent, expected.depth):
        raise CorruptRecordError(Corruption.KEY)
    if (head.tokens, head.extra) != (expected.tokens, expected.extra):
        raise CorruptRecordError(Corruption.TOKENS)
    if head.raw_bytes != expected.raw_bytes or (head.codec == CODEC_NONE and head.payload_bytes != head.raw_bytes):
        raise CorruptRecordError(Corruption.LENGTH)
    check_payload(record, head)
    return head

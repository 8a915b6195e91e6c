"""What a key in the server looks like.

    kvpool:1:<tenant>:<epoch>:<model>:<codec>:<block>    one record
    kvpool:1:epoch:<tenant>                              the highest epoch of a tenant that anybody noted

`1` is the version of this schema. Tenant: its digest, 32 hex digits. Epoch and codec: decimal. Model: the first 8 bytes
of its fingerprint, 16 hex digits. Block: its key, 32 hex digits. So a tenant, or a model, can be found by a pattern, a
server may be shared with other programs under an ACL of `~kvpool:*`, and no name that a person gave leaves the process.
There are no braces: those would put all keys with equal text between them on one node of a cluster.
"""

from binascii import hexlify
from collections.abc import Sequence
from typing import NamedTuple

from kvpool.blocks.identity import KEY_BYTES, BlockKey, Fingerprint, TenantDigest, TreeId

PREFIX = "kvpool:1:"
_MODEL_BYTES = 8
_KEY_DIGITS = 2 * KEY_BYTES
_FIELDS = 7
_MAX_EPOCH_DIGITS = 20


class Names:
    """The keys of one tree's records."""

    __slots__ = ("_start",)

    def __init__(self, tree: TreeId) -> None:
        model = _model(tree.fingerprint)
        self._start = f"{PREFIX}{tree.tenant.hex()}:{tree.epoch}:{model}:".encode()

    def of_all(self, keys: Sequence[BlockKey], codecs: Sequence[int]) -> list[bytes]:
        """The keys of all records that there may be of these blocks, block by block."""
        starts = [b"%b%d:" % (self._start, codec) for codec in codecs]
        digits = hexlify(b"".join(keys))
        return [start + digits[at : at + _KEY_DIGITS] for at in range(0, len(digits), _KEY_DIGITS) for start in starts]

    def of(self, key: BlockKey, codec: int) -> bytes:
        """The key of a block's record in this codec."""
        return b"%b%d:%b" % (self._start, codec, hexlify(key))


class Parts(NamedTuple):
    """What a record's key says of whose it is."""

    tenant: str
    epoch: int
    model: str


def parts_of(name: bytes) -> Parts | None:
    """What a key says; None where it is none of a record of this schema."""
    fields = name.split(b":")
    if len(fields) != _FIELDS or not name.startswith(PREFIX.encode()):
        return None
    if not fields[3].isdigit() or len(fields[3]) > _MAX_EPOCH_DIGITS:
        return None
    return Parts(fields[2].decode(errors="replace"), int(fields[3]), fields[4].decode(errors="replace"))


def tenant_pattern(tenant: TenantDigest) -> bytes:
    """What the keys of a tenant's records match."""
    return f"{PREFIX}{tenant.hex()}:*".encode()


def model_pattern(fingerprint: Fingerprint) -> bytes:
    """What the keys of a model's records match."""
    return f"{PREFIX}*:*:{_model(fingerprint)}:*:*".encode()


def is_of_model(parts: Parts, fingerprint: Fingerprint) -> bool:
    """Whether a record is this model's, as far as a key can say."""
    return parts.model == _model(fingerprint)


def epoch_name(tenant: TenantDigest) -> bytes:
    """The key of a tenant's epoch."""
    return f"{PREFIX}epoch:{tenant.hex()}".encode()


def _model(fingerprint: Fingerprint) -> str:
    return fingerprint[:_MODEL_BYTES].hex()

"""Fixed bytes. If one of these fails, keys or records of pools that exist could no longer be read: raise a version."""

from __future__ import annotations

import pytest

from kvpool.blocks.identity import KeyChain, ModelIdentity, joined_extra_keys, tenant_digest
from kvpool.blocks.layout import PAGE_BYTES, Dtype, KVLayout
from kvpool.blocks.record import open_record, seal

from .samples import CHAIN, EXTRA, IDENTITY, SECRET, head_of

PLAIN = ModelIdentity(
    name="m", weights="w", layout=KVLayout(layers=1, kv_heads=1, head_size=1, dtype=Dtype.UINT8, block_tokens=64)
)
LATENT = ModelIdentity(
    name="ünïcode/模型",
    weights="id",
    layout=KVLayout(layers=1, kv_heads=1, head_size=576, dtype=Dtype.FLOAT8_E4M3, block_tokens=64, value_head_size=0),
)
PROMPT = b"".join(token.to_bytes(4, "little") for token in range(12))

RECORD_HEAD = (
    "6b76706f6f6c0052" "0100" "0700" "03000000"
    "a7efe9570af80c6182435f648b75ad4c" "da5068797b23a98ee88f9ec4cbc70ce1"
    "64463d0c8bc5dc5ed651463f8f8e530525581382830e5c5c1a47f29fc5c5c4ab"
    "ae791ca356250061726441eb4c2cb2df"
    "0300000000000000" "01000000" "10000000" "0c000000" "00000000"
    "0500000000000000" "8001000000000000" "9fdd6faec9f696ca"
    "64000000650000006600000067000000" "696d6167652d646967657374" "010203"
)  # fmt: skip
PAYLOAD = "6b762d3031"


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (PLAIN, "64d57da80ce012c384ed3b0fb4d1c33f44d940ac83f24fc86d996fe52a680f43"),
        (IDENTITY, "64463d0c8bc5dc5ed651463f8f8e530525581382830e5c5c1a47f29fc5c5c4ab"),
        (LATENT, "0eb964e27f2df3873d36965c0592d02b3be5509b017836afb35a01ab48f9abfa"),
    ],
    ids=["defaults", "every-field", "latent"],
)
def test_fingerprints(identity: ModelIdentity, expected: str) -> None:
    assert identity.fingerprint.hex() == expected


@pytest.mark.parametrize(
    ("tenant", "expected"),
    [
        ("default", "620f5b648ab612ebfdcb49c5c1dd50ef"),
        ("acme", "ae791ca356250061726441eb4c2cb2df"),
        ("", "1c3c080425f4da7fb9ef4f97e4db94dd"),
        ("名前", "61136b6817dc4f9c422968f61d9a6823"),
    ],
)
def test_tenant_digests(tenant: str, expected: str) -> None:
    assert tenant_digest(SECRET, tenant).hex() == expected


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, "596fa0f2a9286365a605e7326f8f4cd1"), (2**64 - 1, "552e905db50be8d80e901f298790fe68")],
)
def test_chain_roots(epoch: int, expected: str) -> None:
    assert KeyChain(SECRET, PLAIN.fingerprint, tenant_digest(SECRET, "default"), epoch).root.hex() == expected


def test_block_keys() -> None:
    assert CHAIN.root.hex() == "f2837ff89b1a80bd9a2f1f60d0f0aa9c"
    assert [key.hex() for key in CHAIN.keys(PROMPT, 16)] == [
        "a39cd0402032f626844af68c0cb32f5e",
        "bb91085688fe3760df1bb99571a01cba",
        "b0a4eb155feb2ff99c751734fd7840c1",
    ]


def test_block_keys_with_an_extra_key() -> None:
    assert [key.hex() for key in CHAIN.keys(PROMPT, 16, {1: EXTRA})] == [
        "a39cd0402032f626844af68c0cb32f5e",
        "7de9d0fe54d3d20043165add40b02cad",
        "c64a7772dfda69201c2af0f7ab35c049",
    ]


def test_joined_extra_keys() -> None:
    assert joined_extra_keys([b"a", b"", b"bc"]).hex() == "010000006100000000020000006263"


def golden_record() -> bytes:
    """The record's bytes as the format's description has them, without any code of ours."""
    head = bytes.fromhex(RECORD_HEAD).ljust(PAGE_BYTES - 8, b"\0") + bytes.fromhex("6410e6f7e6be8318")
    return head + bytes.fromhex(PAYLOAD).ljust(PAGE_BYTES, b"\0")


def test_a_record_is_written_so() -> None:
    head = head_of(codec=7, codec_params=b"\1\2\3", payload_bytes=5, raw_bytes=384)
    record = bytearray(head.record_bytes)
    record[PAGE_BYTES : PAGE_BYTES + 5] = bytes.fromhex(PAYLOAD)
    seal(record, head)
    assert record.hex() == golden_record().hex()


def test_a_record_is_read_so() -> None:
    head = head_of(codec=7, codec_params=b"\1\2\3", payload_bytes=5, raw_bytes=384)
    found = open_record(golden_record(), head)
    assert (found.codec, found.codec_params, found.payload_bytes, found.raw_bytes) == (7, b"\1\2\3", 5, 384)
    assert (found.key, found.parent, found.depth, found.epoch) == (head.key, head.parent, 1, 3)
    assert (found.tokens, found.extra) == (head.tokens, b"image-digest")

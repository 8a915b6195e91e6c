"""One byte changed in anything that a block depends on is another key; nothing else is."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvpool.blocks.identity import (
    KEY_BYTES,
    MAX_EXTRA_KEY_BYTES,
    SECRET_BYTES,
    BlockKey,
    Fingerprint,
    KeyChain,
    ModelIdentity,
    TenantDigest,
    checked_extra_keys,
    joined_extra_keys,
    tenant_digest,
)
from kvpool.blocks.layout import Dtype, KVLayout
from kvpool.errors import InputError

from .samples import IDENTITY, LAYOUT, SECRET

TEXT_FIELDS = ["name", "weights", "revision", "adapter", "rope", "quantization", "kv_scales"]
OTHER_VALUES: dict[str, list[Any]] = {
    "tp_rank": [0],
    "tp_size": [3, 4],
    "generation": [b"", bytes(16), bytes(range(15)), bytes(range(17)), bytes([1, *range(1, 16)])],
}
OTHER_LAYOUTS: dict[str, list[Any]] = {
    "layers": [1, 3],
    "kv_heads": [1, 3],
    "head_size": [7, 9],
    "dtype": [dtype for dtype in Dtype if dtype is not LAYOUT.dtype],
    "block_tokens": [3, 5],
    "value_head_size": [0, 3, 5, None],
}
BLOCK_BYTES = LAYOUT.token_bytes
PROMPT = bytes(range(3 * BLOCK_BYTES))
secrets = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)
fingerprints = st.binary(min_size=32, max_size=32).map(Fingerprint)
digests = st.binary(min_size=16, max_size=16).map(TenantDigest)


def changed(data: bytes, position: int, change: int) -> bytes:
    return data[:position] + bytes([data[position] ^ change]) + data[position + 1 :]


def one_byte_changed(text: str) -> list[str]:
    return [text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :] for at in range(len(text))]


def test_every_field_of_the_fingerprint_is_in_these_tests() -> None:
    fields = {field.name for field in dataclasses.fields(ModelIdentity) if field.init}
    assert fields == {*TEXT_FIELDS, *OTHER_VALUES, "layout"}
    assert {field.name for field in dataclasses.fields(KVLayout)} == set(OTHER_LAYOUTS)


@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_one_byte_changed_in_a_text_is_another_fingerprint(field: str) -> None:
    text = getattr(IDENTITY, field)
    others = [*one_byte_changed(text), text + " ", " " + text, text[:-1], text + "\0"]
    assert_all_differ([dataclasses.replace(IDENTITY, **{field: other}) for other in others])


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_another_value_is_another_fingerprint(field: str) -> None:
    assert_all_differ([dataclasses.replace(IDENTITY, **{field: value}) for value in OTHER_VALUES[field]])


@pytest.mark.parametrize("field", OTHER_LAYOUTS)
def test_another_geometry_is_another_fingerprint(field: str) -> None:
    layouts = [dataclasses.replace(LAYOUT, **{field: value}) for value in OTHER_LAYOUTS[field]]
    assert_all_differ([dataclasses.replace(IDENTITY, layout=layout) for layout in layouts])


def assert_all_differ(identities: list[ModelIdentity]) -> None:
    found = [identity.fingerprint for identity in [IDENTITY, *identities]]
    assert len(set(found)) == len(found)


@given(first=st.text(min_size=1), second=st.text(min_size=1), shift=st.integers(0, 50))
def test_text_does_not_move_from_one_field_to_the_next(first: str, second: str, shift: int) -> None:
    joined = first + second
    at = 1 + shift % max(len(joined) - 1, 1)
    one = dataclasses.replace(IDENTITY, revision=first, adapter=second)
    other = dataclasses.replace(IDENTITY, revision=joined[:at], adapter=joined[at:])
    assert (one.fingerprint == other.fingerprint) == ((first, second) == (joined[:at], joined[at:]))


def test_a_value_head_as_wide_as_the_key_head_is_the_default() -> None:
    implied = dataclasses.replace(LAYOUT, value_head_size=None)
    given_size = dataclasses.replace(LAYOUT, value_head_size=LAYOUT.head_size)
    assert (
        dataclasses.replace(IDENTITY, layout=implied).fingerprint
        == dataclasses.replace(IDENTITY, layout=given_size).fingerprint
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name"), ({"weights": ""}, "weights"), ({"tp_rank": 2}, "0 to 1"), ({"tp_rank": -1}, "0 to 1"),
        ({"name": "half \ud83d\ude00 pairs"}, "no Unicode character"),
    ],
)  # fmt: skip
def test_an_identity_that_says_too_little_or_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(IDENTITY, **changes)


@given(secrets, st.text(), st.text())
def test_tenants_have_equal_digests_only_if_they_are_equal(secret: bytes, one: str, other: str) -> None:
    assert (tenant_digest(secret, one) == tenant_digest(secret, other)) == (one == other)


def test_a_tenant_is_known_only_to_those_who_have_the_secret() -> None:
    found = {tenant_digest(changed(SECRET, at, 1), "acme") for at in range(SECRET_BYTES)}
    assert len(found | {tenant_digest(SECRET, "acme")}) == SECRET_BYTES + 1


def test_a_tenant_that_has_no_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="tenant holds"):
        tenant_digest(SECRET, "\ud800")


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"secret has {size} bytes"):
        KeyChain(bytes(size), IDENTITY.fingerprint, TenantDigest(bytes(16)), 0)
    with pytest.raises(InputError, match=f"secret has {size} bytes"):
        tenant_digest(bytes(size), "acme")


@given(
    secret=secrets, fingerprint=fingerprints, tenant=digests, epoch=st.integers(0, 2**64 - 1),
    field=st.sampled_from(["secret", "fingerprint", "tenant", "epoch"]), at=st.integers(0, 31),
    change=st.integers(1, 255),
)  # fmt: skip
def test_one_byte_changed_in_the_seed_changes_every_key(
    secret: bytes, fingerprint: Fingerprint, tenant: TenantDigest, epoch: int, field: str, at: int, change: int
) -> None:
    seed: dict[str, Any] = {"secret": secret, "fingerprint": fingerprint, "tenant": tenant, "epoch": epoch}
    if field == "epoch":
        seed["epoch"] ^= change << 8 * (at % 8)
    else:
        seed[field] = changed(seed[field], at % len(seed[field]), change)
    one, other = KeyChain(secret, fingerprint, tenant, epoch), KeyChain(**seed)
    assert one.root != other.root
    assert not set(one.keys(PROMPT, BLOCK_BYTES)) & set(other.keys(PROMPT, BLOCK_BYTES))


@pytest.mark.parametrize("position", range(len(PROMPT)))
def test_one_byte_changed_in_a_token_changes_its_key_and_all_after(position: int) -> None:
    chain = chain_of()
    one, other = chain.keys(PROMPT, BLOCK_BYTES), chain.keys(changed(PROMPT, position, 0x80), BLOCK_BYTES)
    block = position // BLOCK_BYTES
    assert one[:block] == other[:block]
    assert not set(one[block:]) & set(other[block:])


@given(
    extra=st.binary(min_size=1, max_size=40), at=st.integers(0, 39), change=st.integers(1, 255), block=st.integers(0, 2)
)
def test_one_byte_changed_in_an_extra_key_changes_its_key_and_all_after(
    extra: bytes, at: int, change: int, block: int
) -> None:
    chain = chain_of()
    plain = chain.keys(PROMPT, BLOCK_BYTES)
    one = chain.keys(PROMPT, BLOCK_BYTES, {block: extra})
    other = chain.keys(PROMPT, BLOCK_BYTES, {block: changed(extra, at % len(extra), change)})
    assert plain[:block] == one[:block] == other[:block]
    assert len({*plain[block:], *one[block:], *other[block:]}) == 3 * (3 - block)


@given(parent=st.binary(min_size=16, max_size=16), tokens=st.binary(max_size=40), extra=st.binary(max_size=40))
def test_bytes_do_not_move_between_extra_key_and_tokens(parent: bytes, tokens: bytes, extra: bytes) -> None:
    chain, joined = chain_of(), extra + tokens
    found = {chain.extend(BlockKey(parent), joined[at:], joined[:at]) for at in range(len(joined) + 1)}
    assert len(found) == len(joined) + 1


def test_a_prompt_and_its_beginning_share_their_keys() -> None:
    chain = chain_of()
    keys = chain.keys(PROMPT, BLOCK_BYTES)
    assert chain.keys(PROMPT[: 2 * BLOCK_BYTES], BLOCK_BYTES) == keys[:2]
    assert chain.keys(PROMPT[: 2 * BLOCK_BYTES + 4], BLOCK_BYTES) == keys[:2]
    assert chain.keys(b"", BLOCK_BYTES) == chain.keys(PROMPT[: BLOCK_BYTES - 1], BLOCK_BYTES) == []
    assert [len(key) for key in keys] == [KEY_BYTES] * 3


def test_the_same_block_elsewhere_has_another_key() -> None:
    chain = chain_of()
    keys = chain.keys(PROMPT[:BLOCK_BYTES] * 3, BLOCK_BYTES)
    assert len({chain.root, *keys}) == 4


def chain_of() -> KeyChain:
    return KeyChain(SECRET, IDENTITY.fingerprint, tenant_digest(SECRET, "acme"), 3)


parts = st.lists(st.binary(max_size=12), max_size=5)


@given(parts, parts)
def test_two_lists_of_parts_never_give_the_same_extra_key(one: list[bytes], other: list[bytes]) -> None:
    assert (joined_extra_keys(one) == joined_extra_keys(other)) == (one == other)


def test_empty_extra_keys_are_none() -> None:
    assert checked_extra_keys({0: b"", 3: b"x"}) == {3: b"x"}


@pytest.mark.parametrize(
    ("extra_keys", "message"),
    [
        ({-1: b"x"}, r"extra_keys\[-1\]"),
        ({7: bytes(MAX_EXTRA_KEY_BYTES + 1)}, rf"extra_keys\[7\] has {MAX_EXTRA_KEY_BYTES + 1} bytes"),
        ({7: memoryview(bytes(8 * MAX_EXTRA_KEY_BYTES)).cast("d")}, r"extra_keys\[7\] has 8192 bytes"),
    ],
)
def test_extra_keys_that_no_record_can_hold_are_named_by_their_block(extra_keys: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_extra_keys(extra_keys)
